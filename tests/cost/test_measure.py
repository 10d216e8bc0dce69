"""What a machine is measured to be is of the right kind; how fast it is, no test can say."""

from dataclasses import asdict

from openblip.cost.machines import load_machine
from openblip.cost.measure import measure_machine
from openblip.models.config import BlipConfig
from openblip.nn.config import TextConfig, VisionConfig
from tiny_blip import TINY

SMALL = BlipConfig(
    vision=VisionConfig(image_size=32, hidden_dim=32, num_layers=1, num_heads=2, mlp_dim=32),
    text=TextConfig(hidden_dim=32, num_layers=1, num_heads=2, mlp_dim=32, vocab_size=2000),
    embed_dim=TINY.embed_dim,
)


def test_a_measured_machine_can_be_saved_and_used(tmp_path) -> None:
    sizes = ((64, 48), (400, 300))
    machine = measure_machine(device="cpu", batch_size=2, repeats=1, model=SMALL, trained=SMALL, photographs=sizes)
    speeds = {name: value for name, value in asdict(machine).items() if name.endswith("_flops")}
    assert len(speeds) == 4
    assert all(1e3 < speed < 1e15 for speed in speeds.values()), speeds
    assert machine.accelerators == 0
    assert 0 < machine.decode_seconds_per_megapixel < 1
    machine.save(tmp_path / "here.json")
    assert load_machine(str(tmp_path / "here.json")) == machine

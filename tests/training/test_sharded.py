"""Two processes train as one: stage 1 with DDP, stage 2 around a language model that FSDP2 divides.

Blocks are computed again in the backward pass, frozen ones in eval mode too, and nothing else changes.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import two_trainers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from two_trainers import loader_of, pairs_at, stage1, stage2, texts_at, tiny_opt, trained

from openblip.distributed import Process
from openblip.errors import CheckpointError, ConfigError
from openblip.models.blip import Blip
from openblip.tasks.base import Task
from openblip.training.run_folder import RunFolder
from openblip.training.sharding import find_stacks, recompute_activations
from openblip.training.state import RunState
from openblip.training.trainer import SPEED, Trainer
from shared_files import read_lines
from tiny_blip import SIZE, TINY, gradients, random_pixels, random_tokens, randomise
from two_processes_of import launch
from written_texts import beam_ids

ALONE = Process(0, 1, torch.device("cpu"))
ALL = slice(0, 4)
SCRIPT = Path(two_trainers.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote; their last run was killed on the way, and resumed."""
    out = tmp_path_factory.mktemp("two_trainers")
    whole = launch(SCRIPT, str(out), "whole")
    assert (out / "uninterrupted-1.pt").exists(), whole.stderr[-3000:]
    assert whole.returncode != 0
    assert not (out / "killed-0.pt").exists()
    resumed = launch(SCRIPT, str(out), "resumed")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    return out


def metrics(folder: Path) -> list[dict[str, float]]:
    """Every step's but its speed."""
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in SPEED} for line in lines]


def without_key_bias(name: str, value: Tensor) -> Tensor:
    """A bias of keys changes no attention: its gradient is rounding, of which Adam makes full steps."""
    if name.endswith("qkv.bias"):
        query, _, value_bias = value.chunk(3)
        return torch.cat([query, value_bias])
    return value.chunk(2)[1] if name.endswith("key_value.bias") else value


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in two_trainers.RUNS if "bf16" not in name])
def test_two_processes_train_as_one_on_the_joint_batch(results: Path, tmp_path: Path, name: str) -> None:
    """Losses, joint gradient norms before clipping, and weights."""
    changes, of_task = two_trainers.RUNS[name]
    alone = two_trainers.train(tmp_path, name, ALONE, changes, of_task)
    for ours, theirs in zip(metrics(results / name), metrics(tmp_path / name), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    start = trained(two_trainers.make(name, **of_task))
    for rank in range(2):
        weights = torch.load(results / f"{name}-{rank}.pt")["weights"]
        assert weights.keys() == alone["weights"].keys() == start.keys()
        for key, value in alone["weights"].items():
            assert not torch.equal(value, start[key]), f"{key} was not trained"
            pair = (without_key_bias(key, weights[key]), without_key_bias(key, value))
            torch.testing.assert_close(*pair, rtol=0, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_two_processes_cast_the_weights_of_a_step_as_one_does(results: Path, tmp_path: Path) -> None:
    """In bfloat16, without autocast."""
    changes, of_task = two_trainers.RUNS["stage1-bf16"]
    two_trainers.train(tmp_path, "stage1-bf16", ALONE, changes, of_task)
    folders = (results / "stage1-bf16", tmp_path / "stage1-bf16", results / "stage1")
    ours, alone, exact = ([record["loss"] for record in metrics(folder)] for folder in folders)
    assert ours == pytest.approx(alone, rel=0.02)
    assert ours == pytest.approx(exact, rel=0.05)
    assert ours != exact


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"), [("whole", "sharded"), ("whole", "sharded-recomputed"), ("bf16", "sharded-bf16")]
)
def test_dividing_and_recomputing_change_no_bit(results: Path, one: str, other: str) -> None:
    """In bfloat16, too, where one process and two differ by the order of their sums."""
    assert metrics(results / one) == metrics(results / other)
    weights, others = (torch.load(results / f"{name}-0.pt")["weights"] for name in (one, other))
    for key, value in weights.items():
        assert torch.equal(others[key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded", "sharded-lora", "sharded-bf16"])
def test_each_process_keeps_half_of_the_frozen_blocks(results: Path, name: str) -> None:
    """Adapters are whole everywhere, and at the end the main process has everything as it was."""
    task = two_trainers.make(name, **two_trainers.RUNS[name][1])
    language = task.get_submodule("model.language")
    frozen = {n: p for n, p in language.named_parameters() if ".layers." in n and not p.requires_grad}
    assert len(frozen) == 2 * 16
    half = sum(parameter.numel() for parameter in frozen.values()) / 2
    main, other = (torch.load(results / f"{name}-{rank}.pt") for rank in range(2))
    assert main["kept"] == other["kept"] == half
    assert main["left"] == []
    assert sorted(other["left"]) == sorted(f"model.language.{key}" for key in frozen)
    for key, value in task.state_dict().items():
        if key.startswith("model.language.") and "lora_" not in key:
            assert torch.equal(main["state"][key], value), key


@pytest.mark.slow
def test_a_killed_run_of_two_processes_resumes_exactly(results: Path) -> None:
    """Divided language model, adapters and dropout; killed within the accumulation of its fifth step."""
    whole, killed = metrics(results / "uninterrupted"), metrics(results / "killed")
    assert [record["step"] for record in whole] == [1, 2, 3, 4, 5]
    assert killed == whole
    for rank in range(2):
        expected, found = (torch.load(results / f"{n}-{rank}.pt") for n in ("uninterrupted", "killed"))
        for key, value in expected["weights"].items():
            assert torch.equal(found["weights"][key], value), key


@pytest.mark.slow
def test_one_process_continues_a_run_of_two(results: Path, tmp_path: Path) -> None:
    """With a batch of twice the size, so that a step has the same samples."""
    folder = shutil.copytree(results / "whole", tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step_00000005")
    torch.manual_seed(0)
    alone = Trainer(stage2(), loader_of(texts_at, slice(0, 4)), two_trainers.settings(4), RunFolder(folder), ALONE)
    assert alone.step == 3
    assert alone.run()
    of_two = [record["lm"] for record in metrics(results / "whole")]
    assert [record["lm"] for record in metrics(folder)] == pytest.approx(of_two, abs=1e-5)


@pytest.mark.slow
def test_a_checkpoint_holds_what_changes_and_nothing_frozen(results: Path) -> None:
    """Also of a divided model: adapters are in it, and every number of them."""
    folder = results / "sharded-lora" / "checkpoints" / "step_00000005"
    saved = torch.load(folder / "task.pt", weights_only=True)
    weights = torch.load(results / "sharded-lora-0.pt")["weights"]
    assert saved.keys() == weights.keys()
    assert sum("lora_" in key for key in saved) == 8
    for key, value in weights.items():
        assert torch.equal(saved[key], value), key
    fingerprint = json.loads((folder / "frozen.json").read_text())
    state = stage2(lora=True).state_dict()
    assert fingerprint.keys() == state.keys() - saved.keys()


def trainer(path: Path, task: Any, **changes: Any) -> Trainer:
    path.mkdir(exist_ok=True)
    loader = loader_of(texts_at, slice(0, 2))
    return Trainer(task, loader, two_trainers.settings(2, **changes), RunFolder(path), ALONE)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 1}, r"belongs to other frozen weights: \d+ differ, first model\.language"),
        ({"dtype": torch.bfloat16}, r"was float32 (\d+)x16 \w+, now bfloat16 \1x16"),
        ({"lora": True}, r"was not frozen, now float32"),
    ],
)
def test_another_frozen_model_is_refused_at_a_resume(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    trainer(tmp_path, stage2(), steps=1).run()
    trainer(tmp_path, stage2(), steps=1)
    with pytest.raises(CheckpointError, match=said):
        trainer(tmp_path, stage2(**other), steps=1)


def test_a_run_whose_encoder_was_frozen_does_not_go_on_with_a_trained_one(tmp_path: Path) -> None:
    trainer(tmp_path, stage2(), steps=1).run()
    task = stage2()
    task.model.freeze("language")
    with pytest.raises(CheckpointError, match=r"model\.vision\.\S+ was float32 \S+ \w+, now not frozen"):
        trainer(tmp_path, task, steps=1)


def test_one_changed_weight_shows_in_the_fingerprint() -> None:
    """Small tensors are read whole."""
    before, after = stage2(), stage2()
    with torch.no_grad():
        after.model.language.model.get_input_embeddings().weight[5, 3] += 1e-3
    ours, theirs = (RunState(task, 2, ALONE).fingerprint for task in (before, after))
    assert [key for key in ours if ours[key] != theirs[key]] == [
        "model.language.model.model.decoder.embed_tokens.weight",
        "model.language.model.lm_head.weight",
    ]


def test_without_a_frozen_model_of_transformers_there_is_nothing_to_divide(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.shard_frozen divides frozen models of transformers"):
        trainer(tmp_path, stage1(), shard_frozen=True)


@contextmanager
def passes(*modules: nn.Module) -> Iterator[list[int]]:
    """How often each module's first linear layer is computed, by forward passes and recomputations.

    Not the last: recomputation stops when it has all that the backward pass needs.
    """
    counts = [0] * len(modules)
    handles = []
    for i, module in enumerate(modules):
        linear = next(part for part in module.modules() if isinstance(part, nn.Linear))

        def count(*_: Any, i: int = i) -> None:
            counts[i] += 1

        handles.append(linear.register_forward_hook(count))
    yield counts
    for handle in handles:
        handle.remove()


def loss_of(task: Task, batch: Any) -> Tensor:
    torch.manual_seed(0)
    return torch.stack(list(task(batch, 0, torch.Generator().manual_seed(0)).values())).sum()


def assert_same(usual: Task, recomputed: Task, batch: Any, loss: Tensor) -> None:
    """The loss of `recomputed` and the gradients that it has left are those of `usual`."""
    expected = loss_of(usual, batch)
    expected.backward()
    assert torch.equal(loss, expected)
    found = gradients(recomputed)
    for name, gradient in gradients(usual).items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(gradient, found[name]), name


def bytes_kept(task: Task, batch: Any) -> int:
    """What the forward pass leaves for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in task.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(task, batch)  # alive to the end, so that no address is given twice
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("lora", [False, True])
def test_a_frozen_language_model_is_computed_twice_and_keeps_less(lora: bool) -> None:
    """transformers' own switch leaves blocks in eval mode alone."""
    usual, recomputed = stage2(lora=lora, dropout=0.1).train(), stage2(lora=lora, dropout=0.1).train()
    recompute_activations(recomputed)
    batch = texts_at(0, ALL)
    blocks = find_stacks(recomputed.get_submodule("model.language"))[0].blocks
    assert not any(block.training for block in blocks)  # of adapters, dropout alone trains
    with passes(*blocks) as counts:
        loss = loss_of(recomputed, batch)
        assert counts == [1, 1]
        loss.backward()
        assert counts == [2, 2]
    assert_same(usual, recomputed, batch, loss)
    assert bytes_kept(recomputed, batch) < 0.7 * bytes_kept(usual, batch)


def test_without_gradients_nothing_is_computed_twice_and_texts_are_written_alike() -> None:
    usual, recomputed = stage2(), stage2()
    recompute_activations(recomputed)
    blocks = find_stacks(recomputed)[0].blocks
    with torch.no_grad(), passes(*blocks) as counts:
        loss_of(recomputed, texts_at(0, ALL))
        assert counts == [1, 1]
    visual = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    written = [beam_ids(task.get_submodule("model.language"), visual, ["", "a dog"], 5) for task in (usual, recomputed)]
    assert written[0] == written[1]


def test_the_qformer_is_computed_twice_also_where_it_reads_a_cache() -> None:
    """ITC's and ITM's texts, and ITG, which goes on from the queries' keys and values."""
    usual, recomputed = stage1().train(), stage1().train()
    recompute_activations(recomputed)
    layers = [recomputed.get_submodule(f"model.qformer.layers.{i}") for i in range(2)]
    batch = pairs_at(0, ALL)
    with passes(*layers) as counts:
        loss = loss_of(recomputed, batch)
        forwards = list(counts)
        loss.backward()
    assert counts == [2 * forward for forward in forwards]
    assert_same(usual, recomputed, batch, loss)


def test_every_transformer_of_blip_is_computed_twice() -> None:
    model = Blip(TINY)
    randomise(model, seed=0)
    recompute_activations(model.train())
    parts = [model.vision.blocks[0], model.text.layers[0]]
    with passes(*parts) as counts:
        tokens = random_tokens([5, 4])
        image, text = model.encode_image(random_pixels(2)), model.embed_text(tokens.ids, tokens.mask)
        assert counts == [1, 1]
        (image.sum() + text[:, 0].sum()).backward()
        assert counts == [2, 2]


def test_a_run_recomputes_where_its_config_says_so(tmp_path: Path) -> None:
    losses = []
    for recompute in (False, True):
        task = stage2()
        run = trainer(tmp_path / str(recompute), task, steps=1, activation_checkpointing=recompute)
        with passes(*find_stacks(task)[0].blocks) as counts:
            run.run()
        assert counts == [4, 4] if recompute else [2, 2]  # two micro-batches
        losses.append((tmp_path / str(recompute) / "metrics.jsonl").read_text().split('"samples')[0])
    assert losses[0] == losses[1]


def tiny(kind: str) -> Any:
    """A language model of another architecture, with its number of blocks."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    library: Any = transformers
    match kind:
        case "t5":
            config = library.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
            return library.T5ForConditionalGeneration(config), 4
        case "bart":
            sizes = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
            sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}
            return library.BartForConditionalGeneration(library.BartConfig(vocab_size=20, d_model=16, **sizes)), 4
        case "gpt2":
            return library.GPT2LMHeadModel(library.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2)), 2
        case "llama":
            return library.LlamaForCausalLM(library.LlamaConfig(vocab_size=20, **small)), 2
        case "clip":
            return library.CLIPVisionModel(library.CLIPVisionConfig(**small, image_size=SIZE, patch_size=8)), 2
        case _:
            return tiny_opt(lora=True), 2


@pytest.mark.parametrize("kind", ["opt with lora", "gpt2", "llama", "t5", "bart", "clip"])
def test_blocks_of_any_architecture_are_found(kind: str) -> None:
    """Blocks and nothing else: no embeddings, no part of a block."""
    model, number = tiny(kind)
    (stack,) = find_stacks(nn.ModuleDict({"within": model}))
    assert len(stack.blocks) == number
    held = [id(parameter) for block in stack.blocks for parameter in block.parameters()]
    assert len(held) == len(set(held))
    assert all(id(parameter) in set(held) for name, parameter in model.named_parameters() if ".1." in name)
    assert type(stack.model) is type(model.model if kind == "opt with lora" else model)

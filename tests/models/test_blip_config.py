"""Model configs: what cannot work is refused where it is written."""

import json

import pytest

from openblip.errors import ConfigError
from openblip.models.config import BlipConfig, TextConfig, VisionConfig


def test_a_config_survives_json() -> None:
    config = BlipConfig(
        vision=VisionConfig(image_size=48, patch_size=12, drop_path=0.1),
        text=TextConfig(sharing="none", vocab_size=77),
        heads=("lm",),
    )
    assert BlipConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionConfig(image_size=100), "image_size 100 is no multiple of patch_size 16"),
        (lambda: VisionConfig(hidden_dim=100), "vision.hidden_dim 100 does not divide into 12 heads"),
        (lambda: TextConfig(num_heads=0), "text.hidden_dim 768 does not divide into 0 heads"),
        (lambda: TextConfig(sharing="everything"), "sharing"),  # type: ignore[arg-type]
        (lambda: BlipConfig(heads=()), "at least one of itc, itm, lm"),
        (lambda: BlipConfig(heads=("itc", "vga")), "at least one of itc, itm, lm"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_contradict_each_other_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("change", ["missing", "unknown", "wrong"])
def test_a_config_of_another_version_is_refused(change: str) -> None:
    values = BlipConfig().to_dict()
    if change == "missing":
        del values["embed_dim"]
    elif change == "unknown":
        values["text"]["num_experts"] = 3
    else:
        values["vision"] = None
    with pytest.raises(ConfigError, match="cannot be read"):
        BlipConfig.from_dict(values)


def test_the_tokens_of_the_papers_resolutions() -> None:
    assert VisionConfig(image_size=224).num_tokens == 197
    assert VisionConfig(image_size=384).num_tokens == 577


def test_readings_follow_from_heads() -> None:
    assert BlipConfig().modes == ("encode", "decode")
    assert BlipConfig(heads=("lm",)).modes == ("decode",)
    assert BlipConfig(heads=("itc",)).modes == BlipConfig(heads=("itm", "itc")).modes == ("encode",)

"""Model configs: what cannot work is refused where it is written."""

import json

import pytest

from openblip.errors import ConfigError
from openblip.models.config import BlipConfig, Sharing, TextConfig, VisionConfig


def test_a_config_survives_json() -> None:
    config = BlipConfig(
        vision=VisionConfig(image_size=48, patch_size=12, drop_path=0.1),
        text=TextConfig(sharing="none", vocab_size=77),
        heads=("lm",),
        pooled=True,
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
        (lambda: BlipConfig(heads=("lm", "vqa")), "vqa and lm cannot share a text transformer"),
        (lambda: BlipConfig(heads=("vqa", "nlvr")), "cannot share a text transformer"),
        (lambda: BlipConfig(heads=("itm", "nlvr")), "nlvr and itm cannot share a text transformer"),
        (lambda: BlipConfig(heads=("visdial", "nlvr")), "nlvr and visdial cannot share a text transformer"),
        (lambda: _unequal_widths("all_but_sa"), r"widths \[48, 768\].*choose none or all_but_ca"),
        (lambda: _unequal_widths("all"), r"widths \[48, 768\].*choose none or all_but_ca"),
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


def _unequal_widths(sharing: Sharing) -> BlipConfig:
    return BlipConfig(vision=VisionConfig(hidden_dim=48), text=TextConfig(sharing=sharing), heads=("vqa",))


def test_answers_may_read_questions_of_another_width_with_weights_of_their_own() -> None:
    for sharing in ("none", "all_but_ca"):
        assert _unequal_widths(sharing).context_dims == {"encode": 48, "decode": 768}
    assert BlipConfig(vision=VisionConfig(hidden_dim=48)).context_dims == {"encode": 48, "decode": 48}


def test_a_config_from_before_there_was_pooling_is_read() -> None:
    values = BlipConfig().to_dict()
    del values["pooled"]
    assert BlipConfig.from_dict(values) == BlipConfig()


def test_readings_follow_from_heads() -> None:
    assert BlipConfig().modes == ("encode", "decode")
    assert BlipConfig(heads=("lm",)).modes == ("decode",)
    assert BlipConfig(heads=("itc",)).modes == BlipConfig(heads=("itm", "itc")).modes == ("encode",)
    assert BlipConfig(heads=("vqa",)).modes == ("encode", "decode")
    assert BlipConfig(heads=("nlvr",)).modes == BlipConfig(heads=("visdial",)).modes == ("encode",)

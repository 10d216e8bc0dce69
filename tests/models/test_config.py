"""Model configs: what cannot work is refused where it is written."""

import json
from dataclasses import replace
from typing import Any

import pytest

from openblip.errors import ConfigError
from openblip.models.config import Blip2Config, BlipConfig, LanguageConfig, TowerConfig
from openblip.nn.config import QFormerConfig, Sharing, TextConfig, VisionConfig

OPT = LanguageConfig(name="facebook/opt-2.7b", hidden_dim=2560, end_of_text="\n")
CLIP = TowerConfig(name="openai/clip-vit-large-patch14", hidden_dim=1024)


@pytest.mark.parametrize(
    "config",
    [
        BlipConfig(vision=VisionConfig(drop_path=0.1), text=TextConfig(vocab_size=77), heads=("lm",), pooled=True),
        Blip2Config(),
        Blip2Config(heads=("llm",), language=OPT, vision=CLIP, vision_norm_eps=1e-6),
        Blip2Config(heads=("itm", "llm"), language=replace(OPT, end_of_text=None), instructed=True),
        Blip2Config(vision=VisionConfig(activation="quick_gelu", input_norm=True, output_norm=False)),
    ],
)
def test_a_config_survives_json(config: BlipConfig | Blip2Config) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


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
        (lambda: QFormerConfig(hidden_dim=100), "qformer.hidden_dim 100 does not divide into 12 heads"),
        (lambda: QFormerConfig(num_heads=0), "does not divide into 0 heads"),
        (lambda: QFormerConfig(num_queries=0), "qformer.num_queries is 0; it must be at least 1"),
        (lambda: QFormerConfig(cross_attention_every=0), "qformer.cross_attention_every is 0"),
        (lambda: QFormerConfig(num_layers=-1), "qformer.num_layers is -1"),
        (lambda: QFormerConfig(vocab_size=0), "qformer.vocab_size is 0"),
        (lambda: QFormerConfig(dropout=1.0), "qformer.dropout is 1.0; it must be from 0 to below 1"),
        (lambda: QFormerConfig(dropout=-0.1), "qformer.dropout is -0.1"),
        (lambda: TowerConfig(name="x", hidden_dim=0), "vision.hidden_dim is 0"),
        (lambda: LanguageConfig(name="x", hidden_dim=0), "language.hidden_dim is 0"),
        (lambda: replace(OPT, max_text_tokens=1), "language.max_text_tokens is 1; it must be at least 2"),
        (lambda: VisionConfig(activation="relu"), "vision.activation relu: choose one of gelu, quick_gelu"),
        (lambda: Blip2Config(embed_dim=0), "embed_dim is 0"),
        (lambda: Blip2Config(heads=()), "at least one of itc, itm, itg, llm"),
        (lambda: Blip2Config(heads=("itc", "lm")), "at least one of itc, itm, itg, llm"),
        (lambda: Blip2Config(heads=("llm",)), "llm and a language model belong together"),
        (lambda: Blip2Config(language=OPT), "llm and a language model belong together"),
        (lambda: Blip2Config(instructed=True), "instructed needs the head llm"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "values",
    [
        {name: value for name, value in BlipConfig().to_dict().items() if name != "embed_dim"},
        {**BlipConfig().to_dict(), "text": {**BlipConfig().to_dict()["text"], "num_experts": 3}},
        {**BlipConfig().to_dict(), "vision": None},
    ],
    ids=["missing", "unknown", "wrong"],
)
def test_a_config_of_another_version_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        BlipConfig.from_dict(values)


def _unequal_widths(sharing: Sharing) -> BlipConfig:
    return BlipConfig(vision=VisionConfig(hidden_dim=48), text=TextConfig(sharing=sharing), heads=("vqa",))


def test_answers_may_read_questions_of_another_width_with_weights_of_their_own() -> None:
    for sharing in ("none", "all_but_ca"):
        assert _unequal_widths(sharing).context_dims == {"encode": 48, "decode": 768}
    assert BlipConfig(vision=VisionConfig(hidden_dim=48)).context_dims == {"encode": 48, "decode": 48}


def test_a_config_from_before_there_was_pooling_is_read() -> None:
    values = {name: value for name, value in BlipConfig().to_dict().items() if name != "pooled"}
    assert BlipConfig.from_dict(values) == BlipConfig()


def test_readings_follow_from_heads() -> None:
    assert BlipConfig().modes == ("encode", "decode")
    assert BlipConfig(heads=("lm",)).modes == ("decode",)
    assert BlipConfig(heads=("itc",)).modes == BlipConfig(heads=("itm", "itc")).modes == ("encode",)
    assert BlipConfig(heads=("vqa",)).modes == ("encode", "decode")
    assert BlipConfig(heads=("nlvr",)).modes == BlipConfig(heads=("visdial",)).modes == ("encode",)


def changed(path: str, value: object) -> dict[str, Any]:
    """A written config with another value at a dotted path."""
    values: dict[str, Any] = json.loads(json.dumps(Blip2Config(heads=("llm",), language=OPT).to_dict()))
    *parents, last = path.split(".")
    inner = values
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    "values",
    [
        {},
        {name: value for name, value in Blip2Config().to_dict().items() if name != "embed_dim"},
        {name: value for name, value in Blip2Config().to_dict().items() if name != "language"},
        changed("num_experts", 3),
        changed("qformer.num_experts", 3),
        changed("language.num_experts", 3),
        changed("vision.num_experts", 3),
        changed("vision", None),
        changed("vision", 7),
        changed("qformer", None),
        changed("heads", None),
        changed("heads", "llm"),
        changed("heads", ["llm", "visdial"]),
        changed("language", "opt"),
        changed("language.hidden_dim", None),
        changed("qformer.num_queries", "many"),
        changed("embed_dim", None),
        changed("vision.hidden_dim", "wide"),
    ],
)
def test_a_blip2_config_of_another_version_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Blip2Config.from_dict(values)


def test_the_text_branch_stands_and_falls_with_what_is_read() -> None:
    assert all(Blip2Config(heads=(head,)).has_text_branch for head in ("itc", "itm", "itg"))
    assert not Blip2Config(heads=("llm",), language=OPT).has_text_branch
    assert Blip2Config(heads=("llm",), language=OPT, instructed=True).has_text_branch
    assert Blip2Config(heads=("itc", "llm"), language=OPT).has_text_branch

"""LAVIS' .pth files of BLIP-2 against `released_blip2.py`: numbers, names, frozen parts, what is refused, and ours that
come back whole."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import openblip
import released_blip2 as lavis
from damaged_files import Exploit, assert_read_in_bfloat16, assert_same_weights, edit_pth
from marks import slow
from openblip.checkpoints import original
from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.cli.main import main
from openblip.data.config import Preprocessing
from openblip.data.tokenizer import Tokenizer
from openblip.errors import CheckpointError, ConfigError
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, LanguageConfig, TowerConfig
from openblip.models.language_model import wrap_language_model
from openblip.models.vision_tower import VisionTower
from openblip.nn.config import QFormerConfig, VisionConfig
from tiny_blip import randomise

pytestmark = pytest.mark.slow

State = dict[str, Tensor]
Damage = Callable[[Any], object]
Kind = type[lavis.Eva] | type[lavis.Clip]
IDS = torch.tensor([[2, 9, 8, 7, 3], [2, 30, 31, 32, 3]])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lavis.write_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("kind", [lavis.Eva, lavis.Clip])
@torch.no_grad()
def test_stage_1_computes_what_the_released_code_does(tmp_path: Path, parts: Path, kind: Kind) -> None:
    theirs = lavis.stage1(kind)
    state = lavis.saved(theirs)
    assert not any(name.startswith("visual_encoder.") for name in state)  # as blip2_pretrained.pth
    checkpoint = load_checkpoint(lavis.write(tmp_path / "x.pth", state), vision=parts / f"{kind.__name__}.pth")
    ours = checkpoint.model
    features = ours.encode_image(lavis.PIXELS)
    close(features, theirs.visual_encoder(lavis.PIXELS))
    kv = ours.image_kv(features)
    queries = ours.encode_queries(kv).queries
    close(queries, theirs.read(lavis.PIXELS))
    close(ours.embed_image(queries), torch.nn.functional.normalize(theirs.vision_proj(queries), dim=-1))
    everywhere = torch.ones_like(IDS, dtype=torch.bool)
    close(ours.embed_text(IDS, everywhere), theirs.embed_text(IDS))
    matched = theirs.itm_head(theirs.read(lavis.PIXELS, IDS)[:, : lavis.QUERIES]).mean(dim=1)
    close(ours.match_logits(IDS, everywhere, kv), matched)
    words = theirs.Qformer["cls"]["predictions"](theirs.read(lavis.PIXELS, IDS, causal=True)[:, lavis.QUERIES :])
    close(ours.decode(IDS, kv), words)
    assert ours.temperature.item() == pytest.approx(lavis.TEMPERATURE, rel=1e-6)
    assert (checkpoint.prompt, checkpoint.preprocessing) == ("", Preprocessing(image_size=lavis.SIZE))
    assert checkpoint.tokenizer.to_json() == lavis.TOKENIZER.to_json()
    assert not ours.training


def test_wrapped_files(tmp_path: Path, parts: Path) -> None:
    """Of DDP, Lightning and torch.compile: the model's and its image encoder's."""
    state, encoder = lavis.saved(lavis.stage1()), lavis.encoder_state(lavis.Eva)
    expected = load_checkpoint(lavis.write(tmp_path / "x.pth", state), vision=parts / "Eva.pth")
    wrapped = {f"model._orig_mod.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "last.ckpt")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in encoder.items()}}, tmp_path / "eva.pth")
    found = load_checkpoint(tmp_path / "last.ckpt", vision=tmp_path / "eva.pth")
    assert_same_weights(found.model, expected.model)


@pytest.mark.parametrize(("name", "instructed"), lavis.STAGE2)
@pytest.mark.parametrize("kind", [lavis.Eva, *slow(lavis.Clip)])
@torch.no_grad()
def test_stage_2_computes_what_the_released_code_does(
    tmp_path: Path, parts: Path, name: str, instructed: bool, kind: Kind
) -> None:
    theirs = lavis.stage2(name, instructed, kind)
    state = lavis.saved(theirs)
    slipped_through = {n for n in state if n.startswith(f"{name}_model.")}
    assert len(slipped_through) == {"opt": 1, "t5": 3, "llm": 0}[name]  # lm_head; embed_tokens twice, lm_head
    path = lavis.write(tmp_path / "x.pth", state)
    encoder, language = parts / f"{kind.__name__}.pth", parts / name
    checkpoint = load_checkpoint(path, vision=encoder, language_model=language)
    ours = checkpoint.model
    kv = ours.image_kv(ours.encode_image(lavis.PIXELS))
    if instructed:
        queries = ours.encode_multimodal(IDS, torch.ones_like(IDS, dtype=torch.bool), kv)
        close(ours.visual_prompts(queries), theirs.visual_prompts(lavis.PIXELS, IDS))
    else:
        close(ours.visual_prompts(ours.encode_queries(kv).queries), theirs.visual_prompts(lavis.PIXELS))
    assert ours.config.heads == ("llm",)
    assert ours.config.instructed == instructed
    assert (checkpoint.tokenizer is None) != instructed
    end = "\n" if name == "opt" else None
    assert ours.config.language == LanguageConfig(name=str(language), hidden_dim=16, end_of_text=end)
    assert checkpoint.question_prompt == f"Question: {{}} {'Answer' if name == 'opt' else 'Short answer'}:"
    assert checkpoint.prompt == ""


def test_openblip_load_takes_the_parts(tmp_path: Path, parts: Path) -> None:
    path = lavis.write(tmp_path / "x.pth", lavis.stage2("opt"))
    model = openblip.load(path, "cpu", vision=parts / "Eva.pth", language_model=parts / "opt")
    assert isinstance(model, openblip.Blip2Predictor)
    assert_read_in_bfloat16(path, vision=parts / "Eva.pth", language_model=parts / "opt")


def test_t5_computes_with_the_activation_that_lavis_gives_it(tmp_path: Path, parts: Path) -> None:
    path = lavis.write(tmp_path / "x.pth", lavis.stage2("t5"))
    checkpoint = load_checkpoint(path, vision=parts / "Eva.pth", language_model=parts / "t5")
    save_checkpoint(checkpoint, tmp_path / "native", "openblip")
    for after in (checkpoint, load_checkpoint(tmp_path / "native")):
        feed_forward = after.model.language.model.encoder.block[0].layer[1].DenseReluDense
        x = torch.linspace(-3, 3, 50)
        assert torch.equal(feed_forward.act(x), torch.nn.functional.gelu(x))


def test_what_the_shapes_tell(tmp_path: Path, parts: Path) -> None:
    path = lavis.write(tmp_path / "x.pth", lavis.stage1(lavis.Clip))
    config = load_checkpoint(path, vision=parts / "Clip.pth").model.config
    assert config.vision == VisionConfig(
        image_size=lavis.SIZE, patch_size=8, hidden_dim=128, num_layers=2, num_heads=2, mlp_dim=4 * 128,
        layer_norm_eps=1e-5, activation="quick_gelu", input_norm=True, output_norm=False,
    )  # fmt: skip
    assert config.qformer == QFormerConfig(
        num_queries=lavis.QUERIES, hidden_dim=128, num_layers=4, num_heads=2, mlp_dim=90, vocab_size=lavis.VOCAB_SIZE,
        max_positions=30,
    )  # fmt: skip
    assert config == Blip2Config(vision=config.vision, qformer=config.qformer, embed_dim=10)
    assert config.vision_norm_eps == 1e-5


CLIP_L = VisionConfig(
    patch_size=14, hidden_dim=1024, num_layers=23, num_heads=16, mlp_dim=4096, layer_norm_eps=1e-5,
    activation="quick_gelu", input_norm=True, output_norm=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("width", "layout", "vision"),
    [(1408, original.EVA_CLIP, Blip2Config().vision), (1024, original.OPENAI_CLIP, CLIP_L)],
)
def test_the_released_sizes(width: int, layout: Any, vision: VisionConfig) -> None:
    """From the shapes of the released files, without their memory."""
    with torch.device("meta"):
        model = Blip2(Blip2Config(vision=vision))
    mlp = layout.table["blocks.{i}.mlp.0"].format(i=0)
    theirs = {
        f"{layout.table['patch_embedding']}.weight": torch.empty(width, 3, 14, 14, device="meta"),
        layout.table["position_embedding"]: torch.empty(1, 257, width, device="meta"),
        **{f"{layout.blocks}{i}.x": torch.empty(1, device="meta") for i in range(vision.num_layers)},
        f"{mlp}.weight": torch.empty(vision.mlp_dim, width, device="meta"),
    }
    assert original.infer_vit(theirs, layout.table, "", "x", layout.settings, layout.head_width) == vision
    qformer = {
        "query_tokens": model.qformer.embeddings.queries,
        "vision_proj.weight": model.vision_proj.weight,
        "Qformer.bert.embeddings.word_embeddings.weight": model.qformer.embeddings.word.weight,
        "Qformer.bert.embeddings.position_embeddings.weight": model.qformer.embeddings.position.weight,
    }
    for i in range(12):
        qformer[f"{LAYER}.{i}.intermediate_query.dense.weight"] = torch.empty(3072, 768, device="meta")
        if i % 2 == 0:
            qformer[f"{LAYER}.{i}.crossattention.x"] = torch.empty(1, device="meta")
    assert original.infer_blip2_config(qformer, vision, None, "x") == Blip2Config(vision=vision)


@pytest.mark.parametrize("kind", [lavis.Eva, lavis.Clip])
@torch.no_grad()
def test_a_fine_tuned_file_holds_its_encoder(tmp_path: Path, parts: Path, kind: Kind) -> None:
    """At another resolution, as blip2_finetune_coco.pth; a captioner goes on from its prompt."""
    theirs = lavis.Released(lavis.Eva(size=48)) if kind is lavis.Eva else lavis.stage1(lavis.Clip)
    randomise(theirs.visual_encoder, seed=8, scale=0.1)
    theirs.visual_encoder.requires_grad_(True)
    path = lavis.write(tmp_path / "coco.pth", theirs)
    checkpoint = load_checkpoint(path)
    size = 48 if kind is lavis.Eva else lavis.SIZE
    pixels = torch.randn(2, 3, size, size)
    close(checkpoint.model.encode_image(pixels), theirs.visual_encoder(pixels))
    assert checkpoint.preprocessing.image_size == checkpoint.model.config.vision.image_size == size
    with pytest.raises(ConfigError, match=r"coco\.pth holds its image encoder: leave vision"):
        load_checkpoint(path, vision=parts / "Eva.pth")

    captioner = lavis.stage2("opt", kind=kind)
    captioner.visual_encoder.requires_grad_(True)
    written = load_checkpoint(lavis.write(tmp_path / "caption.pth", captioner), language_model=parts / "opt")
    assert written.prompt == "a photo of"
    encoder = original.read_encoder(original.read_pth(path))  # from one BLIP-2 to another
    close(encoder.model(pixels), theirs.visual_encoder(pixels))


def test_an_encoder_is_cut_before_its_last_block(tmp_path: Path, parts: Path) -> None:
    whole = lavis.encoder_state(lavis.Eva)
    assert original.read_encoder(original.read_pth(parts / "Eva.pth")).config.num_layers == 2
    cut = {n: t for n, t in whole.items() if not n.startswith(("blocks.2.", "norm.", "head."))}
    torch.save(cut, tmp_path / "cut.pth")
    assert original.read_encoder(original.read_pth(tmp_path / "cut.pth")).config.num_layers == 2  # it was cut already
    forty = {n: t for n, t in cut.items() if not n.startswith("blocks.")}
    forty |= {n.replace("blocks.0.", f"blocks.{i}."): t for n, t in cut.items() if "blocks.0." in n for i in range(40)}
    torch.save(forty, tmp_path / "forty.pth")
    forty = original.read_encoder(original.read_pth(tmp_path / "forty.pth"))
    assert forty.config.num_layers == 39  # the released depth, whole
    torch.save({n: t.half() for n, t in whole.items()}, tmp_path / "half.pth")
    halved = original.read_encoder(original.read_pth(tmp_path / "half.pth")).model.state_dict()
    assert {tensor.dtype for tensor in halved.values()} == {torch.float32}


@torch.no_grad()
def test_an_encoder_of_transformers(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=lavis.CLIP_DIM, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, patch_size=8,
        image_size=lavis.SIZE,
    )  # fmt: skip
    clip = transformers.CLIPVisionModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    path = lavis.write(tmp_path / "x.pth", lavis.stage1(lavis.Clip))
    model = load_checkpoint(path, vision=tmp_path / "clip").model
    hidden = clip(pixel_values=lavis.PIXELS, output_hidden_states=True).hidden_states
    close(model.encode_image(lavis.PIXELS), hidden[-2])


def test_what_is_left_out_must_be_named(tmp_path: Path, parts: Path) -> None:
    path = lavis.write(tmp_path / "x.pth", lavis.stage2("opt"))
    with pytest.raises(CheckpointError) as both:
        load_checkpoint(path)
    for part in ("--vision (176 wide)", "language_model= or --language-model (16 wide)", "vision="):
        assert part in str(both.value)
    with pytest.raises(CheckpointError, match="image encoder") as one:
        load_checkpoint(path, language_model=parts / "opt")
    assert "language model" not in str(one.value)
    stage_1 = lavis.write(tmp_path / "y.pth", lavis.stage1())
    with pytest.raises(CheckpointError, match="Name its image encoder"):
        load_checkpoint(stage_1)
    with pytest.raises(ConfigError, match="stage 1 and has no language model"):
        load_checkpoint(stage_1, vision=parts / "Eva.pth", language_model=parts / "opt")
    with pytest.raises(ConfigError, match=r"whole model: leave .*Eva\.pth out"):
        load_checkpoint("openblip-mini", vision=parts / "Eva.pth")


def test_the_papers_parts_are_named() -> None:
    released = {
        "Qformer.bert.embeddings.LayerNorm.weight": torch.empty(768),
        "ln_vision.weight": torch.empty(1408),
        "t5_proj.weight": torch.empty(4096, 768),
    }
    with pytest.raises(CheckpointError, match=r"eva_vit_g\.pth.*google/flan-t5-xxl"):
        original.frozen_sources(original.PthFile(Path("blip2_pretrained_flant5xxl.pth"), released, None))


@pytest.mark.parametrize(
    ("vision", "language", "message"),
    [
        ("Clip.pth", "opt", "trained with an image encoder 176 wide; .*Clip.pth is 128 wide"),
        ("Eva.pth", "t5", "a language model of the kind opt; .*t5 is a t5"),
        ("Eva.pth", "wide", "trained with a language model 16 wide; .*wide is 32 wide"),
        ("Eva.pth", "other", "does not have: opt_model.lm_head.weight"),
        ("Eva.pth", "absent", "absent"),
        ("absent.pth", "opt", "absent.pth"),
        ("x.pth", "opt", "x.pth holds no image encoder: a frozen one is left out"),
    ],
)
def test_another_part_is_named(tmp_path: Path, parts: Path, vision: str, language: str, message: str) -> None:
    """One that the file was not trained with."""
    path = lavis.write(tmp_path / "x.pth", lavis.stage2("opt"))
    for source in parts.iterdir():
        (tmp_path / source.name).symlink_to(source)
    wide, other = lavis.language_model("opt", width=32), lavis.language_model("opt")
    other.get_input_embeddings().weight.data[3, 3] += 1
    lavis.write_language_model(tmp_path / "wide", wide)
    lavis.write_language_model(tmp_path / "other", other)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, vision=tmp_path / vision, language_model=tmp_path / language)


LAYER = "Qformer.bert.encoder.layer"
SELF = f"{LAYER}.1.attention.self"
WORDS = "Qformer.cls.predictions"
PROJECTIONS = ("opt_proj.weight", "t5_proj.weight")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("itm_head.bias"), "missing itm_head.bias"),
        (lambda s: s.pop("temp"), "missing temp"),
        (lambda s: s.pop("query_tokens"), "missing query_tokens"),
        (lambda s: s.pop(f"{SELF}.key.bias"), f"missing {SELF}.key.bias"),
        (lambda s: s.pop(f"{WORDS}.bias"), f"missing {WORDS}.bias"),
        (lambda s: s.update(extra=torch.zeros(2)), "left over extra"),
        (lambda s: s.update({"opt_model.x": torch.zeros(2)}), "left over opt_model.x"),
        (lambda s: s.update({"itm_head.bias": torch.zeros(3)}), r"itm_head.bias is \(3,\), .* \(2,\)"),
        (lambda s: s.update({f"{SELF}.key.bias": torch.zeros(9)}), rf"in shape: .*{SELF}.key.bias \(9,\)"),
        (lambda s: s.update(query_tokens=torch.zeros(5, 128)), r"query_tokens is \(5, 128\)"),
        (lambda s: s.update(temp=torch.tensor(-1.0)), "temp is -1"),
        (lambda s: s.update({f"{WORDS}.decoder.bias": torch.ones(lavis.VOCAB_SIZE)}), "they are tied"),
        (lambda s: s.update({f"{LAYER}.1.crossattention.x": torch.ones(1)}), "layers 0, 1, 2 of 4"),
        (lambda s: [s.pop(name) for name in list(s) if ".crossatt" in name], f"missing {LAYER}.0.crossattention"),
        (lambda s: s.update(dict.fromkeys(PROJECTIONS, torch.ones(1, 1))), "for opt and for t5"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, parts: Path, damage: Damage, message: str) -> None:
    state = lavis.saved(lavis.stage1())
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(lavis.write(tmp_path / "x.pth", state), vision=parts / "Eva.pth")


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        (lavis.Eva, lambda s: s.pop("blocks.1.attn.q_bias"), "missing blocks.1.attn.q_bias"),
        (lavis.Eva, lambda s: s.update({"blocks.0.attn.v_bias": torch.ones(3)}), "in shape: .*0.attn.v_bias"),
        (lavis.Eva, lambda s: s.pop("patch_embed.proj.bias"), "missing patch_embed.proj.bias"),
        (lavis.Eva, lambda s: s.update(pos_embed=torch.ones(1, 16, lavis.EVA_DIM)), "16 image tokens"),
        (lavis.Eva, lambda s: s.update(rope=torch.ones(1)), "left over rope"),
        (lavis.Eva, lambda s: s.clear() or s.update(a=torch.ones(1)), "missing patch_embed.proj.weight"),
        (lavis.Clip, lambda s: s.pop("ln_pre.bias"), "missing ln_pre.bias"),
        (lavis.Clip, lambda s: s.update(class_embedding=torch.ones(1, lavis.CLIP_DIM)), r"is \(1, 1, 1, 128\)"),
        (lavis.Clip, lambda s: s.update({"conv1.bias": torch.ones(lavis.CLIP_DIM)}), "left over conv1.bias"),
        (lavis.Clip, lambda s: s.update({"conv1.weight": torch.ones(100, 3, 8, 8)}), "heads of 64 do not divide"),
    ],
)  # fmt: skip
def test_a_damaged_encoder_is_named(tmp_path: Path, kind: Kind, damage: Damage, message: str) -> None:
    state = dict(lavis.encoder_state(kind))
    damage(state)
    torch.save(state, tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match=message):
        original.read_encoder(original.read_pth(tmp_path / "encoder.pth"))


def test_hostile_files(tmp_path: Path, parts: Path) -> None:
    """As the file itself and as its encoder: code is not run, and what is torn is named."""
    whole = lavis.write(tmp_path / "x.pth", lavis.stage1())
    torch.save({"model": lavis.saved(lavis.stage1()), "config": Exploit(tmp_path / "ran")}, tmp_path / "evil.pth")
    (tmp_path / "torn.pth").write_bytes(whole.read_bytes()[:-2000])
    for bad in (tmp_path / "evil.pth", tmp_path / "torn.pth"):
        with pytest.raises(CheckpointError, match=rf"{bad.name} cannot be read as weights"):
            load_checkpoint(bad, vision=parts / "Eva.pth")
        with pytest.raises(CheckpointError, match=rf"{bad.name} cannot be read as weights"):
            load_checkpoint(whole, vision=bad)
    assert not (tmp_path / "ran").exists()


def test_words_of_another_model(tmp_path: Path, parts: Path) -> None:
    path = lavis.write(tmp_path / "x.pth", lavis.stage1())
    Tokenizer.train([f"word{a}{b}" for a in "abcdefgh" for b in "abcdefgh"] * 2, 400).save(tmp_path / "large")
    with pytest.raises(CheckpointError, match=f"entries, .* the Q-Former {lavis.VOCAB_SIZE}; .* another model"):
        load_checkpoint(path, tokenizer=tmp_path / "large", vision=parts / "Eva.pth")


# ---- written

TOWER = {"name": "x", "hidden_dim": 24, "layer": -2}
LANGUAGE = {"name": "x", "hidden_dim": 4}


@pytest.mark.parametrize("kind", [lavis.Eva, lavis.Clip])
def test_stage_1_is_written_as_it_was_read(tmp_path: Path, parts: Path, kind: Kind) -> None:
    """Names and bits, tied copies included; with the encoder, unless the model has it frozen."""
    theirs = lavis.stage1(kind)
    path = lavis.write(tmp_path / "x.pth", theirs)
    checkpoint = load_checkpoint(path, vision=parts / f"{kind.__name__}.pth")
    save_checkpoint(checkpoint, tmp_path / "whole.pth", "original")
    written = torch.load(tmp_path / "whole.pth", weights_only=True)["model"]
    expected = theirs.state_dict()
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor, atol=0, rtol=1e-6 if name == "temp" else 0, msg=name)
    theirs.load_state_dict(written)

    checkpoint.model.freeze("vision")
    save_checkpoint(checkpoint, tmp_path / "trained.pth", "original")
    trained = torch.load(tmp_path / "trained.pth", weights_only=True)["model"]
    assert trained.keys() == lavis.saved(theirs).keys()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "instructed"), lavis.STAGE2)
def test_stage_2_is_written_as_it_was_read(tmp_path: Path, parts: Path, name: str, instructed: bool) -> None:
    theirs = lavis.stage2(name, instructed)
    path = lavis.write(tmp_path / "x.pth", theirs)
    checkpoint = load_checkpoint(path, vision=parts / "Eva.pth", language_model=parts / name)
    save_checkpoint(checkpoint, tmp_path / "whole.pth", "original")
    written = torch.load(tmp_path / "whole.pth", weights_only=True)["model"]
    expected = {n: t for n, t in theirs.state_dict().items() if not n.startswith(f"{name}_model.")}
    assert written.keys() == expected.keys()
    for weight, tensor in expected.items():
        if not weight.endswith("position_ids"):  # of a text branch that stage 2 does not have
            assert torch.equal(written[weight], tensor), weight
    load_checkpoint(tmp_path / "whole.pth")  # knows where its language model is


def own(**changes: Any) -> Blip2Checkpoint:
    """One whose shapes do not tell its heads, and whose keys have a bias."""
    vision = VisionConfig(
        image_size=32, patch_size=8, hidden_dim=24, num_layers=2, num_heads=3, mlp_dim=20, output_norm=False,
    )  # fmt: skip
    qformer = QFormerConfig(
        num_queries=3, hidden_dim=20, num_layers=3, num_heads=5, mlp_dim=16, cross_attention_every=1,
        vocab_size=lavis.TOKENIZER.vocab_size, max_positions=20, dropout=0.0,
    )  # fmt: skip
    config = Blip2Config(vision=vision, qformer=qformer, embed_dim=7, vision_norm_eps=1e-6)
    model = Blip2(replace(config, **changes))
    randomise(model, seed=6)
    preprocessing = Preprocessing(image_size=24, mean=(0.1, 0.2, 0.3))
    return Blip2Checkpoint(model.eval(), lavis.TOKENIZER, preprocessing, "a", "q {}")


@pytest.mark.parametrize("frozen", [False, True])
def test_ours_comes_back_whole(tmp_path: Path, frozen: bool) -> None:
    before = own()
    save_checkpoint(before, tmp_path / "whole.pth", "original")
    vision = None
    if frozen:
        before.model.freeze("vision")
        vision = tmp_path / "native"
        save_checkpoint(before, vision, "openblip")
    save_checkpoint(before, tmp_path / "new" / "ours.pth", "original")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ours.pth"]
    after = load_checkpoint(tmp_path / "new" / "ours.pth", vision=vision)
    assert after.model.config == before.model.config
    assert after[2:] == before[2:]
    assert after.tokenizer.to_json() == lavis.TOKENIZER.to_json()
    assert_same_weights(after.model, before.model, rounded=("log_temperature",))


@torch.no_grad()
def test_a_bias_of_keys_changes_nothing_for_the_released_code(tmp_path: Path) -> None:
    """Its encoder has none; so what it reads of our file computes the same without."""
    before = own()
    save_checkpoint(before, tmp_path / "x.pth", "original")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert not any(name.endswith(".k_bias") for name in content["model"])
    edit_pth(tmp_path / "x.pth", lambda content: content["openblip"].pop("weights"))
    after = load_checkpoint(tmp_path / "x.pth")
    qkv = "vision.blocks.0.attention.qkv.bias"
    assert not torch.equal(after.model.state_dict()[qkv], before.model.state_dict()[qkv])
    ours, theirs = before.model.encode_image(lavis.PIXELS), after.model.encode_image(lavis.PIXELS)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda entry: entry.pop("model"), "model"),
        (lambda entry: entry["model"].update(depth=3, vision=3), "its openblip entry"),
        (lambda entry: entry.update(tokenizer="{"), "its openblip entry"),
        (lambda entry: entry.update(weights=[1]), "holds no weights"),
        (lambda entry: entry["weights"].update(more=torch.ones(1)), "left over more"),
        (lambda entry: entry["model"].update(vision=TOWER), "another kind"),
        (lambda entry: entry["model"].update(heads=("llm",), language=LANGUAGE), "another kind"),
    ],
)  # fmt: skip
def test_a_damaged_entry_is_named(tmp_path: Path, damage: Damage, message: str) -> None:
    save_checkpoint(own(), tmp_path / "ours.pth", "original")
    edit_pth(tmp_path / "ours.pth", lambda content: damage(content["openblip"]))
    with pytest.raises(CheckpointError, match=rf"ours\.pth.*{message}"):
        load_checkpoint(tmp_path / "ours.pth")
    edit_pth(tmp_path / "ours.pth", lambda content: content.update(openblip="x"))
    with pytest.raises(CheckpointError, match="openblip entry is damaged"):
        load_checkpoint(tmp_path / "ours.pth")


def test_a_tower_is_left_out_and_found_again(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, patch_size=8,
        image_size=lavis.SIZE, hidden_act="relu",
    )  # fmt: skip
    tower = transformers.CLIPVisionModel(config).eval()
    tower.save_pretrained(tmp_path / "tower")
    transformers.CLIPImageProcessor(size=lavis.SIZE, crop_size=lavis.SIZE).save_pretrained(tmp_path / "tower")
    before = own()
    vision = TowerConfig(name=str(tmp_path / "tower"), hidden_dim=24)
    model = Blip2(replace(before.model.config, vision=vision), VisionTower(tower, -2)).eval()
    save_checkpoint(before._replace(model=model), tmp_path / "x.pth", "original")
    written = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert not any(name.startswith("visual_encoder.") for name in written)
    after = load_checkpoint(tmp_path / "x.pth")
    assert after.model.config == model.config
    assert torch.equal(after.model.encode_image(lavis.PIXELS), model.encode_image(lavis.PIXELS))


def with_language(kind: str, instructed: bool = False) -> Blip2Checkpoint:
    language = wrap_language_model(lavis.language_model(kind), lavis.language_words())
    before = own()
    config = replace(
        before.model.config, heads=("llm",), language=LanguageConfig(name="x", hidden_dim=16), instructed=instructed
    )
    return before._replace(model=Blip2(config, None, language).eval())


@pytest.mark.slow
def test_what_the_released_code_has_no_model_for(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    vision = own().model.config.vision
    adapted = with_language("opt")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2)
    adapted.model.language.model = peft.get_peft_model(adapted.model.language.model, lora)
    for checkpoint, message in (
        (own(heads=("itc", "itm")), "heads itc, itm alone"),
        (own(vision=replace(vision, output_norm=True)), "without a last norm"),
        (own(vision=replace(vision, activation="quick_gelu")), "EVA-CLIP's or CLIP's"),
        (with_language("opt", instructed=True), "that reads instructions with the heads llm and a opt"),
        (adapted, "adapters in its language model"),
    ):
        with pytest.raises(CheckpointError, match=rf"released code has no BLIP-2 .*{message}.*Save as openblip"):
            save_checkpoint(checkpoint, tmp_path / "out.pth", "original")
    with pytest.raises(ConfigError, match=r"end with \.pth"):
        save_checkpoint(own(), tmp_path / "out", "original")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(own(), tmp_path / "x.pth", "original")
    before = (tmp_path / "x.pth").read_bytes()

    def half(content: Any, file: Any) -> None:
        file.write(before[:1000])
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.save", half)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(own(), tmp_path / "x.pth", "original")
    assert (tmp_path / "x.pth").read_bytes() == before


def test_convert_there_and_back(tmp_path: Path, parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From LAVIS' file over our folder and transformers' to a .pth again, bit for bit."""
    theirs = lavis.write(tmp_path / "theirs.pth", lavis.stage2("opt"))
    native, hub, again = tmp_path / "native", tmp_path / "hub", tmp_path / "again.pth"
    options = ["--vision", str(parts / "Eva.pth"), "--language-model", str(parts / "opt")]
    assert main(["convert", str(theirs), str(native), "--format", "openblip"]) == 2
    assert "--vision" in capsys.readouterr().err
    assert main(["convert", str(theirs), str(native), "--format", "openblip", *options]) == 0
    assert main(["convert", str(native), str(hub), "--format", "huggingface"]) == 0
    assert main(["convert", str(hub), str(again), "--format", "original"]) == 0
    first = torch.load(theirs, weights_only=True)["model"]
    last = torch.load(again, weights_only=True)["model"]
    for name, tensor in first.items():
        if not name.startswith("opt_model.") and not name.endswith("position_ids"):
            assert torch.equal(last[name], tensor), name
    encoder = lavis.encoder_of(lavis.encoder_state(lavis.Eva), lavis.Eva).state_dict()
    for name, tensor in encoder.items():
        assert torch.equal(last[f"visual_encoder.{name}"], tensor), name

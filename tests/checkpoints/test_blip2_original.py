"""LAVIS' .pth files of BLIP-2 against `released_blip2.py`: numbers, names, frozen parts, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from released_blip2 import (
    CLIP_DIM,
    EVA_DIM,
    PIXELS,
    QUERIES,
    SIZE,
    STAGE2,
    TEMPERATURE,
    TOKENIZER,
    VOCAB_SIZE,
    Clip,
    Eva,
    Released,
    encoder_state,
    language_model,
    saved,
    stage1,
    stage2,
    write,
    write_language_model,
    write_parts,
)
from torch import Tensor

import openblip
from damaged_files import Exploit
from marks import slow
from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.checkpoints.loading import load_checkpoint, save_checkpoint
from openblip.checkpoints.original import (
    EVA_CLIP,
    OPENAI_CLIP,
    PthFile,
    frozen_sources,
    infer_blip2_config,
    infer_vit,
    read_encoder,
    read_pth,
)
from openblip.data.config import Preprocessing
from openblip.errors import CheckpointError, ConfigError
from openblip.models.blip2 import Blip2
from openblip.models.config import Blip2Config, LanguageConfig, QFormerConfig, VisionConfig
from tiny_blip import randomise

State = dict[str, Tensor]
Kind = type[Eva] | type[Clip]
IDS = torch.tensor([[2, 9, 8, 7, 3], [2, 30, 31, 32, 3]])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("kind", [Eva, Clip])
@torch.no_grad()
def test_stage_1_computes_what_the_released_code_does(tmp_path: Path, parts: Path, kind: Kind) -> None:
    theirs = stage1(kind)
    state = saved(theirs)
    assert not any(name.startswith("visual_encoder.") for name in state)  # as blip2_pretrained.pth
    checkpoint = load_checkpoint(write(tmp_path / "x.pth", state), vision=parts / f"{kind.__name__}.pth")
    assert isinstance(checkpoint, Blip2Checkpoint)
    ours = checkpoint.model
    features = ours.encode_image(PIXELS)
    close(features, theirs.visual_encoder(PIXELS))
    kv = ours.image_kv(features)
    queries = ours.encode_queries(kv).queries
    close(queries, theirs.read(PIXELS))
    close(ours.embed_image(queries), torch.nn.functional.normalize(theirs.vision_proj(queries), dim=-1))
    everywhere = torch.ones_like(IDS, dtype=torch.bool)
    close(ours.embed_text(IDS, everywhere), theirs.embed_text(IDS))
    matched = theirs.itm_head(theirs.read(PIXELS, IDS)[:, :QUERIES]).mean(dim=1)
    close(ours.match_logits(IDS, everywhere, kv), matched)
    words = theirs.Qformer["cls"]["predictions"](theirs.read(PIXELS, IDS, causal=True)[:, QUERIES:])
    close(ours.decode(IDS, kv), words)
    assert ours.temperature.item() == pytest.approx(TEMPERATURE, rel=1e-6)
    assert (checkpoint.prompt, checkpoint.preprocessing) == ("", Preprocessing(image_size=SIZE))
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.to_json() == TOKENIZER.to_json()
    assert not ours.training


@pytest.mark.parametrize(("name", "instructed"), STAGE2)
@pytest.mark.parametrize("kind", [Eva, *slow(Clip)])
@torch.no_grad()
def test_stage_2_computes_what_the_released_code_does(
    tmp_path: Path, parts: Path, name: str, instructed: bool, kind: Kind
) -> None:
    theirs = stage2(name, instructed, kind)
    state = saved(theirs)
    slipped_through = {n for n in state if n.startswith(f"{name}_model.")}
    assert len(slipped_through) == {"opt": 1, "t5": 3, "llm": 0}[name]  # lm_head; embed_tokens twice, lm_head
    path = write(tmp_path / "x.pth", state)
    encoder, language = parts / f"{kind.__name__}.pth", parts / name
    checkpoint = load_checkpoint(path, vision=encoder, language_model=language)
    assert isinstance(checkpoint, Blip2Checkpoint)
    ours = checkpoint.model
    kv = ours.image_kv(ours.encode_image(PIXELS))
    if instructed:
        queries = ours.encode_multimodal(IDS, torch.ones_like(IDS, dtype=torch.bool), kv)
        close(ours.visual_prompts(queries), theirs.visual_prompts(PIXELS, IDS))
    else:
        close(ours.visual_prompts(ours.encode_queries(kv).queries), theirs.visual_prompts(PIXELS))
    assert ours.config.heads == ("llm",)
    assert ours.config.instructed == instructed
    assert (checkpoint.tokenizer is None) != instructed
    end = "\n" if name == "opt" else None
    assert ours.config.language == LanguageConfig(name=str(language), hidden_dim=16, end_of_text=end)
    assert checkpoint.question_prompt == f"Question: {{}} {'Answer' if name == 'opt' else 'Short answer'}:"
    assert checkpoint.prompt == ""


def test_openblip_load_takes_the_parts(tmp_path: Path, parts: Path) -> None:
    path = write(tmp_path / "x.pth", saved(stage2("opt")))
    model = openblip.load(path, "cpu", vision=parts / "Eva.pth", language_model=parts / "opt")
    assert isinstance(model, openblip.Blip2Predictor)


def test_t5_computes_with_the_activation_that_lavis_gives_it(tmp_path: Path, parts: Path) -> None:
    path = write(tmp_path / "x.pth", saved(stage2("t5")))
    checkpoint = load_checkpoint(path, vision=parts / "Eva.pth", language_model=parts / "t5")
    save_checkpoint(checkpoint, tmp_path / "native", "openblip")
    for after in (checkpoint, load_checkpoint(tmp_path / "native")):
        feed_forward = after.model.language.model.encoder.block[0].layer[1].DenseReluDense
        x = torch.linspace(-3, 3, 50)
        assert torch.equal(feed_forward.act(x), torch.nn.functional.gelu(x))


def test_what_the_shapes_tell(tmp_path: Path, parts: Path) -> None:
    path = write(tmp_path / "x.pth", saved(stage1(Clip)))
    config = load_checkpoint(path, vision=parts / "Clip.pth").model.config
    assert config.vision == VisionConfig(
        image_size=SIZE, patch_size=8, hidden_dim=CLIP_DIM, num_layers=2, num_heads=2, mlp_dim=4 * CLIP_DIM,
        layer_norm_eps=1e-5, activation="quick_gelu", input_norm=True, output_norm=False,
    )  # fmt: skip
    assert config.qformer == QFormerConfig(
        num_queries=QUERIES, hidden_dim=128, num_layers=4, num_heads=2, mlp_dim=90, vocab_size=VOCAB_SIZE,
        max_positions=30,
    )  # fmt: skip
    assert config == Blip2Config(vision=config.vision, qformer=config.qformer, embed_dim=10)
    assert config.vision_norm_eps == 1e-5


CLIP_L = VisionConfig(
    patch_size=14, hidden_dim=1024, num_layers=23, num_heads=16, mlp_dim=4096, layer_norm_eps=1e-5,
    activation="quick_gelu", input_norm=True, output_norm=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("width", "layout", "vision"), [(1408, EVA_CLIP, Blip2Config().vision), (1024, OPENAI_CLIP, CLIP_L)]
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
    assert infer_vit(theirs, layout.table, "", "x", layout.settings, layout.head_width) == vision
    qformer = {
        "query_tokens": model.qformer.embeddings.queries,
        "vision_proj.weight": model.vision_proj.weight,
        "Qformer.bert.embeddings.word_embeddings.weight": model.qformer.embeddings.word.weight,
        "Qformer.bert.embeddings.position_embeddings.weight": model.qformer.embeddings.position.weight,
    }
    for i in range(12):
        qformer[f"Qformer.bert.encoder.layer.{i}.intermediate_query.dense.weight"] = torch.empty(
            3072, 768, device="meta"
        )
        if i % 2 == 0:
            qformer[f"Qformer.bert.encoder.layer.{i}.crossattention.x"] = torch.empty(1, device="meta")
    assert infer_blip2_config(qformer, vision, None, "x") == Blip2Config(vision=vision)


@pytest.mark.parametrize("kind", [Eva, Clip])
@torch.no_grad()
def test_a_fine_tuned_file_holds_its_encoder(tmp_path: Path, parts: Path, kind: Kind) -> None:
    """At another resolution, as blip2_finetune_coco.pth; a captioner goes on from its prompt."""
    theirs = Released(Eva(size=48)) if kind is Eva else stage1(Clip)
    randomise(theirs.visual_encoder, seed=8, scale=0.1)
    theirs.visual_encoder.requires_grad_(True)
    path = write(tmp_path / "coco.pth", saved(theirs))
    checkpoint = load_checkpoint(path)
    size = 48 if kind is Eva else SIZE
    pixels = torch.randn(2, 3, size, size)
    close(checkpoint.model.encode_image(pixels), theirs.visual_encoder(pixels))
    assert checkpoint.preprocessing.image_size == checkpoint.model.config.vision.image_size == size
    with pytest.raises(ConfigError, match=r"coco\.pth holds its image encoder: leave vision"):
        load_checkpoint(path, vision=parts / "Eva.pth")

    captioner = stage2("opt", kind=kind)
    captioner.visual_encoder.requires_grad_(True)
    written = load_checkpoint(write(tmp_path / "caption.pth", saved(captioner)), language_model=parts / "opt")
    assert written.prompt == "a photo of"
    encoder = read_encoder(read_pth(path))  # from one BLIP-2 to another
    close(encoder.model(pixels), theirs.visual_encoder(pixels))


def test_an_encoder_is_cut_before_its_last_block(tmp_path: Path, parts: Path) -> None:
    whole = encoder_state(Eva)
    assert read_encoder(read_pth(parts / "Eva.pth")).config.num_layers == 2
    cut = {n: t for n, t in whole.items() if not n.startswith(("blocks.2.", "norm.", "head."))}
    torch.save(cut, tmp_path / "cut.pth")
    assert read_encoder(read_pth(tmp_path / "cut.pth")).config.num_layers == 2  # it was cut already
    forty = {n: t for n, t in cut.items() if not n.startswith("blocks.")}
    forty |= {n.replace("blocks.0.", f"blocks.{i}."): t for n, t in cut.items() if "blocks.0." in n for i in range(40)}
    torch.save(forty, tmp_path / "forty.pth")
    assert read_encoder(read_pth(tmp_path / "forty.pth")).config.num_layers == 39  # the released depth, whole
    torch.save({n: t.half() for n, t in whole.items()}, tmp_path / "half.pth")
    halved = read_encoder(read_pth(tmp_path / "half.pth")).model.state_dict()
    assert {tensor.dtype for tensor in halved.values()} == {torch.float32}


@torch.no_grad()
def test_an_encoder_of_transformers(tmp_path: Path) -> None:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=CLIP_DIM, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, patch_size=8,
        image_size=SIZE,
    )  # fmt: skip
    clip = transformers.CLIPVisionModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    path = write(tmp_path / "x.pth", saved(stage1(Clip)))
    model = load_checkpoint(path, vision=tmp_path / "clip").model
    hidden = clip(pixel_values=PIXELS, output_hidden_states=True).hidden_states
    close(model.encode_image(PIXELS), hidden[-2])


def test_what_is_left_out_must_be_named(tmp_path: Path, parts: Path) -> None:
    path = write(tmp_path / "x.pth", saved(stage2("opt")))
    with pytest.raises(CheckpointError) as both:
        load_checkpoint(path)
    for part in ("--vision (176 wide)", "language_model= or --language-model (16 wide)", "vision="):
        assert part in str(both.value)
    with pytest.raises(CheckpointError, match="image encoder") as one:
        load_checkpoint(path, language_model=parts / "opt")
    assert "language model" not in str(one.value)
    stage_1 = write(tmp_path / "y.pth", saved(stage1()))
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
        frozen_sources(PthFile(Path("blip2_pretrained_flant5xxl.pth"), released, None))


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
def test_another_part_than_it_was_trained_with(
    tmp_path: Path, parts: Path, vision: str, language: str, message: str
) -> None:
    path = write(tmp_path / "x.pth", saved(stage2("opt")))
    for source in parts.iterdir():
        (tmp_path / source.name).symlink_to(source)
    wide, other = language_model("opt", width=32), language_model("opt")
    other.get_input_embeddings().weight.data[3, 3] += 1
    write_language_model(tmp_path / "wide", wide)
    write_language_model(tmp_path / "other", other)
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
        (lambda s: s.update({f"{WORDS}.decoder.bias": torch.ones(VOCAB_SIZE)}), "they are tied"),
        (lambda s: s.update({f"{LAYER}.1.crossattention.x": torch.ones(1)}), "layers 0, 1, 2 of 4"),
        (
            lambda s: [s.pop(name) for name in list(s) if ".crossattention." in name],
            f"missing {LAYER}.0.crossattention",
        ),
        (lambda s: s.update(dict.fromkeys(PROJECTIONS, torch.ones(1, 1))), "for opt and for t5"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, parts: Path, damage: Callable[[State], object], message: str) -> None:
    state = saved(stage1())
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write(tmp_path / "x.pth", state), vision=parts / "Eva.pth")


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        (Eva, lambda s: s.pop("blocks.1.attn.q_bias"), "missing blocks.1.attn.q_bias"),
        (Eva, lambda s: s.update({"blocks.0.attn.v_bias": torch.ones(3)}), "in shape: .*0.attn.v_bias"),
        (Eva, lambda s: s.pop("patch_embed.proj.bias"), "missing patch_embed.proj.bias"),
        (Eva, lambda s: s.update(pos_embed=torch.ones(1, 16, EVA_DIM)), "16 image tokens"),
        (Eva, lambda s: s.update(rope=torch.ones(1)), "left over rope"),
        (Eva, lambda s: s.clear() or s.update(a=torch.ones(1)), "missing patch_embed.proj.weight"),
        (Clip, lambda s: s.pop("ln_pre.bias"), "missing ln_pre.bias"),
        (Clip, lambda s: s.update(class_embedding=torch.ones(1, CLIP_DIM)), r"is \(1, 1, 1, 128\)"),
        (Clip, lambda s: s.update({"conv1.bias": torch.ones(CLIP_DIM)}), "left over conv1.bias"),
        (Clip, lambda s: s.update({"conv1.weight": torch.ones(100, 3, 8, 8)}), "heads of 64 do not divide"),
    ],
)  # fmt: skip
def test_a_damaged_encoder_is_named(
    tmp_path: Path, kind: Kind, damage: Callable[[State], object], message: str
) -> None:
    state = dict(encoder_state(kind))
    damage(state)
    torch.save(state, tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match=message):
        read_encoder(read_pth(tmp_path / "encoder.pth"))


def test_hostile_files(tmp_path: Path, parts: Path) -> None:
    """As the file itself and as its encoder: code is not run, and what is torn is named."""
    whole = write(tmp_path / "x.pth", saved(stage1()))
    torch.save({"model": saved(stage1()), "config": Exploit(tmp_path / "ran")}, tmp_path / "evil.pth")
    (tmp_path / "torn.pth").write_bytes(whole.read_bytes()[:-2000])
    for bad in (tmp_path / "evil.pth", tmp_path / "torn.pth"):
        with pytest.raises(CheckpointError, match=rf"{bad.name} cannot be read as weights"):
            load_checkpoint(bad, vision=parts / "Eva.pth")
        with pytest.raises(CheckpointError, match=rf"{bad.name} cannot be read as weights"):
            load_checkpoint(whole, vision=bad)
    assert not (tmp_path / "ran").exists()


def test_words_of_another_model(tmp_path: Path, parts: Path) -> None:
    from openblip.data.tokenizer import Tokenizer

    path = write(tmp_path / "x.pth", saved(stage1()))
    Tokenizer.train([f"word{a}{b}" for a in "abcdefgh" for b in "abcdefgh"] * 2, 400).save(tmp_path / "large")
    with pytest.raises(CheckpointError, match=f"entries, .* the Q-Former {VOCAB_SIZE}; it belongs to another model"):
        load_checkpoint(path, tokenizer=tmp_path / "large", vision=parts / "Eva.pth")

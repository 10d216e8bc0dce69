"""What a run of BLIP-2 starts from: whose weights, at which size and precision, and what stays as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from openblip.checkpoints.checkpoint import Blip2Checkpoint, load_native, save_native
from openblip.data.config import DataConfig
from openblip.data.sources import Mixture
from openblip.errors import ConfigError
from openblip.models.blip2 import Blip2
from openblip.recipes.blip2 import blip2_caption, blip2_retrieval, blip2_stage2_opt, blip2_vqa
from openblip.recipes.run import Blip2Run, LanguageModelSource
from openblip.tasks.config import Blip2Stage1Config
from openblip.tasks.contrastive import Blip2Stage1
from tiny_blip import SIZE
from tiny_blip2 import tiny_blip2, weights_of

NO_DATA = Mixture((), ())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of both stages, whose Q-Formers differ, and of stage 2 around a Hugging Face encoder."""
    root = tmp_path_factory.mktemp("starts")
    stage1 = tiny_blip2()
    with torch.no_grad():
        for parameter in stage1.model.qformer.parameters():
            parameter += 0.1
    save_native(root / "stage1", stage1)
    save_native(root / "stage2", tiny_blip2((), "opt"))
    save_native(root / "tower", tiny_blip2((), "opt", tower=True))
    return root


def small(run: Blip2Run, **changes: Any) -> Blip2Run:
    changes = {"frozen_dtype": None, "image_size": None, **changes}
    return replace(run, data=replace(run.data, max_text_length=20), **changes)


def load(folders: Path, name: str) -> Blip2Checkpoint:
    return load_native(folders / name)


def begin(run: Blip2Run) -> Blip2Checkpoint:
    return run.initialize(NO_DATA)


def test_a_reader_of_questions_has_its_text_side_from_stage_1(folders: Path) -> None:
    run = small(blip2_vqa(), init=str(folders / "stage2"), text_branch=str(folders / "stage1"))
    found = begin(run)
    assert found.tokenizer is not None
    assert found.model.config.instructed
    stage1, stage2 = weights_of(load(folders, "stage1")), weights_of(load(folders, "stage2"))
    for name, weight in found.model.state_dict().items():
        of_stage1 = any(part in name for part in ("text_feed_forward", "embeddings.word", "qformer.embeddings.pos"))
        of_stage1 = of_stage1 and name.startswith("qformer.")
        assert torch.equal(weight, (stage1 if of_stage1 else stage2)[name]), name


def test_what_cannot_start_says_what_to_do(folders: Path) -> None:
    stage1, stage2 = str(folders / "stage1"), str(folders / "stage2")
    for run, message in (
        (small(blip2_vqa(), init=stage2), "stage2 has dropped .* --text-branch, or add --task.no-instructed"),
        (small(blip2_vqa(), init=stage2, text_branch=stage2), "stage2 reads no text: name one of stage 1"),
        (small(blip2_retrieval(), init=stage2), "reads no text, and blip2-retrieval trains it on texts"),
        (small(blip2_caption(), init=stage1), "needs a language model: name it with --language.source"),
        (small(blip2_caption(), init="openblip-mini"), "is no checkpoint of BLIP-2"),
    ):
        with pytest.raises(ConfigError, match=message):
            begin(run)


def test_stage_2_needs_no_text_and_its_projection_is_new(folders: Path) -> None:
    language = LanguageModelSource(source=str(folders / "stage2" / "language_model"), end_of_text="a")
    run = small(blip2_stage2_opt(), init=str(folders / "stage1"), language=language)
    found = begin(run)
    assert found.tokenizer is None
    stage1 = weights_of(load(folders, "stage1"))
    for name, weight in found.model.state_dict().items():
        if name.startswith(("qformer.", "vision", "vision_norm")):
            assert torch.equal(weight, stage1[name]), name
    assert not any(p.requires_grad for p in frozen_weights(found.model))
    assert found.model.require_language().end_id != found.model.require_language().tokenizer.eos_token_id


def frozen_weights(model: Blip2) -> list[torch.nn.Parameter]:
    assert model.language is not None
    return [*model.vision.parameters(), *model.language.parameters()]


def test_a_trained_encoder_is_float32_at_its_new_size(folders: Path) -> None:
    run = small(blip2_caption(), init=str(folders / "stage2"), image_size=2 * SIZE, frozen_dtype="bfloat16")
    found = begin(run)
    assert found.preprocessing.image_size == found.model.config.vision.image_size == 2 * SIZE  # type: ignore[union-attr]
    assert {p.dtype for p in found.model.vision.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in found.model.vision.parameters())
    assert next(found.model.require_language().parameters()).dtype == torch.bfloat16
    assert found.model.encode_image(torch.randn(1, 3, 2 * SIZE, 2 * SIZE)).shape[1] == (2 * SIZE // 8) ** 2 + 1
    frozen = begin(replace(run, train_vision=False, frozen_dtype="float16"))
    assert {p.dtype for p in frozen.model.vision.parameters()} == {torch.float16}
    assert {p.dtype for p in frozen.model.qformer.parameters()} == {torch.float32}


def test_of_a_hugging_face_encoder_only_what_is_read_is_trained(folders: Path) -> None:
    found = begin(small(blip2_caption(), init=str(folders / "tower")))
    names = {name for name, p in found.model.vision.named_parameters() if p.requires_grad}
    assert any(".layers.0." in name for name in names)
    assert not any(".layers.1." in name or "post_layernorm" in name for name in names)
    assert any("embeddings" in name for name in names)


def test_the_trained_model_keeps_its_prompts_and_budget(folders: Path) -> None:
    run = small(blip2_caption(), init=str(folders / "stage2"), max_text_tokens=50)
    found = begin(run)
    assert found.model.config.language is not None
    assert found.model.config.language.max_text_tokens == 50
    run = replace(run, task=replace(run.task, prompt="this is"))
    run.save(begin(run), folders / "written")
    assert load(folders, "written").prompt == "this is"


def test_texts_that_are_longer_than_the_qformers_positions(folders: Path) -> None:
    checkpoint = load(folders, "stage1")
    data = DataConfig(max_text_length=41)
    with pytest.raises(ConfigError, match="up to 41 tokens: the Q-Former has 40 positions"):
        Blip2Stage1.build(Blip2Stage1Config(), data, checkpoint.model, checkpoint.tokenizer, checkpoint.preprocessing)

"""The losses of BLIP-2's trainings, against what the model says of one image and one text at a time."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from tiny_tasks import make_blip2, prompted, texts
from torch import Tensor

from openblip.models.blip2 import Blip2
from openblip.objectives import lm_loss
from openblip.tasks.base import Blip2Task
from openblip.tasks.config import Blip2Stage1Config
from openblip.tasks.contrastive import Blip2Stage1
from openblip.tasks.language_model import PromptedBatch, split_at_random, split_texts
from tiny_blip import gradients, random_batch


def run(task: Blip2Task, batch: object, seed: int = 0) -> dict[str, Tensor]:
    losses: dict[str, Tensor] = task(batch, 0, torch.Generator().manual_seed(seed))
    return losses


def visual_of(task: Blip2Task, pixels: Tensor) -> Tensor:
    """The visual prompts (1, Q, Dl) of one image, uninstructed."""
    features = task.model.encode_image(task.preprocessing.normalize(pixels[None]))
    return task.model.visual_prompts(task.model.encode_queries(task.model.image_kv(features)).queries)


def decoder_losses(model: Blip2, visual: Tensor, prompt: str, text: str) -> list[Tensor]:
    """-log P of every token of a text and its end, by OPT, which reads ids one after the other."""
    language = model.require_language()
    opt, tokenizer = language.model, language.tokenizer
    before = tokenizer(prompt).input_ids
    ids = [*tokenizer(f"{prompt} {text}".strip()).input_ids, language.end_id]
    words = opt.get_input_embeddings()(torch.tensor([ids]))
    logits = opt(inputs_embeds=torch.cat([visual, words], dim=1)).logits[0]
    first = visual.shape[1]
    return [-logits[first + place - 1].log_softmax(0)[ids[place]] for place in range(len(before), len(ids))]


def test_a_decoder_writes_the_whole_text_after_the_prompt() -> None:
    task, _ = make_blip2("stage2-opt")
    batch = texts([3, 7, 5], prompt="a photo of")
    expected = [
        loss
        for pixels, text in zip(batch.pixels, batch.texts, strict=True)
        for loss in decoder_losses(task.model, visual_of(task, pixels), "a photo of", text)
    ]
    torch.testing.assert_close(run(task, batch)["lm"], torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


def test_without_a_prompt_every_word_is_predicted() -> None:
    """The full text loss; what OPT begins every text with, </s>, is read and not predicted."""
    task, _ = make_blip2("stage2-opt")
    batch = texts([4])
    language = task.model.require_language()
    ids = [*language.tokenizer(batch.texts[0]).input_ids, language.end_id]
    visual = visual_of(task, batch.pixels[0])
    words = language.model.get_input_embeddings()(torch.tensor([ids]))
    logits = language.model(inputs_embeds=torch.cat([visual, words], dim=1)).logits[0, visual.shape[1] - 1 :]
    start = len(language.first_ids)
    expected = F.cross_entropy(logits[start : len(ids)], torch.tensor(ids[start:]))
    torch.testing.assert_close(run(task, batch)["lm"], expected, atol=1e-5, rtol=1e-5)


def test_sequences_have_one_pair_or_several_and_are_learned_whole() -> None:
    """Every number of pairs is drawn; the loss is the mean over the texts of all sequences."""
    task, _ = make_blip2("stage2-opt")
    task.config = replace(task.config, images_per_sequence=3)
    batch = texts([3, 5, 2, 4, 1])
    of_count = {count: float(lm_loss(*task.predict(batch, count))) for count in (1, 2, 3)}
    assert len(set(of_count.values())) == 3
    drawn = [float(task(batch, 0, torch.Generator().manual_seed(seed))["lm"]) for seed in range(20)]
    assert {round(loss, 5) for loss in drawn} == {round(loss, 5) for loss in of_count.values()}


def test_an_encoder_reads_the_prefix_and_the_decoder_writes_the_rest() -> None:
    task, _ = make_blip2("stage2-t5")
    batch = texts([6, 1, 9])
    prefixes, rests = split_texts(batch.texts, split_at_random, 1, torch.Generator().manual_seed(3))
    assert prefixes[1] == ""
    language = task.model.require_language()
    t5, tokenizer = language.model, language.tokenizer
    expected = []
    for pixels, prefix, rest in zip(batch.pixels, prefixes, rests, strict=True):
        words = t5.get_input_embeddings()(torch.tensor([tokenizer(prefix).input_ids]))
        inputs = torch.cat([visual_of(task, pixels), words], dim=1)
        target = torch.tensor([tokenizer(rest).input_ids])  # ends with </s>
        logits = t5(inputs_embeds=inputs, labels=target).logits[0]
        expected += list(F.cross_entropy(logits, target[0], reduction="none"))
    torch.testing.assert_close(run(task, batch, seed=3)["lm"], torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


def test_with_a_prompt_an_encoder_decoder_writes_the_whole_text() -> None:
    task, _ = make_blip2("stage2-t5")
    batch = texts([6], prompt="a photo of")
    language = task.model.require_language()
    words = language.model.get_input_embeddings()(torch.tensor([language.tokenizer("a photo of").input_ids]))
    target = torch.tensor([language.tokenizer(batch.texts[0]).input_ids])
    inputs = torch.cat([visual_of(task, batch.pixels[0]), words], dim=1)
    expected = language.model(inputs_embeds=inputs, labels=target).loss
    torch.testing.assert_close(run(task, batch)["lm"], expected, atol=1e-5, rtol=1e-5)


def instructed_visual(task: Blip2Task, batch: PromptedBatch, row: int) -> Tensor:
    """The visual prompts of one row, whose instruction is read without padding."""
    assert batch.instructions is not None
    length = int(batch.instructions.mask[row].sum())
    ids = batch.instructions.ids[row : row + 1, :length]
    pixels = batch.pixels[batch.owners[row]][None]
    image_kv = task.model.image_kv(task.model.encode_image(task.preprocessing.normalize(pixels)))
    return task.model.visual_prompts(task.model.encode_multimodal(ids, torch.ones_like(ids).bool(), image_kv))


def row_losses(task: Blip2Task, batch: PromptedBatch) -> list[list[Tensor]]:
    found = []
    for row, (prompt, text) in enumerate(zip(batch.prompts, batch.texts, strict=True)):
        pixels, instructed = batch.pixels[batch.owners[row]], batch.instructions is not None
        visual = instructed_visual(task, batch, row) if instructed else visual_of(task, pixels)
        found.append(decoder_losses(task.model, visual, prompt, text))
    return found


def test_an_answer_counts_by_its_weight_and_a_question_once() -> None:
    for name, instructed in (("vqa", True), ("vqa-uninstructed", False)):
        task, _ = make_blip2(name)
        batch = prompted([[1, 3], [2], [4, 1, 2]], instructed=instructed)
        rows = row_losses(task, batch)
        weighted = [w * torch.stack(row).sum() for w, row in zip(batch.weights, rows, strict=True)]
        expected = torch.stack(weighted).sum() / 3
        torch.testing.assert_close(run(task, batch)["vqa"], expected, atol=1e-4, rtol=1e-5)


def test_every_token_of_a_conversation_counts_alike() -> None:
    task, _ = make_blip2("instruct")
    batch = prompted([[1, 3], [2]], seed=1)
    expected = torch.stack([loss for row in row_losses(task, batch) for loss in row]).mean()
    torch.testing.assert_close(run(task, batch)["lm"], expected, atol=1e-5, rtol=1e-5)


def test_the_instruction_matters_and_every_trained_weight_learns() -> None:
    task, _ = make_blip2("vqa")
    batch = prompted([[2], [3]])
    loss = run(task, batch)["vqa"]
    loss.backward()
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert any("text_feed_forward" in name for name in trained)
    assert {name for name, grad in gradients(task).items() if grad is not None} == trained
    other = prompted([[2], [3]], seed=5).instructions
    changed = run(task, replace(batch, instructions=other))["vqa"]
    assert abs(float((changed - loss).detach())) > 1e-3


def test_stage_1_trains_the_objectives_of_its_settings() -> None:
    """Those of the rows of the paper's Table 6, each with the loss that it has among all three."""
    task, checkpoint = make_blip2("stage1")
    batch = random_batch([4, 5, 6], [1, 2, 3])
    whole = run(task, batch)
    assert list(whole) == ["itc", "itm", "itg"]
    for itm, itg in ((False, False), (True, False), (False, True)):
        config = Blip2Stage1Config(itm=itm, itg=itg)
        part = Blip2Stage1(config, checkpoint.model, checkpoint.tokenizer, checkpoint.preprocessing)
        losses = run(part, batch)
        assert tuple(losses) == Blip2Stage1.heads(config) == ("itc", *["itm"] * itm, *["itg"] * itg)
        torch.testing.assert_close(losses, {name: whole[name] for name in losses})


def test_frozen_parts_have_no_gradients_and_are_named() -> None:
    for name in ("stage1", "stage2-opt", "vqa"):
        task, _ = make_blip2(name)
        frozen = ("model.vision.", "model.language.")
        assert not any(p.requires_grad for n, p in task.named_parameters() if n.startswith(frozen))
        assert len(task.frozen_parts()) == (1 if name == "stage1" else 2)


def test_a_trained_encoder_has_depths() -> None:
    task, _ = make_blip2("stage1", train_vision=True)
    depths = task.layers_above()
    parameters = dict(task.named_parameters())
    assert depths.keys() <= parameters.keys()
    found = {depths.get(name, 0) for name in parameters if name.startswith("model.vision.")}
    assert found == {0, 1, 2, 3}  # the norm, two blocks, what is before them
    assert depths["model.vision.blocks.1.mlp.0.weight"] == 1
    assert depths["model.vision.blocks.0.mlp.0.weight"] == 2
    assert depths["model.vision.position_embedding"] == 3
    assert len(task.frozen_parts()) == 0
    losses = run(task, random_batch([4, 5, 6], [1, 2, 3]))
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(grad is not None for name, grad in gradients(task).items() if name.startswith("model.vision."))

"""BLIP's tasks: their losses against one example at a time, gradients included, and odd batches.

B batch, G joint batch.
"""

import itertools
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from tiny_tasks import SMOOTHING, TOKENIZER, dialogs, make_task, questions, statements, train_step, videos
from torch import Tensor, nn

from marks import slow
from openblip.data.batch import Batch, ImageTextBatch
from openblip.data.config import DataConfig, Preprocessing
from openblip.data.tokenizer import Tokens
from openblip.errors import ConfigError, refuse_unused
from openblip.models.blip import Blip
from openblip.nn.config import Sharing
from openblip.objectives import draw_negatives, itc_loss, lm_loss, negative_weights
from openblip.tasks.base import Task
from openblip.tasks.captioning import Captioning
from openblip.tasks.catalog import TASKS
from openblip.tasks.config import Blip2Stage1Config, Blip2Stage2Config, CaptioningConfig, PretrainingConfig
from openblip.tasks.contrastive import Blip2Stage1, interleave, replace_first
from openblip.tasks.language_model import Blip2Stage2
from openblip.tasks.nlvr import StatementBatch
from openblip.tasks.question_answering import QuestionBatch
from openblip.tasks.visdial import DialogBatch
from tiny_blip import DEC, SIZE, TINY, gradients, random_batch
from tiny_blip2 import tiny_blip2


def tokens_of(model: Blip, pixels: Tensor) -> Tensor:
    """Image tokens (B, N, D); those of a video's frames one after the other."""
    if pixels.dim() == 4:
        return model.encode_image(pixels)
    return torch.cat([model.encode_image(pixels[:, frame]) for frame in range(pixels.shape[1])], dim=1)


def embedded(model: Blip, pixels: Tensor) -> Tensor:
    """Unit vectors (B, E); of a video, from the mean of its frames."""
    frames = pixels.unsqueeze(1) if pixels.dim() == 4 else pixels
    projected = [model.vision_proj(model.encode_image(frame)[:, 0]) for frame in frames.unbind(1)]
    return F.normalize(torch.stack(projected).mean(dim=0), dim=-1)


def itm_by_pairs(task: nn.Module, batch: ImageTextBatch, drawn: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over own pairs, each image with its negative text and each text with its negative image."""
    model = task.model
    pixels = task.preprocessing.normalize(batch.pixels)

    def loss(image: int, text: int, label: int) -> Tensor:
        ids = batch.tokens.ids[text : text + 1, : int(batch.tokens.mask[text].sum())].clone()
        ids[0, 0] = TOKENIZER.enc_id
        kv = model.image_kv(tokens_of(model, pixels[image : image + 1]), "encode")
        return -model.match_logits(ids, torch.ones_like(ids, dtype=torch.bool), kv).log_softmax(1)[0, label]

    (text_index, has_text), (image_index, has_image) = drawn
    losses = [loss(b, b, 1) for b in range(len(batch))]
    losses += [loss(b, int(text_index[b]), 0) for b in range(len(batch)) if has_text[b]]
    losses += [loss(int(image_index[b]), b, 0) for b in range(len(batch)) if has_image[b]]
    return torch.stack(losses).mean()


def lm_by_captions(task: nn.Module, batch: ImageTextBatch, prompt: list[int], smoothing: float) -> Tensor:
    """Mean over the tokens that follow the prompt, one caption at a time and without padding."""
    model, total, count = task.model, torch.zeros(()), 0
    for b in range(len(batch)):
        words = batch.tokens.ids[b, 1 : int(batch.tokens.mask[b].sum())].tolist()
        pixels = task.preprocessing.normalize(batch.pixels[b : b + 1])
        kv = model.image_kv(tokens_of(model, pixels), "decode")
        logits = model.decode(torch.tensor([prompt + words]), kv)[:, len(prompt) - 1 : -1]
        total = total + len(words) * lm_loss(logits, torch.tensor([words]), smoothing)
        count += len(words)
    return total / count


def itc_by_definition(task: nn.Module, batch: ImageTextBatch, queued: tuple[Tensor, ...], alpha: float) -> Tensor:
    """The loss of test_contrastive.py, fed with what the model and the momentum model make of each sample."""
    pixels = task.preprocessing.normalize(batch.pixels)

    def embed(model: Blip) -> tuple[Tensor, Tensor]:
        tokens = batch.tokens
        return embedded(model, pixels), model.embed_text(tokens.ids, tokens.mask)

    image, text = embed(task.model)
    with torch.no_grad():
        momentum = embed(task.momentum_model)
    keys = [torch.cat(pair) for pair in zip((*momentum, batch.image_ids), queued, strict=True)]
    return itc_loss(image, text, *momentum, batch.image_ids, keys, task.model.temperature, alpha)


def drawn_negatives(task: nn.Module, batch: ImageTextBatch, step: int) -> list[tuple[Tensor, Tensor]]:
    """The draws of a step, from the similarities to the momentum model's embeddings: texts, then images."""
    pixels, tokens, ids = task.preprocessing.normalize(batch.pixels), batch.tokens, batch.image_ids
    model, average = task.model, task.momentum_model
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        similarities = (
            embedded(model, pixels) @ average.embed_text(tokens.ids, tokens.mask).T,
            model.embed_text(tokens.ids, tokens.mask) @ embedded(average, pixels).T,
        )
    weights = [negative_weights(similarity / model.temperature, ids, ids) for similarity in similarities]
    return [draw_negatives(each, generator) for each in weights]


def assert_losses(task: nn.Module, batch: Batch, expected: dict[str, Tensor], step: int = 0) -> None:
    """The task's losses are the expected ones, and so are the gradients of their sum."""
    results = []
    for losses in (expected, task(batch, step, torch.Generator().manual_seed(step))):
        task.zero_grad()
        sum(losses.values()).backward()
        results.append((losses, gradients(task)))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-4, rtol=1e-3)


BATCH = random_batch([5, 8, 4, 6], image_ids=[1, 2, 1, 3])
VIDEOS = videos([5, 8, 4, 6], image_ids=[1, 2, 1, 3], frames=3)


@pytest.mark.parametrize(
    ("sharing", "batch"),
    [("all_but_sa", BATCH), ("all_but_sa", VIDEOS), *slow(("all", BATCH), ("all_but_ca", BATCH), ("none", BATCH))],
    ids=["all_but_sa", "videos", "all", "all_but_ca", "none"],
)
@pytest.mark.parametrize("name", ["pretraining", "filtering", "captioning"])
def test_losses_are_those_of_single_pairs_with_their_gradients(
    name: str, sharing: Sharing, batch: ImageTextBatch
) -> None:
    """In the third step, when the queue is full and alpha has half risen."""
    task = make_task(name, sharing)
    for step in range(2):
        train_step(task, random_batch([6, 3, 5, 7], image_ids=[4, 1, 5, 3 + step], seed=1 + step), step)
    expected: dict[str, Tensor] = {}
    if name != "captioning":
        queued = tuple(x.clone() for x in task.queue.content())
        assert len(queued[2]) == 7
        expected["itc"] = itc_by_definition(task, batch, queued, alpha=0.2)
        expected["itm"] = itm_by_pairs(task, batch, drawn_negatives(task, batch, step=2))
    if name != "filtering":
        prompt = TOKENIZER.prompt("a picture of ").tolist() if name == "captioning" else [TOKENIZER.dec_id]
        expected["lm"] = lm_by_captions(task, batch, prompt, smoothing=0.1)
    assert_losses(task, batch, expected, step=2)


@pytest.mark.parametrize("name", ["in-batch", "clip", "itc+lm", "itm", "lm"])
def test_objectives_alone_or_without_a_momentum_model_are_those_of_single_pairs(name: str) -> None:
    """Also where ITM's negatives are drawn from all other images alike."""
    task, tokens, ids = make_task(name), BATCH.tokens, BATCH.image_ids
    names = [loss for loss in ("itc", "itm", "lm") if loss in task.config.objectives]
    assert list(task(BATCH, 0, torch.Generator())) == names
    assert (task.momentum_model is None) == (name != "itc+lm")
    expected: dict[str, Tensor] = {}
    if name == "itc+lm":
        expected["itc"] = itc_by_definition(task, BATCH, tuple(x.clone() for x in task.queue.content()), alpha=0.0)
    elif "itc" in names:  # CLIP's loss, except that two captions of an image are right alike
        image = embedded(task.model, task.preprocessing.normalize(BATCH.pixels))
        similarity = image @ task.model.embed_text(tokens.ids, tokens.mask).T / task.model.temperature
        right = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]])
        smoothing = task.config.contrastive.label_smoothing
        right = (1 - smoothing) * right + smoothing / 4
        ways = [-(right * scores.log_softmax(1)).sum(1).mean() for scores in (similarity, similarity.T)]
        expected["itc"] = (ways[0] + ways[1]) / 2
    if "itm" in names:
        generator, uniform = torch.Generator().manual_seed(0), (ids[:, None] != ids[None]).float()
        expected["itm"] = itm_by_pairs(task, BATCH, [draw_negatives(uniform, generator) for _ in range(2)])
    if "lm" in names:
        expected["lm"] = lm_by_captions(task, BATCH, [TOKENIZER.dec_id], smoothing=0.1)
    assert_losses(task, BATCH, expected)


def test_hidden_words_are_predicted_beside_the_image_and_as_the_momentum_model_does() -> None:
    """ALBEF equation 7, a word at a time, when alpha has half risen."""
    task = make_task("albef")
    for step in range(2):
        train_step(task, random_batch([6, 3, 5, 7], image_ids=[4, 1, 5, 3 + step], seed=1 + step), step)
    generator = torch.Generator().manual_seed(2)
    losses = task(BATCH, 2, generator)
    assert list(losses) == ["itc", "itm", "mlm"]
    # The draws of ITM come before those of the words.
    generator = torch.Generator().manual_seed(2)
    torch.rand(2 * len(BATCH), generator=generator, dtype=torch.float64)
    uniform = torch.rand(len(BATCH), TINY.text.max_positions, 3, generator=generator)
    expected: list[Tensor] = []
    for b in range(len(BATCH)):
        ids = words(BATCH.tokens, b, TOKENIZER.enc_id)[0]
        hidden = [t for t in range(1, len(ids) - 1) if uniform[b, t, 0] < 0.15]
        read = ids.clone()
        for t in hidden:
            by, other = uniform[b, t, 1:].tolist()
            if by < 0.8:
                read[t] = TOKENIZER.entries["[MASK]"]
            elif by >= 0.9:
                read[t] = int(other * TOKENIZER.vocab_size)
        pixels = task.preprocessing.normalize(BATCH.pixels[b : b + 1])
        own, average = (
            model.masked_logits(read[None], everywhere(read[None]), model.image_kv(model.encode_image(pixels)))[0]
            for model in (task.model, task.momentum_model)
        )
        for t in hidden:
            target = 0.8 * F.one_hot(ids[t], TOKENIZER.vocab_size) + 0.2 * average[t].softmax(0)
            expected.append(-(target * own[t].log_softmax(0)).sum())
    assert expected
    torch.testing.assert_close(losses["mlm"], torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


def test_a_vocabulary_without_a_mask_hides_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "mask_id", None)
    with pytest.raises(ConfigError, match=r"no \[MASK\]"):
        make_task("mlm")


def test_a_decoder_writes_what_follows_a_random_beginning() -> None:
    """SimVLM's loss, a caption at a time: the beginning has none to all but one of its words."""
    task, batch = make_task("prefix"), random_batch([5, 8, 3, 6], image_ids=[1, 2, 1, 3])
    shares = torch.rand(4, generator=torch.Generator().manual_seed(5))
    losses, cuts = [], []
    for b, share in enumerate(shares.tolist()):
        said = words(batch.tokens, b, TOKENIZER.cls_id)[0, 1:-1].tolist()
        cuts.append(int(share * len(said)))
        begin = torch.tensor([[TOKENIZER.enc_id, *said[: cuts[-1]], TOKENIZER.sep_id]])
        rest = torch.tensor([[TOKENIZER.dec_id, *said[cuts[-1] :], TOKENIZER.sep_id]])
        image = task.model.encode_image(task.preprocessing.normalize(batch.pixels[b : b + 1]))
        logits = task.model.decode(rest[:, :-1], task.model.prefix_kv(image, begin, everywhere(begin)))
        losses += list(F.cross_entropy(logits[0], rest[0, 1:], reduction="none"))
    assert len(set(cuts)) > 1
    found = task(batch, 0, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, {"lm": torch.stack(losses).mean()}, atol=1e-5, rtol=1e-5)
    begins, rests = task.split(batch.tokens, torch.zeros(4))  # then the decoder writes all, as in captioning
    assert begins.mask.sum(dim=1).tolist() == [2, 2, 2, 2]
    assert torch.equal(rests.ids[:, 1:], batch.tokens.ids[:, 1:])
    begins, rests = task.split(batch.tokens, torch.full((4,), 0.9999))
    assert rests.mask.sum(dim=1).tolist() == [3, 3, 3, 3]


def test_objectives_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="add itc, or choose random ones"):
        PretrainingConfig(objectives=("itm", "lm"))
    for objectives in ((), ("itc", "vqa")):
        with pytest.raises(ConfigError, match="choose at least one of itc, itm, lm, mlm"):
            PretrainingConfig(objectives=objectives)  # type: ignore[arg-type]
    task = PretrainingConfig(objectives=("lm",))
    for option in ("contrastive.queue-size", "negatives"):
        with pytest.raises(ConfigError, match=f"--{option} has no effect here: the objectives are without"):
            refuse_unused(task, [option])


PAIRS = [random_batch([5, 7, 4][: len(ids)], ids) for ids in ([7], [7, 7, 7], [7, 8, 9])]
ODD_BATCHES = [
    *[(name, batch, "all_but_sa") for name in ("pretraining", "filtering", "captioning") for batch in PAIRS],
    *[(name, BATCH, "none") for name in ("in-batch", "clip", "itc+lm", "itm", "lm", "albef", "mlm", "prefix")],
    *slow(*itertools.product(("pretraining", "filtering", "captioning"), PAIRS, ("all", "all_but_ca", "none"))),
]


def test_the_queue_gets_the_momentum_models_embeddings_once_per_step() -> None:
    task = make_task("filtering")
    other = random_batch([4, 5], [8, 9], seed=3)
    average, queue = task.momentum_model, task.queue
    with torch.no_grad():
        pixels = [task.preprocessing.normalize(b.pixels) for b in (BATCH, other)]
        expected = [
            torch.cat([average.embed_image(average.encode_image(p)) for p in pixels]),
            torch.cat([average.embed_text(b.tokens.ids, b.tokens.mask) for b in (BATCH, other)]),
        ]
    for micro_batch in (BATCH, other):  # gradient accumulation: two forwards, one step
        task(micro_batch, 0, torch.Generator().manual_seed(0))
        assert len(queue.content()[2]) == 0
    task.after_step()
    images, texts, ids = queue.content()
    assert ids.tolist() == [1, 2, 1, 3, 8, 9]
    torch.testing.assert_close([images, texts], expected)
    for before, after in ((5.0, 0.5), (1e-5, 0.001)):
        with torch.no_grad():
            task.model.log_temperature.fill_(torch.tensor(before).log())
        task.after_step()
        assert task.model.temperature.item() == pytest.approx(after, rel=1e-4)  # clamped
    assert len(queue.content()[2]) == 6  # nothing new, nothing again


def test_the_momentum_model_follows_by_the_formula() -> None:
    task = make_task("pretraining")
    average = task.momentum_model
    before = {name: parameter.clone() for name, parameter in average.named_parameters()}
    train_step(task, BATCH)
    own = dict(task.model.named_parameters())
    for name, parameter in average.named_parameters():
        assert not torch.equal(own[name], before[name]) or own[name].grad is None or (own[name].grad == 0).all()
        expected = 0.9 * before[name] + (1 - 0.9) * own[name]
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["pretraining", "filtering"])
def test_the_momentum_model_has_no_dropout_while_the_task_trains(name: str) -> None:
    task, tokens = make_task(name, dropout=0.5), BATCH.tokens
    vectors = [task.train(mode).momentum_model.embed_text(tokens.ids, tokens.mask) for mode in (True, True, False)]
    assert torch.equal(vectors[0], vectors[1])
    assert torch.equal(vectors[0], vectors[2])


def test_the_momentum_model_starts_as_the_model_and_is_not_trained() -> None:
    task = make_task("pretraining")
    own, average = task.model.state_dict(), task.momentum_model
    for name, value in average.state_dict().items():
        assert torch.equal(value, own[name])
        assert value.data_ptr() != own[name].data_ptr()
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert not [name for name in average.state_dict() if "lm_head" in name or "itm" in name or "decode" in name]


def test_a_seed_decides_the_negatives() -> None:
    def itm(seed: int) -> float:
        return make_task("filtering")(BATCH, 0, torch.Generator().manual_seed(seed))["itm"].item()

    losses = [itm(seed) for seed in range(6)]
    assert itm(0) == losses[0]
    assert len(set(losses)) > 1


@pytest.mark.parametrize("ids", [[7], [7, 7, 7], [7, 7, 8]], ids=["one", "one image", "two images"])
def test_pairs_without_a_negative_are_not_counted(ids: list[int]) -> None:
    task, batch = make_task("filtering"), random_batch([5, 7, 4][: len(ids)], ids)
    expected = itm_by_pairs(task, batch, drawn_negatives(task, batch, step=0))
    found = task(batch, 0, torch.Generator().manual_seed(0))["itm"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_without_a_prompt_every_token_is_predicted_and_with_one_the_words_are_read() -> None:
    task = make_task("captioning")
    config = CaptioningConfig(prompt="", label_smoothing=0.0)
    plain = Captioning(config, task.model, TOKENIZER, task.preprocessing)
    without, with_prompt = (each(BATCH, 0, torch.Generator())["lm"] for each in (plain, task))
    torch.testing.assert_close(without, lm_by_captions(plain, BATCH, [TOKENIZER.dec_id], 0.0))
    assert not torch.allclose(without, with_prompt)


def test_interleaved_texts_alternate_and_pad_to_the_longer() -> None:
    short, long = random_batch([3, 4], [1, 2]).tokens, random_batch([6, 2], [1, 2], seed=1).tokens
    both = interleave(replace_first(short, DEC), long)
    assert both.ids.shape == both.mask.shape == (4, 6)
    assert both.mask.sum(dim=1).tolist() == [3, 6, 4, 2]
    assert both.ids[:, 0].tolist() == [DEC, 2, DEC, 2]


VQA = questions([5, 9, 3], [[4], [3, 6, 5], [7, 3]])
VIDEO_VQA = questions([5, 3], [[4, 6], [3]], frames=3)
NLVR = statements([5, 9, 3], [1, 0, 0])
VISDIAL = dialogs([4, 8], [9, 7, 12, 5, 5, 6])


def words(tokens: Tokens, row: int, first: int) -> Tensor:
    """A text without its padding, (1, T), from `first` on."""
    ids = tokens.ids[row : row + 1, : int(tokens.mask[row].sum())].clone()
    ids[0, 0] = first
    return ids


def everywhere(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


def vqa_by_answers(task: nn.Module, batch: QuestionBatch) -> Tensor:
    """One answer at a time: the cross-entropy of its tokens, summed, times its weight; over the questions."""
    model, total = task.model, torch.zeros(())
    for answer, question in enumerate(batch.owners.tolist()):
        pixels = task.preprocessing.normalize(batch.pixels[question])
        frames = pixels if pixels.dim() == 4 else pixels[None]
        image_tokens = torch.cat([model.encode_image(frame[None]) for frame in frames], dim=1)
        asked = words(batch.questions, question, TOKENIZER.enc_id)
        kv = model.question_kv(asked, everywhere(asked), model.image_kv(image_tokens, "encode"))
        said = words(batch.answers, answer, TOKENIZER.dec_id)
        logits = model.decode(said[:, :-1], kv)[0]
        for position, token in enumerate(said[0, 1:]):
            loss = F.cross_entropy(logits[position], token, label_smoothing=SMOOTHING)
            total = total + batch.weights[answer] * loss
    return total / len(batch)


def nlvr_by_statements(task: nn.Module, batch: StatementBatch) -> Tensor:
    model, losses = task.model, []
    for row in range(len(batch)):
        sides = [model.encode_image(task.preprocessing.normalize(side[None])) for side in batch.pixels[row]]
        said = words(batch.statements, row, TOKENIZER.enc_id)
        kv = model.image_kv(torch.stack(sides, dim=1), "encode")
        logits = model.judge_logits(said, everywhere(said), kv)
        losses.append(-logits.log_softmax(dim=1)[0, int(batch.labels[row])])
    return torch.stack(losses).mean()


def visdial_by_dialogs(task: nn.Module, batch: DialogBatch) -> Tensor:
    model, losses = task.model, []
    own = len(batch.labels) // len(batch)
    for row, label in enumerate(batch.labels.tolist()):
        image = row // own
        image_tokens = model.encode_image(task.preprocessing.normalize(batch.pixels[image : image + 1]))
        caption = words(batch.captions, image, TOKENIZER.cls_id)
        kv = model.dialog_kv(image_tokens, caption, everywhere(caption))
        dialog = words(batch.dialogs, row, TOKENIZER.enc_id)
        losses.append(-model.match_logits(dialog, everywhere(dialog), kv).log_softmax(dim=1)[0, label])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("name", "sharing", "loss_name", "batch", "plain"),
    [
        ("vqa", "none", "vqa", VQA, vqa_by_answers),
        ("vqa", "all_but_ca", "vqa", VQA, vqa_by_answers),
        ("vqa", "none", "vqa", VIDEO_VQA, vqa_by_answers),
        ("nlvr", "all_but_sa", "nlvr", NLVR, nlvr_by_statements),
        ("visdial", "all_but_sa", "itm", VISDIAL, visdial_by_dialogs),
    ],
    ids=["vqa", "vqa shared", "videos", "nlvr", "visdial"],
)
def test_a_loss_is_that_of_single_examples_with_its_gradients(
    name: str, sharing: Sharing, loss_name: str, batch: Batch, plain: Callable[[nn.Module, Batch], Tensor]
) -> None:
    task = make_task(name, sharing)
    assert_losses(task, batch, {loss_name: plain(task, batch)})


@pytest.mark.parametrize(
    ("name", "batch", "sharing"),
    [
        *ODD_BATCHES,
        *[("vqa", batch, None) for batch in (VQA, VIDEO_VQA, questions([4], [[3]]))],
        *[("nlvr", batch, None) for batch in (NLVR, statements([4], [0]))],
        *[("visdial", batch, None) for batch in (VISDIAL, dialogs([3], [5, 5]))],
    ],
)
def test_any_batch_trains_every_weight(name: str, batch: Batch, sharing: Sharing | None) -> None:
    """Finite, and with a gradient for each weight that asks for one: DDP waits for all of them."""
    task = make_task(name, sharing).train()
    for step in range(3):
        assert all(torch.isfinite(loss) for loss in train_step(task, batch, step).values())
        for parameter_name, parameter in task.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), parameter_name


def test_a_question_without_weight_trains_nothing() -> None:
    task = make_task("vqa")
    nothing = questions([5, 4], [[4], [3]])
    nothing.weights.zero_()
    loss = task(nothing, 0, torch.Generator())["vqa"]
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(task).values() if gradient is not None)


@pytest.mark.parametrize(
    ("name", "batch"),
    [("pretraining", BATCH), ("captioning", BATCH), ("vqa", VQA), ("nlvr", NLVR), ("visdial", VISDIAL)],
)
def test_the_batchs_own_tokens_are_left_alone(name: str, batch: Batch) -> None:
    texts = [value for field in fields(batch) if isinstance(value := getattr(batch, field.name), Tokens)]
    before = [tokens.ids.clone() for tokens in texts]
    make_task(name)(batch, 0, torch.Generator())
    assert texts
    assert all(torch.equal(old, tokens.ids) for old, tokens in zip(before, texts, strict=True))


# --- The longest text of a run has to fit the model, and is found out before the first step

POSITIONS = TINY.text.max_positions
PROMPT = "a b"
PROMPT_TOKENS = len(TOKENIZER.prompt(PROMPT))


def build(config: CaptioningConfig | PretrainingConfig, max_text_length: int) -> Task:
    model = Blip(replace(TINY, text=replace(TINY.text, vocab_size=TOKENIZER.vocab_size)))
    data = DataConfig(source="", max_text_length=max_text_length)
    task_class = TASKS[type(config)]
    return task_class.build(config, data, model, TOKENIZER, Preprocessing(image_size=SIZE))


def test_the_longest_caption_that_is_accepted_trains() -> None:
    longest = POSITIONS + 2 - PROMPT_TOKENS
    task = build(CaptioningConfig(prompt=PROMPT), longest)
    batch = random_batch([3], [1])
    ids = torch.full((1, longest), TOKENIZER.pad_id + 5)
    batch = replace(batch, tokens=Tokens(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert torch.isfinite(task(batch, 0, torch.Generator())["lm"])
    with pytest.raises(ConfigError, match=rf"{POSITIONS + 1} tokens.*{POSITIONS} positions"):
        build(CaptioningConfig(prompt=PROMPT), longest + 1)


def test_without_a_prompt_positions_are_the_limit() -> None:
    build(PretrainingConfig(), POSITIONS)
    with pytest.raises(ConfigError, match=r"--data\.max-text-length"):
        build(PretrainingConfig(), POSITIONS + 1)


def test_the_text_branch_of_a_qformer_limits_what_it_is_given() -> None:
    """Without one, as in stage 2, the language model has a limit of its own."""
    model = tiny_blip2().model
    positions = model.config.qformer.max_positions
    data = DataConfig(source="", max_text_length=positions + 1)
    preprocessing = Preprocessing(image_size=SIZE)
    with pytest.raises(ConfigError, match=rf"{positions + 1} tokens: the Q-Former has {positions} positions"):
        Blip2Stage1.build(Blip2Stage1Config(), data, model, TOKENIZER, preprocessing)
    Blip2Stage2.build(Blip2Stage2Config(), data, tiny_blip2((), "opt").model, None, preprocessing)

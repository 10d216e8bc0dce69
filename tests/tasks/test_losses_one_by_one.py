"""Questions, statements and dialogs: their losses against one example at a time, gradients included."""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from tiny_tasks import SMOOTHING, TOKENIZER, dialogs, make_task, questions, statements, train_step
from torch import Tensor, nn

from openblip.data.batch import Batch
from openblip.data.tokenizer import Tokens
from openblip.models.config import Sharing
from openblip.tasks.nlvr import StatementBatch
from openblip.tasks.question_answering import QuestionBatch
from openblip.tasks.visdial import DialogBatch
from tiny_blip import gradients

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
    expected = plain(task, batch)
    expected.backward()
    wanted = gradients(task)
    task.zero_grad()
    losses = task(batch, 0, torch.Generator())
    assert losses.keys() == {loss_name}
    torch.testing.assert_close(losses[loss_name], expected, atol=1e-5, rtol=1e-5)
    losses[loss_name].backward()
    for parameter, found in gradients(task).items():
        assert (found is None) == (wanted[parameter] is None), parameter
        if found is not None:
            torch.testing.assert_close(found, wanted[parameter], atol=1e-4, rtol=1e-3, msg=parameter)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("vqa", VQA),
        ("vqa", VIDEO_VQA),
        ("vqa", questions([4], [[3]])),
        ("nlvr", NLVR),
        ("nlvr", statements([4], [0])),
        ("visdial", VISDIAL),
        ("visdial", dialogs([3], [5, 5])),
    ],
)
def test_any_batch_trains_every_weight(name: str, batch: Batch) -> None:
    """Finite, and with a gradient for each weight: DDP waits for all of them."""
    task = make_task(name).train()
    for step in range(2):
        assert all(torch.isfinite(loss) for loss in train_step(task, batch, step).values())
        for parameter_name, parameter in task.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name


def test_a_question_without_weight_trains_nothing() -> None:
    task = make_task("vqa")
    nothing = questions([5, 4], [[4], [3]])
    nothing.weights.zero_()
    loss = task(nothing, 0, torch.Generator())["vqa"]
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(task).values() if gradient is not None)


@pytest.mark.parametrize(("name", "batch"), [("vqa", VQA), ("nlvr", NLVR), ("visdial", VISDIAL)])
def test_the_batchs_own_tokens_are_left_alone(name: str, batch: Batch) -> None:
    texts = [value for field in fields(batch) if isinstance(value := getattr(batch, field.name), Tokens)]
    before = [tokens.ids.clone() for tokens in texts]
    make_task(name)(batch, 0, torch.Generator())
    assert texts
    assert all(torch.equal(old, tokens.ids) for old, tokens in zip(before, texts, strict=True))

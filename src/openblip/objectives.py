"""The losses, as functions of tensors: contrast (ITC) with its queue, matching (ITM), language modelling (LM, MLM).

BLIP section 3.2; ALBEF sections 3.2 and 3.3 for momentum and soft targets, after MoCo. Means are those of the joint
batch of all processes.

B local batch, G joint batch, K keys (momentum batch of all processes, then the queue), Q capacity of the queue, E
embedding width, R rows of texts or pairs, T tokens, A answers, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openblip.distributed import global_mean, local_rows
from openblip.errors import ConfigError

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # released code; the paper names no bounds
EPSILON = 1e-4  # released pre-training code: keeps every negative of ITM possible
IGNORE_INDEX = -100
HIDDEN_SHARE = 0.15  # of a text's tokens, in MLM (BERT section 3.1, ALBEF section 3.2)
NO_ID = -1  # no sample has it, so an empty slot of the queue is nobody's positive


# --- ITC


def positive_targets(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """(B,) and (K,) image ids -> (B, K): equal shares over all keys of the same image. The released pre-training code
    counts only a pair's own caption as positive, which makes other captions of the same image negatives; its retrieval
    fine-tuning does it as here.
    """
    same = (query_ids[:, None] == key_ids[None, :]).float()
    return same / same.sum(dim=1, keepdim=True).clamp_min(1.0)


def similarity_loss(similarity: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of similarities over temperature, (B, K), against targets (B, K): the joint mean."""
    per_query = -(targets * F.log_softmax(similarity, dim=1)).sum(dim=1)
    return global_mean(per_query, torch.ones_like(per_query))


def itc_loss(
    image: Tensor,
    text: Tensor,
    momentum_image: Tensor,
    momentum_text: Tensor,
    ids: Tensor,
    keys: Sequence[Tensor],
    temperature: Tensor,
    alpha: float,
) -> Tensor:
    """The mean of the image-to-text and the text-to-image loss, a scalar.

    The targets of a direction are alpha * softmax(momentum similarity / temperature) + (1 - alpha) * positives.

    image, text: (B, E) unit vectors with gradients; momentum_image, momentum_text: the same pairs through
    the momentum encoders; ids: (B,) int64; keys: image embeddings (K, E), text embeddings (K, E), both unit vectors
    without gradient, and ids (K,); alpha: weight of the soft targets, 0 to 1.
    """
    key_images, key_texts, key_ids = keys
    hard = positive_targets(ids, key_ids)

    def one_way(query: Tensor, momentum_query: Tensor, of_keys: Tensor) -> Tensor:
        with torch.no_grad():
            soft = F.softmax(momentum_query @ of_keys.T / temperature, dim=1)
            targets = alpha * soft + (1.0 - alpha) * hard
        return similarity_loss(query @ of_keys.T / temperature, targets)

    with torch.autocast(image.device.type, enabled=False):  # bf16 similarities over 0.07 are too coarse
        return (one_way(image, momentum_image, key_texts) + one_way(text, momentum_text, key_images)) / 2


def in_batch_itc_loss(
    image_to_text: Tensor, text_to_image: Tensor, ids: Tensor, joint_ids: Tensor, label_smoothing: float
) -> Tensor:
    """ITC without momentum and queue (BLIP-2 section 3.2), the mean of both directions, a scalar.

    Similarities over temperature of the B local images to the texts of the joint batch and of the B local texts to its
    images, both (B, G); ids (B,) and joint_ids (G,). All keys of the same image are positive; the released code does so
    in retrieval only; in stage 1 it counts the other captions of an image as negatives.
    """
    hard = positive_targets(ids, joint_ids)
    targets = (1.0 - label_smoothing) * hard + label_smoothing / hard.shape[1]
    return (similarity_loss(image_to_text, targets) + similarity_loss(text_to_image, targets)) / 2


def alpha_at(step: int, alpha: float, ramp_steps: int) -> float:
    """The weight of soft targets: linear from 0 over `ramp_steps`, then constant (released code)."""
    return alpha if ramp_steps <= 0 else alpha * min(1.0, step / ramp_steps)


@torch.no_grad()
def clamp_temperature(log_temperature: Tensor) -> None:
    """Keep the learnable temperature in its bounds, by its logarithm and in place; after each step."""
    log_temperature.clamp_(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))


class EmbeddingQueue(nn.Module):
    """The last Q image and text embeddings of the momentum encoders, with their image ids. Empty slots are not used as
    negatives. The released code starts with Q random vectors instead, and asks that the global batch divide Q; here any
    batch goes with any queue.
    """

    images: Tensor
    texts: Tensor
    ids: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, capacity: int, embed_dim: int) -> None:
        super().__init__()
        if capacity < 0:
            raise ConfigError(f"A queue of {capacity} embeddings: use 0 for none.")
        self.capacity = capacity
        self.register_buffer("images", torch.zeros(capacity, embed_dim))
        self.register_buffer("texts", torch.zeros(capacity, embed_dim))
        self.register_buffer("ids", torch.full((capacity,), NO_ID, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self._known = (-1, 0)  # a version of `filled` and its value then

    def content(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image embeddings (F, E), text embeddings (F, E) and ids (F,) of the F filled slots."""
        filled = self._num_filled()
        return self.images[:filled], self.texts[:filled], self.ids[:filled]

    def _num_filled(self) -> int:
        """`filled` as a number. The host waits for a GPU only when something else than `put` has changed it."""
        version, filled = self._known
        if version != self.filled._version:
            filled = int(self.filled)
            self._known = self.filled._version, filled
        return filled

    @torch.no_grad()
    def put(self, images: Tensor, texts: Tensor, ids: Tensor) -> None:
        """Store (B, E), (B, E) and (B,), over the oldest; of more than Q the last Q stay."""
        if self.capacity == 0:
            return
        images, texts, ids = (x[-self.capacity :] for x in (images, texts, ids))
        filled = min(self._num_filled() + len(ids), self.capacity)
        slots = (self.pointer + torch.arange(len(ids), device=self.ids.device)) % self.capacity
        self.images[slots] = images.to(self.images)
        self.texts[slots] = texts.to(self.texts)
        self.ids[slots] = ids.to(self.ids)
        self.pointer.add_(len(ids)).remainder_(self.capacity)
        self.filled.fill_(filled)
        self._known = self.filled._version, filled


@torch.no_grad()
def update_average(average: Iterable[Tensor], current: Iterable[Tensor], momentum: float) -> None:
    """average <- momentum * average + (1 - momentum) * current, in place and in float32."""
    torch._foreach_lerp_(list(average), [x.detach() for x in current], 1.0 - momentum)


# --- ITM


def negative_weights(similarity: Tensor, row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """Sampling weights (B, G): softmax(similarity) + epsilon, zero where the ids are equal.

    similarity: (B, G), already divided by the temperature. The released code zeroes the diagonal only, so
    that other captions of the same image were drawn as negatives; its retrieval code leaves out epsilon and
    fails when a row has no mass.
    """
    weights = F.softmax(similarity.detach().float(), dim=1) + EPSILON
    return weights.masked_fill(row_ids[:, None] == column_ids[None, :], 0.0)


def draw_negatives(weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One column per row of (B, G) by its weights -> indices (B,) int64 and (B,) bool: there was a choice.

    Rows without any negative give index 0 and False. Every process draws for the joint batch from the same
    generator state and keeps its own rows, so that W processes draw what one would. By inverse CDF, since
    torch.multinomial refuses rows without mass.
    """
    local_size, joint_size = weights.shape
    uniform = local_rows(torch.rand(joint_size, generator=generator, dtype=torch.float64), local_size)
    cumulative = weights.double().cumsum(dim=1)
    total = cumulative[:, -1]
    threshold = uniform.to(weights.device, non_blocking=True) * total
    index = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
    last_possible = joint_size - 1 - (weights.flip(1) > 0).int().argmax(dim=1)
    possible = total > 0
    return torch.where(possible, torch.minimum(index, last_possible), 0), possible


def itm_loss(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy of logits (R, 2) against labels (R,) in {0, 1}, over the rows `counted` (R,) names."""
    return global_mean(F.cross_entropy(logits.float(), labels, reduction="none"), counted)


# --- LM


def next_token_labels(ids: Tensor, mask: Tensor, prompt_length: int = 1) -> Tensor:
    """ids (R, T) and mask (R, T), True at real tokens -> labels (R, T-1) for logits[:, :-1]. Padding and the first
    `prompt_length` tokens ([DEC] and the prompt) are not predicted: IGNORE_INDEX.
    """
    labels = ids.masked_fill(~mask, IGNORE_INDEX)[:, 1:].clone()
    labels[:, : max(prompt_length - 1, 0)] = IGNORE_INDEX
    return labels


def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of every token of logits (R, T, V), (R, T), zero where labels are IGNORE_INDEX."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
        reduction="none",
    ).view(labels.shape)


def lm_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits (R, T, V) against labels (R, T), the mean over the joint batch's tokens."""
    per_token = token_losses(logits, labels, label_smoothing).flatten()
    return global_mean(per_token, labels.flatten() != IGNORE_INDEX)


def hide_tokens(ids: Tensor, can_hide: Tensor, uniform: Tensor, mask_id: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Hide HIDDEN_SHARE of the tokens for MLM: ids (R, T) -> ids in which of the hidden tokens 80% are `mask_id`, 10% a
    random one and 10% still there, and labels (R, T), the hidden tokens or IGNORE_INDEX (BERT section 3.1).

    can_hide: bool (R, T), False at special tokens and padding. uniform: (R, T, 3), numbers from 0 to below 1 that
    decide whether a token is hidden, by what, and the random one.
    """
    is_hidden = can_hide & (uniform[..., 0] < HIDDEN_SHARE)
    by_mask, by_other = uniform[..., 1] < 0.8, uniform[..., 1] >= 0.9
    others = (uniform[..., 2] * vocab_size).long().clamp_max(vocab_size - 1)
    hidden = torch.where(by_mask, mask_id, torch.where(by_other, others, ids))
    return torch.where(is_hidden, hidden, ids), ids.masked_fill(~is_hidden, IGNORE_INDEX)


def masked_lm_loss(logits: Tensor, labels: Tensor, momentum_logits: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """Cross-entropy of logits (R, T, V) against the hidden tokens, the mean over those of the joint batch.

    With a momentum model's logits, the targets are alpha * softmax of these + (1 - alpha) * the tokens (ALBEF section
    3.3, equation 7).
    """
    per_token = token_losses(logits, labels, 0.0)  # (R, T)
    if momentum_logits is not None:
        soft = -(momentum_logits.float().softmax(dim=-1) * logits.float().log_softmax(dim=-1)).sum(dim=-1)
        per_token = (1.0 - alpha) * per_token + alpha * soft
    return global_mean(per_token.flatten(), labels.flatten() != IGNORE_INDEX)


def answer_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, num_questions: int, label_smoothing: float = 0.0
) -> Tensor:
    """Sum over answers of weight * cross-entropy, a question's share (BLIP section 5.3, released code). logits (A, T,
    V), labels (A, T), weights (A,); an answer's cross-entropy is the sum over its tokens, and the sum over answers is
    divided by the number of questions.
    """
    per_answer = token_losses(logits, labels, label_smoothing).sum(dim=1)  # (A,)
    return (weights * per_answer).sum() / num_questions

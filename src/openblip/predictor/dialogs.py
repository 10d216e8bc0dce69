"""Which answer goes on with a dialog about an image (VisDial; BLIP section 5.5).

B images, K answers read at a time, C candidates of an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from openblip.data.prompts import (
    MAX_DIALOG_CAPTION_TOKENS,
    MAX_DIALOG_TOKENS,
    dialog_turns,
    normalize_caption,
)
from openblip.errors import ConfigError
from openblip.models.blip import CrossKV
from openblip.predictor.batching import MAX_ROWS, chunks
from openblip.predictor.blip_runtime import BlipRuntime
from openblip.predictor.conversations import Dialog
from openblip.predictor.images import Images, listed


@torch.inference_mode()
def rank_answers(
    runtime: BlipRuntime,
    images: Images,
    captions: Sequence[str],
    dialogs: Sequence[Dialog],
    candidates: Sequence[Sequence[str]],
    batch_size: int | None,
) -> list[Tensor]:
    """P(right) of every candidate, for each image float32 (C,) on the CPU."""
    images = listed(images)
    counts = [len(images), len(captions), len(dialogs), len(candidates)]
    if len(set(counts)) > 1:
        raise ConfigError(
            "rank_answers takes a caption, a dialog and a list of candidates for each image: "
            f"{counts[0]} images, {counts[1]} captions, {counts[2]} dialogs and {counts[3]} lists of "
            "candidates were given."
        )
    rounds = [_rounds(dialog, position) for position, dialog in enumerate(dialogs)]
    found: list[Tensor] = []
    for where, encoded in runtime.encoded_batches(images, batch_size):
        normalized = [normalize_caption(caption) for caption in captions[where]]
        tokens = runtime.tokens(normalized, MAX_DIALOG_CAPTION_TOKENS, runtime.tokenizer.cls_id)
        dialog_kv = runtime.model.dialog_kv(encoded.tokens, tokens.ids, tokens.mask)
        for row in range(len(encoded)):
            own_kv = dialog_kv.select(torch.tensor([row], device=runtime.device))
            place = where.start + row
            earlier, question = rounds[place]
            found.append(_score(runtime, own_kv, earlier, question, candidates[place]))
    return found


def _score(
    runtime: BlipRuntime,
    dialog_kv: CrossKV,
    earlier: Sequence[tuple[str, str]],
    question: str,
    candidates: Sequence[str],
) -> Tensor:
    """(C,) for the candidates of one image."""
    limit = min(MAX_DIALOG_TOKENS, runtime.model.config.text.max_positions)
    found = [torch.zeros(0)]
    for answers in chunks(candidates, MAX_ROWS // 4):  # dialogs are long
        turns = [dialog_turns(earlier, question, answer) for answer in answers]
        tokens = runtime.tokenizer.encode_turns(turns, limit).to(runtime.device)
        tokens.ids[:, 0] = runtime.encoder_id
        logits = runtime.model.match_logits(tokens.ids, tokens.mask, dialog_kv)  # (K, 2)
        found.append(logits.float().softmax(dim=1)[:, 1].cpu())
    return torch.cat(found)


def _rounds(dialog: Dialog, position: int) -> tuple[list[tuple[str, str]], str]:
    """The rounds that are answered, and the open question; ConfigError when there is none."""
    question = dialog[-1] if dialog and not isinstance(dialog, str) else None
    if not isinstance(question, str):
        raise ConfigError(
            f"rank_answers: dialog {position} is no list that ends with the open question, a string; before "
            "it stand earlier rounds, as (question, answer) or in one string each."
        )
    earlier = dialog[:-1]
    return [(turn, "") if isinstance(turn, str) else (turn[0], turn[1]) for turn in earlier], question

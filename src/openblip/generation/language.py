"""Decoding by a language model of transformers: visual prompts and text prompts in, token ids out.

The prompts are read once, for all texts that follow them. The searches are those of our own decoders.

B images, K texts for each, R rows of prompts and what follows, Q visual prompts, T text tokens, Dl width of the
language model, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from openblip.errors import ConfigError
from openblip.generation import search
from openblip.generation.decoding import Beam, Decoding
from openblip.models.language_model import LanguageModel, padded_right


@torch.inference_mode()
def write_texts(
    language: LanguageModel,
    visual: Tensor,
    prompts: Sequence[str],
    decoding: Decoding,
    *,
    num_captions: int = 1,
    seeds: Sequence[int] | None = None,
) -> list[list[search.Generated]]:
    """Write `num_captions` texts after each of B visual prompts (B, Q, Dl) and text prompts. Several captions, seeds
    and errors are as in `generate`; ConfigError also when the language model has too few positions.
    """
    search.check_request(len(visual), decoding, num_captions, seeds)
    if len(visual) == 0:
        return []
    from openblip.models.language_decoder import read_prompts  # and transformers

    texts_per_prompt = decoding.num_beams if isinstance(decoding, Beam) and decoding.num_beams > 1 else num_captions
    read = read_prompts(language, visual, prompts, decoding.max_new_tokens)
    rows = torch.arange(len(visual), device=visual.device).repeat_interleave(texts_per_prompt)
    decoder = read.texts(rows, decoding.max_new_tokens)
    return search.write(decoder, read.logits, decoding, num_captions=num_captions, eos_id=language.end_id, seeds=seeds)


@torch.inference_mode()
def best_texts(
    language: LanguageModel,
    visual: Tensor,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    num_candidates: int = 128,
    max_rows: int = 512,
) -> list[search.Ranked]:
    """The candidate of highest log-probability, its end token included, after each visual prompt (R, Q, Dl).

    candidates: a list for each row; of equal candidates the first counts. They are compared as in `best_candidates`,
    with the same errors. `max_rows` bounds memory: the texts in one forward pass.
    """
    if num_candidates < 1 or not all(candidates):
        raise ConfigError(f"ranking: num_candidates is {num_candidates}, or there are no candidates")
    if len(visual) == 0:
        return []
    from openblip.models.language_decoder import read_prompts  # and transformers

    indices: list[dict[tuple[int, ...], int]] = []
    for prompt, texts_of_row in zip(prompts, candidates, strict=True):
        indices.append({})
        for index, text in enumerate(texts_of_row):
            indices[-1].setdefault((*language.text_ids(prompt, text), language.end_id), index)
    read = read_prompts(language, visual, prompts, max(len(ids) for texts in indices for ids in texts))
    begin = read.logits.log_softmax(dim=-1)  # (R, V)
    pairs = [
        (row, ids)
        for row, (texts, logprobs) in enumerate(zip(indices, begin.cpu(), strict=True))
        for ids in _likely_to_begin(list(texts), logprobs, num_candidates)
    ]
    pairs.sort(key=lambda pair: len(pair[1]))  # so that the texts of a pass have about the same length
    ranked: list[list[search.Ranked]] = [[] for _ in indices]
    for start in range(0, len(pairs), max_rows):
        rows, texts = zip(*pairs[start : start + max_rows], strict=True)
        ids, _ = padded_right(texts, language.pad_id, visual.device)  # (K, T)
        row_index = torch.tensor(rows, device=visual.device)
        logprobs = [begin[row_index].gather(1, ids[:, :1])]
        if ids.shape[1] > 1:
            logits = read.texts(row_index, ids.shape[1]).read(ids[:, :-1]).float()  # (K, T - 1, V)
            logprobs.append(logits.gather(2, ids[:, 1:, None]).squeeze(2) - logits.logsumexp(dim=-1))
        for row, text, values in zip(rows, texts, torch.cat(logprobs, dim=1).tolist(), strict=True):
            generated = search.to_generated(text, values[: len(text)], language.end_id)
            ranked[row].append(search.Ranked(indices[row][text], generated))
    return [max(texts, key=lambda text: (text.generated.logprob, -text.position)) for texts in ranked]


def _likely_to_begin(
    texts: Sequence[tuple[int, ...]], logprobs: Tensor, num_candidates: int
) -> Sequence[tuple[int, ...]]:
    """The texts whose first token is at least as likely, by logprobs (V,), as that of the text at that rank."""
    if len(texts) <= num_candidates:
        return texts
    firsts = logprobs[[ids[0] for ids in texts]]
    limit = firsts.topk(num_candidates).values[-1]
    # NaN stays in, and is reported when it is scored
    return [ids for ids, first in zip(texts, firsts, strict=True) if not first < limit]

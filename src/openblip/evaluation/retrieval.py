"""Retrieval of texts, images and videos by ITC and ITM (BLIP sections 5.1 and 5.6). I images or videos, T texts."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openblip.data.sample import Sample, Source
from openblip.evaluation.run import require_caption, run_evaluation, sample_images
from openblip.metrics.ranking import retrieval_precision, retrieval_recall
from openblip.models.blip import similarity_matrix
from openblip.predictor import BasePredictor
from openblip.predictor.reranking import rerank_scores
from openblip.text_counts import count_texts, warn_caller

Scores = NDArray[np.float32]
Ids = NDArray[np.int64]


@count_texts(warn_caller)
def evaluate_retrieval(
    predictor: BasePredictor,
    source: Source,
    *,
    rerank: int = 16,
    num_frames: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return how well texts (TR) and images (IR) are retrieved, by ITC and, with that head, re-ranked by ITM.

    These are R@1/5/10, and mAP@R and R-Precision. All captions of an image are right answers. The `rerank` best
    candidates by ITC similarity (all, where there are fewer) are ordered anew by similarity plus ITM score, as in BLIP
    section 5.1. Deviation: the ITM score is P(match), where the released code adds the raw logit. Texts are cut to as
    many tokens as there (35 for BLIP, 32 for BLIP-2), but not also to 30 words. With `num_frames` the source's videos
    take the place of images (section 5.6). Images are read twice, so that no more than a batch of them is in memory.

    Without ITC every image is compared with every text: by ITM, and by a model that only writes ("lm") by the
    log-probability of the text as its caption. Raises `SourceError` when no sample has a caption.
    """
    has_itc, has_itm = ("similarity" in predictor.tasks), ("match" in predictor.tasks)

    def embed(samples: list[Sample]) -> list[Tensor]:
        if not has_itc:
            return [torch.zeros(0) for _ in samples]  # all texts have to be known first
        images = sample_images(predictor, samples, num_frames, batch_size)
        return list(predictor.embed_images(images, batch_size))

    run = run_evaluation(source, embed, label="embedding", check_sample=require_caption, limit=limit)
    ids = {name: i for i, name in enumerate(dict.fromkeys(sample.image_id for sample in run.samples))}
    image_ids = np.array([ids[sample.image_id] for sample in run.samples])
    texts = [caption for sample in run.samples for caption in sample.captions]
    text_ids = np.array([ids[sample.image_id] for sample in run.samples for _ in sample.captions])
    counts = {"num_images": len(run.results), "num_texts": len(texts)}

    def compare(samples: list[Sample]) -> list[Tensor]:
        images = predictor.encode(sample_images(predictor, samples, num_frames, batch_size), batch_size)
        if has_itm:
            return list(predictor.match_matrix(images, texts, batch_size, predictor.retrieval_text_tokens))
        written = predictor.score_captions(images, [texts] * len(samples), batch_size=batch_size)
        return [torch.tensor([score.logprob for score in of_image]) for of_image in written]

    if not has_itc:
        compared = run_evaluation(source, compare, label="comparing", check_sample=require_caption, limit=limit)
        all_pairs = torch.stack(compared.results).numpy()  # (I, T)
        return run.report(counts, {"itm" if has_itm else "lm": _measured(all_pairs, all_pairs.T, image_ids, text_ids)})
    vectors = predictor.embed_texts(texts, batch_size, predictor.retrieval_text_tokens)
    similarity = similarity_matrix(torch.stack(run.results), vectors)  # (I, T)
    scores: dict[str, Any] = {"itc": _measured(similarity.numpy(), similarity.T.numpy(), image_ids, text_ids)}
    if not has_itm:
        return run.report(counts, scores)
    top_of_image = topk_mask(similarity, rerank)  # (I, T) bool
    top_of_text = topk_mask(similarity.T, rerank).T  # (I, T) bool
    needed = top_of_image | top_of_text
    row_of_sample = {(sample.shard, sample.key): i for i, sample in enumerate(run.samples)}

    def match(samples: list[Sample]) -> list[Tensor]:
        images = predictor.encode(sample_images(predictor, samples, num_frames, batch_size), batch_size)
        scores = []
        for i, sample in enumerate(samples):
            columns = needed[row_of_sample[sample.shard, sample.key]].nonzero().flatten().tolist()
            image, candidates = images.select(torch.tensor([i])), [texts[column] for column in columns]
            scores.append(predictor.match_matrix(image, candidates, batch_size, predictor.retrieval_text_tokens)[0])
        return scores

    matched = run_evaluation(source, match, label="re-ranking", check_sample=require_caption, limit=limit)
    itm = torch.zeros_like(similarity)
    itm[needed] = torch.cat(matched.results)
    by_image = rerank_scores(similarity, itm, top_of_image).numpy()
    by_text = rerank_scores(similarity, itm, top_of_text).T.numpy()
    scores["itm"] = _measured(by_image, by_text, image_ids, text_ids)
    scores["reranked"] = min(rerank, max(similarity.shape))
    return run.report(counts, scores)


def _measured(to_text: Scores, to_image: Scores, image_ids: Ids, text_ids: Ids) -> dict[str, float]:
    recall = retrieval_recall(to_text, image_ids, text_ids, text_to_image=to_image)
    return recall | retrieval_precision(to_text, image_ids, text_ids, text_to_image=to_image)


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Return bool (queries, candidates): each query's k best candidates, or all where there are fewer."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(min(k, scores.shape[1]), dim=1).indices, True)

"""The predictor of a BLIP: its text transformer captions, answers, matches, judges and ranks.

B images, K questions or answers of each, R = B * K rows of text, N image tokens, Dv their width, T text tokens, D their
width, E embedding width, L tokens of a written text, P prompt tokens, G patches a side.
"""

from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from itertools import groupby
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.data.texts import dialog_turns, normalize_question
from openblip.data.tokenizer import Tokenizer, Tokens
from openblip.errors import ConfigError
from openblip.generation.decoding import Beam, Decoding
from openblip.generation.search import best_candidates, generate
from openblip.models.blip import Blip, CrossKV
from openblip.nn.config import Mode
from openblip.predictor import values
from openblip.predictor.base import BasePredictor, model_call
from openblip.predictor.explain import Explanation, explain_read_text, join_pieces, patch_maps, target_logprobs
from openblip.predictor.values import MAX_ROWS, EncodedImages, Images, ScoredText, TextInput, chunks, sampling_seeds


class BlipPredictor(BasePredictor):
    """A BLIP ready for use.

    device, dtype: where the model is moved and the precision that it is cast to; None changes nothing.
    """

    model: Blip
    tokenizer: Tokenizer
    calls_by_head: ClassVar = {
        "itc": ("similarity", "embed_images", "embed_texts"),
        "itm": ("match", "match_matrix"),
        "lm": ("caption",),
        "vqa": ("answer",),
        "nlvr": ("judge",),
        "visdial": ("rank_answers",),
        "mlm": (),
        "prefix": ("caption",),
    }
    answer_decoding = Beam(num_beams=3, max_new_tokens=10, min_new_tokens=1)  # released code
    retrieval_text_tokens = 35
    text_feature_heads = ("itc", "visdial")
    multimodal_feature_heads = ("itm", "vqa")
    text_explanation_heads = ("itm", "vqa", "lm")
    caption_explanation_heads = ("lm",)

    def __init__(
        self, checkpoint: BlipCheckpoint, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        checkpoint.model.to(device=device, dtype=dtype)
        config = checkpoint.model.config
        super().__init__(checkpoint, max_positions=config.text.max_positions, embedding_shape=(config.embed_dim,))
        self.encoder_token = checkpoint.encoder_token
        # The same few thousand candidates are read for every batch of questions.
        self._candidate_ids = lru_cache(maxsize=2**16)(self._read_candidate)

    def _image_kv(self, tokens: Tensor, mode: Mode) -> CrossKV:
        """A decoder that continues prefixes writes after an empty one; the words of a prompt are its own first ones."""
        if mode == "decode" and "prefix" in self.model.config.heads:
            empty = self._tokenize([""] * len(tokens), self._encoder_id)
            return self.model.prefix_kv(tokens, empty.ids, empty.mask)
        return self.model.image_kv(tokens, mode)

    def _embed(self, images: EncodedImages) -> Tensor:
        return self.model.embed_image(images.tokens, images.num_frames)

    # Answers (BLIP section 5.3): the decoder attends to the states of the question, read with its image.

    def _write_answers(self, images: EncodedImages, questions: Sequence[str], decoding: Decoding) -> list[ScoredText]:
        question_kv = self._question_kv(images.tokens, self._tokenize_questions(questions))
        times = len(questions) // len(images)
        seeds = sampling_seeds(decoding, len(questions), lambda: zip(images.seeds * times, questions, strict=True))
        start, end_id = self._answer_start(), self.tokenizer.sep_id
        written = generate(self.model, question_kv, start, len(questions), decoding, eos_id=end_id, seeds=seeds)
        return [self._scored(answer) for (answer,) in written]

    def _choose_answers(
        self, images: EncodedImages, questions: Sequence[str], candidates: Sequence[Sequence[str]], num_candidates: int
    ) -> list[ScoredText]:
        question_kv = self._question_kv(images.tokens, self._tokenize_questions(questions))
        settings = {"eos_id": self.tokenizer.sep_id, "num_candidates": num_candidates, "max_rows": MAX_ROWS}
        answers: list[ScoredText] = []
        for texts, group in groupby(range(len(questions)), key=candidates.__getitem__):  # usually all have the same
            rows = list(group)
            rows_kv = self._select(question_kv, rows, len(questions))
            ids = [self._candidate_ids(text) for text in texts]
            ranked = best_candidates(self.model, rows_kv, self._answer_start(), ids, len(rows), **settings)
            answers += [self._scored(generated, texts[position]) for position, generated in ranked]
        return answers

    def _tokenize_questions(self, questions: Sequence[str]) -> Tokens:
        """Questions as training read them (`normalize_question`), on the model's device."""
        return self._tokenize(questions, self._encoder_id, normalize=normalize_question)

    def _question_kv(self, image_tokens: Tensor, questions: Tokens) -> CrossKV:
        """What the decoder writes answers from: R questions, read with B images (B, N, Dv)."""
        image_kv = self.model.image_kv(image_tokens, "encode")
        return self.model.question_kv(questions.ids, questions.mask, image_kv)

    def _answer_start(self) -> Tensor:
        """[DEC] alone, (1,): a captioner's prompt is no part of an answer."""
        return self.tokenizer.prompt("").to(self.device)

    def _read_candidate(self, text: str) -> list[int]:
        """The tokens of a candidate; ConfigError for one that the model cannot read whole."""
        ids: list[int] = self.tokenizer.prompt(text).tolist()[1:]
        most = self._max_positions - 1  # [DEC] stands before it
        if len(ids) > most:
            raise ConfigError(f'The candidate "{text[:60]}..." has {len(ids)} tokens; the model reads at most {most}.')
        return ids

    # Two images (BLIP section 5.4), and dialogs (section 5.5).

    @model_call("judge")
    def judge(self, images: values.ImagePairs, statements: TextInput, batch_size: int | None = None) -> Tensor:
        pairs, is_one_pair = values.read_pairs(images)
        given = values.texts_beside("judge", pairs, statements, ("pair", "statement"), is_one_pair)
        probabilities = [torch.zeros(0)]
        for rows in values.batches(len(given), batch_size, 2):
            sides = [
                self.read_image(image, f"{values.name_or_position(image, at, 'pair')} ({side})")
                for at, pair in enumerate(pairs if is_one_pair else pairs[rows], rows.start)
                for image, side in zip(pair, ("left", "right"), strict=True)
            ]
            pixels = torch.from_numpy(np.stack(sides)).unflatten(0, (-1, 2))  # (B, 2, 3, S, S)
            tokens = self._tokenize(given[rows], self._encoder_id)
            pair_kv = self._image_kv(self.model.encode_pair(self._normalize(pixels)), "encode")
            logits = self.model.judge_logits(tokens.ids, tokens.mask, pair_kv)  # (B, 2)
            probabilities.append(logits.float().softmax(dim=1)[:, 1].cpu())
        return torch.cat(probabilities)

    @model_call("rank_answers")
    def rank_answers(
        self,
        images: Images,
        captions: TextInput,
        dialogs: values.Dialogs,
        candidates: values.Candidates,
        batch_size: int | None = None,
    ) -> Any:
        single, listed, told = values.is_single(images), self._list_images(images), values.as_texts(captions, "caption")
        given: list[Any] = [[each] if single else values.as_list(each) for each in (dialogs, candidates)]
        choices = values.as_lists_of_texts(given[1], len(listed))
        values.check_equal("rank_answers", images=listed, captions=told, dialogs=given[0], candidates=choices)
        rounds = [values.read_dialog(dialog, position) for position, dialog in enumerate(given[0])]
        results: list[Tensor] = []
        for rows, encoded in self.encoded_batches(listed, batch_size):
            tokens = self._tokenize(told[rows], self.tokenizer.cls_id)
            dialog_kv = self.model.dialog_kv(encoded.tokens, tokens.ids, tokens.mask)
            for row, ((earlier, question), answers) in enumerate(zip(rounds[rows], choices[rows], strict=True)):
                row_kv = self._select(dialog_kv, [row], len(encoded))
                probabilities = [torch.zeros(0)]
                for some in chunks(answers, MAX_ROWS // 4):  # dialogs are long
                    turns = [dialog_turns(earlier, question, answer) for answer in some]
                    texts = self.tokenizer.encode_turns(turns, self._max_positions).to(self.device)
                    texts.ids[:, 0] = self._encoder_id
                    probabilities.append(self._match_probability(texts, row_kv))  # (K,)
                results.append(torch.cat(probabilities))
        return results[0] if single else results

    # Features.

    def _features(
        self, images: EncodedImages | None, texts: Sequence[str] | None, batch_size: int | None
    ) -> dict[str, Tensor]:
        heads = set(self.model.config.heads)
        features: dict[str, Tensor] = {}
        if images is not None:
            features["image"] = images.tokens
            if "itc" in heads:
                features["image_projected"] = F.normalize(self.model.project_image(images.tokens).float(), dim=-1)
        if texts is not None:
            # A model that only answers reads texts as questions.
            as_questions = "vqa" in heads and "itm" not in heads
            tokens = self._tokenize_questions(texts) if as_questions else self._tokenize(texts, self.tokenizer.cls_id)
            features["text_mask"], is_real = tokens.mask, tokens.mask[..., None]
            if heads & set(self.text_feature_heads):
                states = self._text_states(tokens, None, batch_size)
                features["text"] = states * is_real
                if "itc" in heads:
                    features["text_projected"] = F.normalize(self.model.project_text(states).float(), dim=-1) * is_real
            if images is not None:
                features["multimodal"] = self._text_states(tokens, images, batch_size) * is_real
        return features

    def _text_states(self, tokens: Tokens, images: EncodedImages | None, batch_size: int | None) -> Tensor:
        """(R, T, D) on the model's device, of texts that are read alone, each with its image, or all with one."""
        ids = tokens.ids.clone()
        ids[:, :1] = self.tokenizer.cls_id if images is None else self._encoder_id
        states = [torch.zeros(0, ids.shape[1], self.model.config.text.hidden_dim, device=self.device)]
        for rows in values.batches(len(ids), batch_size, 1 if images is None else images.num_frames):
            kv = None if images is None else self.model.image_kv(images.beside(rows).tokens, "encode").layers
            states.append(self.model.text(ids[rows], "encode", tokens.mask[rows], kv))
        return torch.cat([part.to(self.dtype) for part in states])

    # Explanations.

    def _recording(self, mode: Mode, layer: int | None) -> tuple[Self, list[Tensor]]:
        """By default in the middle, but not the last layer, where what words see no longer reaches a match's score."""
        view = copy(self)
        num_layers = self.model.config.text.num_layers
        default = max(0, min(num_layers // 2, num_layers - 2))
        view.model, weights = self.model.recording_cross_attention(mode, default if layer is None else layer)
        return view, weights

    def _match_maps(self, image_tokens: Tensor, tokens: Tokens, layer: int | None) -> tuple[Tensor, Tensor]:
        """The logit of "match" is differentiated."""
        view, weights = self._recording("encode", layer)
        logits = view.model.match_logits(tokens.ids, tokens.mask, self.model.image_kv(image_tokens, "encode"))
        return logits, patch_maps(logits[0, 1], weights[0])

    def _explain_answer(self, images: EncodedImages, question: str, layer: int | None) -> Explanation:
        """The answer's log-probability is differentiated, with respect to what the question's words saw."""
        (answer,) = self.answer(images, [question], return_scores=True)
        start = self._answer_start()
        ids = torch.cat([start, torch.tensor(answer.ids, device=self.device)])
        tokens = self._tokenize_questions([question])
        words = join_pieces(self.tokenizer.pieces(tokens.ids[0, 1:-1].tolist()))
        view, weights = self._recording("encode", layer)
        logits = view.model.decode(ids[None, :-1], view._question_kv(images.tokens, tokens))
        score = target_logprobs(logits, answer.ids).sum()
        # The first weights are those of the question: a layer shared with the decoder recorded the answer too.
        return explain_read_text(answer.text, float(score.detach()), words, patch_maps(score, weights[0]))

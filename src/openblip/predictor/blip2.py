"""The predictor of a BLIP-2: its Q-Former matches, embeds and captions; its language model writes.

B images, K texts of each, R = B * K rows of text, N image tokens, Dv their width, Q queries, D width of the Q-Former, T
text tokens, E embedding width, Dl width of the language model, L tokens of a written text, G patches a side, V
vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.data.texts import conversation_prompt, normalize_caption, normalize_question, plain_text
from openblip.data.tokenizer import Tokens
from openblip.errors import ConfigError
from openblip.generation.decoding import Beam, Decoding
from openblip.generation.language import best_texts, write_texts
from openblip.models.blip import CrossKV
from openblip.models.blip2 import Blip2
from openblip.models.gating import ShownExamples
from openblip.models.language_model import IGNORED_LABEL
from openblip.nn.config import Mode
from openblip.predictor import values
from openblip.predictor.base import CHAT_DECODING, BasePredictor, model_call
from openblip.predictor.explain import Explanation, explain_written_text, join_language_pieces, patch_maps
from openblip.predictor.values import MAX_ROWS, EncodedImages, Images, ScoredText, Seeds, sampling_seeds

MAX_SCORED_TOKENS = 128  # of a caption that is scored with its prompt, as many as training reads


class Blip2Predictor(BasePredictor):
    """A BLIP-2 ready for use. Captions are the language model's, where there is one, else the Q-Former's.

    device: where the model goes. dtype: the precision that it takes; in float16 the Q-Former between image encoder and
    language model stays as it is, in float32, as in transformers. None changes nothing.
    """

    model: Blip2
    calls_by_head: ClassVar = {
        "itc": ("similarity", "embed_images", "embed_texts"),
        "itm": ("match", "match_matrix"),
        "itg": ("caption",),
        "llm": ("caption", "answer", "chat"),
    }
    answer_decoding = Beam(num_beams=5, max_new_tokens=10, min_new_tokens=1, length_penalty=-1.0)  # BLIP-2 section 4.1
    retrieval_text_tokens = 32
    text_feature_heads = ("itc",)
    multimodal_feature_heads = ("itm",)
    text_explanation_heads = ("itm", "llm", "itg")
    caption_explanation_heads = ("llm", "itg")

    def __init__(
        self, checkpoint: Blip2Checkpoint, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        model = checkpoint.model.to(device=device)
        narrow = dtype == torch.float16  # which the Q-Former's activations may exceed
        for part in (model.vision, model.language) if narrow else (model,):
            if part is not None:
                part.to(dtype=dtype)
        qformer, embed_dim = model.config.qformer, model.config.embed_dim
        shape = (qformer.num_queries, embed_dim)
        super().__init__(checkpoint, max_positions=qformer.max_positions, embedding_shape=shape)
        self.question_prompt = checkpoint.question_prompt
        self.image_token = checkpoint.image_token
        self._examples: ShownExamples | None = None
        """Images, questions and answers as the language model reads them before each question."""

    def _image_kv(self, tokens: Tensor, mode: Mode) -> CrossKV:
        """The same in both modes: texts reach the image through the queries."""
        return self.model.image_kv(tokens)

    def _embed(self, images: EncodedImages) -> Tensor:
        return self.model.embed_image(self.model.encode_queries(self.model.image_kv(images.tokens)).queries)

    # What the language model writes: captions, answers, and replies in a conversation.

    def _write_captions(
        self, images: EncodedImages, prompts: Sequence[str], decoding: Decoding, num_captions: int, seeds: Seeds
    ) -> list[list[ScoredText]]:
        """By the language model where there is one; prompts may differ between images."""
        if self.model.language is None:
            return super()._write_captions(images, prompts, decoding, num_captions, seeds)
        return self._write(images, prompts, prompts, decoding, num_captions, seeds)

    def _predict_captions(self, images: EncodedImages, prompt: str, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """By the language model where there is one."""
        if self.model.language is None:
            return super()._predict_captions(images, prompt, texts)
        prompts = [prompt] * len(texts)
        language = self.model.require_language()
        with self._shown(images.tokens, prompts) as visual:
            room = getattr(language.model.config, "max_position_embeddings", MAX_SCORED_TOKENS) - visual.shape[1] - 2
            limit = min(room, MAX_SCORED_TOKENS)  # without the end token, and the start that a language model may have
            return language.predict(visual, prompts, list(map(normalize_caption, texts)), limit)

    def _write_answers(self, images: EncodedImages, questions: Sequence[str], decoding: Decoding) -> list[ScoredText]:
        normalized, prompts = self._question_prompts(questions)
        seeds = self._text_seeds(decoding, images, questions)
        return [answer for (answer,) in self._write(images, normalized, prompts, decoding, 1, seeds)]

    def _with_examples(self, examples: Sequence[values.AnsweredQuestion]) -> Self:
        for example in examples:
            if not isinstance(example, tuple) or len(example) != 3 or not all(isinstance(t, str) for t in example[1:]):
                raise ConfigError("Give each of the examples as an image, a question and its answer.")
        images, questions, answers = zip(*examples, strict=True)
        normalized, prompts = self._question_prompts(questions)
        visual = self._visual_prompts(self.encode(list(images)).tokens, normalized)  # (B, Q, Dl)
        language = self.model.require_language()
        parts = list[Tensor]()
        with self.model.attending(visual) as shown:
            for seen, prompt, answer in zip(shown, prompts, answers, strict=True):
                parts += [seen, language.embed_example(prompt, plain_text(answer)).to(seen.dtype)]
        view = copy(self)
        view._examples = ShownExamples(visual, torch.cat(parts))
        return view

    def _text_seeds(self, decoding: Decoding, images: EncodedImages, texts: Sequence[str]) -> Seeds:
        """Seeds of what is written after R = B * K texts, K about each image."""
        times = len(texts) // len(images)
        return sampling_seeds(
            decoding,
            len(texts),
            lambda: (f"{seed},{text}" for seed, text in zip(images.seeds * times, texts, strict=True)),
        )

    def _choose_answers(
        self, images: EncodedImages, questions: Sequence[str], candidates: Sequence[Sequence[str]], num_candidates: int
    ) -> list[ScoredText]:
        normalized, prompts = self._question_prompts(questions)
        language, settings = self.model.require_language(), {"num_candidates": num_candidates, "max_rows": MAX_ROWS}
        with self._shown(images.tokens, normalized) as visual:
            ranked = best_texts(language, visual, prompts, candidates, **settings)
        chosen = zip(ranked, candidates, strict=True)
        return [self._scored(generated, texts[position]) for (position, generated), texts in chosen]

    @model_call("chat")
    def chat(
        self,
        images: Images,
        turns: values.Conversations,
        decoding: Decoding = CHAT_DECODING,
        batch_size: int | None = None,
        return_scores: bool = False,
    ) -> Any:
        single, listed = values.is_single(images), self._list_images(images)
        given: list[Any] = [turns] if single else values.as_list(turns)
        given = given * len(listed) if isinstance(turns, str) else given
        values.check_equal("chat", images=listed, conversations=given)
        conversations = [values.read_conversation(each, position) for position, each in enumerate(given)]
        # Unlike questions to answer, turns are not normalised.
        prompts = [conversation_prompt(self.question_prompt, *conversation) for conversation in conversations]
        replies: list[ScoredText] = []
        for rows, encoded in self.encoded_batches(listed, batch_size):
            questions = [question for _, question in conversations[rows]]
            seeds = self._text_seeds(decoding, encoded, prompts[rows])
            replies += [reply for (reply,) in self._write(encoded, questions, prompts[rows], decoding, 1, seeds)]
        return values.as_asked(replies, return_scores, single)

    def _write(
        self,
        images: EncodedImages,
        instructions: Sequence[str],
        prompts: Sequence[str],
        decoding: Decoding,
        num_texts: int,
        seeds: Seeds,
    ) -> list[list[ScoredText]]:
        """`num_texts` after each of R = B * K prompts; instructions are what the Q-Former reads of them."""
        language = self.model.require_language()
        with self._shown(images.tokens, instructions) as visual:
            written = write_texts(language, visual, prompts, decoding, num_captions=num_texts, seeds=seeds)
        return [[self._scored(text) for text in texts] for texts in written]

    def _question_prompts(self, questions: Sequence[str]) -> tuple[list[str], list[str]]:
        """Questions as the Q-Former reads them, normalised, and the prompts that put them as they are written."""
        prompts = [conversation_prompt(self.question_prompt, (), plain_text(question)) for question in questions]
        return [normalize_question(question) for question in questions], prompts

    def _visual_prompts(self, tokens: Tensor, instructions: Sequence[str]) -> Tensor:
        """What the language model is shown of B images (B, N, Dv) for each of R = B * K texts, (R, Q, Dl).

        instructions: R texts that the Q-Former reads beside its queries, where it was trained so.
        """
        if self.model.config.instructed:
            read, image_kv = self._tokenize(instructions, self._encoder_id, normalize=str), self.model.image_kv(tokens)
            return self.model.visual_prompts(self.model.encode_multimodal(read.ids, read.mask, image_kv))
        prompts = self.model.visual_prompts(self.model.encode_visual(tokens))
        return prompts.repeat_interleave(len(instructions) // len(tokens), dim=0)

    def _shown(self, tokens: Tensor, instructions: Sequence[str]) -> AbstractContextManager[Tensor]:
        """What stands before R = B * K texts, after the examples, as long as the context is open: `Blip2.attending`."""
        return self.model.attending(self._visual_prompts(tokens, instructions), self._examples)

    # Features.

    def _features(
        self, images: EncodedImages | None, texts: Sequence[str] | None, batch_size: int | None
    ) -> dict[str, Tensor]:
        projects = "itc" in self.model.config.heads
        features: dict[str, Tensor] = {}
        if images is not None:
            features |= {"image": images.tokens, "queries": self._queries(images, None, batch_size)}
            if projects:
                features["image_projected"] = self.model.embed_image(features["queries"])
        if texts is not None:
            tokens = self._tokenize(texts, self._encoder_id)
            features["text_mask"], is_real = tokens.mask, tokens.mask[..., None]
            if projects:
                states = self.model.qformer(tokens.ids, mask=tokens.mask[:, None, None, :])  # (T, L, D)
                features["text"] = states * is_real
                features["text_projected"] = F.normalize(self.model.text_proj(states).float(), dim=-1) * is_real
            if images is not None:
                features["multimodal"] = self._queries(images, texts, batch_size)
        return features

    def _queries(self, images: EncodedImages, texts: Sequence[str] | None, batch_size: int | None) -> Tensor:
        """(R, Q, D) on the model's device, of images alone, each with its text, or of one with all texts."""
        queries: list[Tensor] = []
        for rows in values.batches(len(images if texts is None else texts), batch_size, images.num_frames):
            features = images.beside(rows).tokens
            if texts is None:
                queries.append(self.model.encode_visual(features))
            else:
                tokens, image_kv = self._tokenize(texts[rows], self._encoder_id), self.model.image_kv(features)
                queries.append(self.model.encode_multimodal(tokens.ids, tokens.mask, image_kv))
        if not queries:
            return self.model.encode_visual(images.tokens.new_zeros(1, *images.tokens.shape[1:]))[:0]
        return torch.cat(queries)

    # Explanations: the queries look at the image, in a layer with cross-attention, and through them the words.

    def _recording(self, mode: Mode, layer: int | None) -> tuple[Self, list[Tensor]]:
        view = copy(self)
        view.model, weights = self.model.recording_query_attention(layer)
        return view, weights.image

    def _match_maps(self, image_tokens: Tensor, tokens: Tokens, layer: int | None) -> tuple[Tensor, Tensor]:
        """The logit of "match" is differentiated. A text that is matched reads the queries in self-attention: a word's
        map is the sum of theirs, weighted by how much the word attends to each.
        """
        model, weights = self.model.recording_query_attention(layer)
        logits = model.match_logits(tokens.ids, tokens.mask, model.image_kv(image_tokens))
        query_maps = patch_maps(logits[0, 1], weights.image[0])  # (Q, G, G)
        attention = weights.tokens[0].detach().float().mean(dim=1)[0].cpu()  # (Q + T, Q + T)
        text_to_queries = attention[len(query_maps) :, : len(query_maps)]  # (T, Q)
        return logits, torch.einsum("tq,qgh->tgh", text_to_queries, query_maps)

    def _explain_answer(self, images: EncodedImages, question: str, layer: int | None) -> Explanation:
        ((instruction,), (prompt,)) = self._question_prompts([question])
        (written,) = self.answer(images, [question], return_scores=True)
        return self._explain_language(images.tokens, instruction, prompt, written, layer)

    def _explain_language(
        self, image_tokens: Tensor, instruction: str, prompt: str, written: ScoredText, layer: int | None
    ) -> Explanation:
        """The log-probability of each word that the language model has written is differentiated."""
        language = self.model.require_language()
        view, weights = self._recording("decode", layer)
        words = join_language_pieces(language.tokenizer, written.ids)
        with view._shown(image_tokens, [instruction]) as visual:  # (1, Q, Dl)
            predicted = language.predict_ids(visual, [prompt], [written.ids])
        logits = predicted.logits[:, predicted.labels[0] != IGNORED_LABEL]  # (1, L, V)
        return explain_written_text(written.text, written.ids, words, logits, weights[0])

    def _explain_caption(self, images: EncodedImages, text: str | None, layer: int | None) -> Explanation:
        """By the language model where there is one."""
        if self.model.language is None:
            return super()._explain_caption(images, text, layer)
        (written,) = self.caption(images, return_scores=True)
        return self._explain_language(images.tokens, self.prompt, self.prompt, written, layer)

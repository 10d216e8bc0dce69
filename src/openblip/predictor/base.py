"""The calls of every predictor: images and texts in, captions, answers, scores and features out.

`BasePredictor` does what BLIP and BLIP-2 have in common: it reads images, makes batches, checks what it is given, and
puts results in order. What differs between the two models are the methods below "What the models implement", and calls
of one model only.

B images or videos, F frames of a video, S side of a prepared image, N image tokens, Dv their width, I images, T texts
or text tokens, R rows of text, C candidates, Q queries, L text tokens, E embedding width.
"""

import hashlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial, wraps
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor

from openblip.checkpoints.checkpoint import Checkpoint, EncoderToken
from openblip.checkpoints.loading import Format, save_checkpoint
from openblip.checkpoints.state_dict import add_weights
from openblip.data.images import FileInput, FrameReader, ImageInput, Pixels
from openblip.data.reader import num_cores, read_ahead
from openblip.data.texts import normalize_caption
from openblip.data.tokenizer import Tokenizer, Tokens
from openblip.errors import CheckpointError, ConfigError, UnsupportedTaskError
from openblip.generation.decoding import Beam, Decoding, check_decoding
from openblip.generation.search import Generated, generate
from openblip.models.blip import Blip, encode_media, similarity_matrix, similarity_of_pairs
from openblip.models.blip2 import Blip2
from openblip.models.language_model import LanguageModel
from openblip.nn.config import Mode
from openblip.nn.linear import Int8Linear
from openblip.predictor import values
from openblip.predictor.explain import Explanation, explain_read_text, explain_written_text, join_pieces
from openblip.predictor.values import CaptionScore, EncodedImages, Features, Images, ScoredText, TextInput, TextScore
from openblip.text_counts import count_texts, warn_caller

CAPTION_DECODING = Beam(num_beams=3, max_new_tokens=20)
CHAT_DECODING = Beam(num_beams=5, max_new_tokens=30, min_new_tokens=1)  # released code

_Call = TypeVar("_Call", bound=Callable[..., Any])


def model_call(*needed: str) -> Callable[[_Call], _Call]:
    """A call of a predictor, without gradients and with one warning of what is lost of texts. UnsupportedTaskError
    where the checkpoint has no weights for one of the calls `needed`.
    """

    def decorate(call: _Call) -> _Call:
        @count_texts(warn_caller)
        @torch.inference_mode()
        @wraps(call)
        def run(self: "BasePredictor", *arguments: Any, **named: Any) -> Any:
            for name in needed:
                if name not in self.tasks:
                    raise self._unsupported(name)
            return call(self, *arguments, **named)

        return cast(_Call, run)

    return decorate


class BasePredictor(ABC):
    """A checkpoint ready for use. Results do not depend on batch size, order or padding.

    `images` is one image or several, in anything that can be iterated over; or what `prepare`, `encode` or
    `encode_videos` returned. An image is a path or URL, a PIL.Image, encoded bytes, an open binary file, or an array or
    tensor (`data.images.IMAGE_FORMS`). In calls that take pairs of images and texts, one image or text that is not in a
    list goes with all of the other. `batch_size` is the number of images that are encoded at a time; a video counts as
    its frames and a pair as two.

    Texts are read up to the number of positions that the model has. A call warns once, with numbers, of texts that were
    longer and cut, and of words that are not in the vocabulary.

    Every call raises UnsupportedTaskError when the checkpoint has no weights for it, ImageError, which names the image,
    for one that cannot be read, and ConfigError for what is no image or text, and for arguments that do not belong
    together.

    The model is put into eval mode. It is moved and cast only when a device or dtype is given, so a predictor around a
    model in training sees its weights change.
    """

    model: Blip | Blip2
    tokenizer: Tokenizer | None
    encoder_token: EncoderToken = "[CLS]"
    calls_by_head: ClassVar[Mapping[str, tuple[str, ...]]]  # the calls that each head makes possible
    answer_decoding: ClassVar[Beam]  # how answers are written unless the caller says otherwise
    retrieval_text_tokens: ClassVar[int]  # to which the released code cuts the texts of the retrieval benchmark
    # Heads that have taught the model to read texts alone, and together with images; through which a given text, and
    # the model's own caption, can be explained.
    text_feature_heads: ClassVar[tuple[str, ...]]
    multimodal_feature_heads: ClassVar[tuple[str, ...]]
    text_explanation_heads: ClassVar[tuple[str, ...]]
    caption_explanation_heads: ClassVar[tuple[str, ...]]

    def __init__(self, checkpoint: Checkpoint, *, max_positions: int, embedding_shape: tuple[int, ...]) -> None:
        """max_positions: the most tokens of a text that the model takes. embedding_shape: of one image."""
        self._checkpoint = checkpoint
        self.model = checkpoint.model.eval()
        self.tokenizer = checkpoint.tokenizer
        self.preprocessing = checkpoint.preprocessing
        self.prompt = checkpoint.prompt
        self._max_positions, self._embedding_shape = max_positions, embedding_shape
        self.scales_jpegs = False
        """Whether large JPEG files are decoded to a fraction of their size, which is faster; see `read_image`."""

    @property
    def tasks(self) -> frozenset[str]:
        """The calls that this checkpoint has weights for."""
        return frozenset(call for head in self.model.config.heads for call in self.calls_by_head[head])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the image encoder and of encoded images."""
        return next(self.model.vision.parameters()).dtype

    @property
    def precision(self) -> str:
        """`dtype` as users name it, and what "auto" chose: outputs record it."""
        if any(isinstance(module, Int8Linear) for module in self.model.modules()):
            return "int8"
        return str(self.dtype).removeprefix("torch.")

    @property
    def checkpoint(self) -> Checkpoint:
        """What `save` writes: its fields are the predictor's attributes, with their current values."""
        return self._checkpoint._replace(**{name: getattr(self, name) for name in self._checkpoint._fields})

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the results besides weights and vocabularies, ready for json."""
        settings = self.checkpoint._asdict()
        del settings["tokenizer"]
        return {**settings, "model": self.model.config.to_dict(), "preprocessing": asdict(self.preprocessing)}

    @property
    def num_parameters(self) -> int:
        """The number of weights of all parts."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fingerprint(self) -> str:
        """A SHA-256 of the settings, vocabularies and current weights, the same for all formats of a checkpoint."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        with tempfile.TemporaryDirectory() as folder:
            if self.tokenizer is not None:
                self.tokenizer.save(folder)
            if self._language is not None:
                self._language.tokenizer.save_pretrained(Path(folder) / "language_model")
            for vocabulary in sorted(Path(folder).rglob("tokenizer.json")):
                digest.update(vocabulary.read_bytes())
        add_weights(digest, self.model.state_dict())
        return digest.hexdigest()

    def save(self, folder: str | os.PathLike[str], format: Format = "openblip") -> None:
        """Write a checkpoint that `load` reads.

        format: "openblip"; "huggingface", which transformers reads as well; or "original", a .pth file of the released
        code. Raises CheckpointError when the format has no place for these heads, and ConfigError for int8.
        """
        if self.precision == "int8":
            raise ConfigError("These weights were rounded to 8 bits when they were loaded: save a model in float32.")
        save_checkpoint(self.checkpoint, folder, format)

    def encodes_alike(self, other: "BasePredictor") -> bool:
        """Whether `encode` makes the same of images as that of another predictor, so that one result serves both."""
        if other.model is self.model:
            return True
        encoders = [(type(p), p.preprocessing, p.device, p.dtype, p.model.config.vision) for p in (self, other)]
        if encoders[0] != encoders[1]:
            return False
        weights, others = self.model.vision.state_dict(), other.model.vision.state_dict()
        return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)

    def count_tokens(self, texts: TextInput, call: str) -> list[int]:
        """The number of tokens of each text as a call reads it, special tokens included; what the model cuts off is not
        counted. A language model has a vocabulary of its own. UnsupportedTaskError where `call` is not in `tasks`.
        """
        if call not in self.tasks:
            raise self._unsupported(call)
        given = values.as_texts(texts, "text")
        if self._language is not None and call in self.calls_by_head["llm"]:
            return [len(self._language.tokenizer(text).input_ids) for text in given]
        return list(map(int, self._tokenize(given, self._text_tokenizer().cls_id).mask.sum(dim=1).tolist()))

    # Images: prepared on the CPU, encoded on the device.

    def prepare(self, images: ImageInput | Iterable[ImageInput], first: int = 0) -> Tensor:
        """Read and resize images: uint8 (B, 3, S, S) on the CPU.

        ImageError names an image that cannot be read by its path, or by its position counted from `first`.
        """
        items = values.as_list(images)
        with closing(self._prepared_batches(items, [slice(0, len(items))], first=first)) as batches:
            return next(batches)

    def prepare_videos(self, videos: values.Videos, num_frames: int = 8, first: int = 0) -> Tensor:
        """Read and resize frames spread evenly over each video: uint8 (B, F, 3, S, S) on the CPU.

        Raises VideoError for a video that cannot be decoded, named as by `prepare`, and MissingExtraError without PyAV.
        """
        items = values.as_list(videos)
        with closing(self._prepared_batches(items, [slice(0, len(items))], num_frames, first)) as batches:
            return next(batches)

    @property
    def frame_reader(self) -> FrameReader:
        """What reads images and videos for this model; it holds no model, so it may be pickled to another process."""
        return FrameReader(self.preprocessing, self.scales_jpegs)

    def read_image(self, image: ImageInput, name: str | None = None) -> Pixels:
        """As `FrameReader.read_image`."""
        return self.frame_reader.read_image(image, name)

    def read_video(self, video: FileInput, num_frames: int, name: str | None = None) -> Pixels:
        """As `FrameReader.read_video`."""
        return self.frame_reader.read_video(video, num_frames, name)

    def stack(self, pixels: Sequence[Pixels]) -> Tensor:
        """Prepared images or videos as one tensor on the CPU, page-locked where the model is on a GPU: it is copied
        there while the CPU goes on. Without threads of torch, which would take their turns from those of the model.
        """
        side, is_pinned = self.preprocessing.image_size, self.device.type == "cuda"
        shape = pixels[0].shape if pixels else (3, side, side)
        batch = torch.empty((len(pixels), *shape), dtype=torch.uint8, pin_memory=is_pinned)
        for row, each in enumerate(pixels):
            batch.numpy()[row] = each
        return batch

    @torch.inference_mode()
    def encode(self, images: Images, batch_size: int | None = None) -> EncodedImages:
        """Run the image encoder once, for any number of later calls."""
        if isinstance(images, EncodedImages):
            return images
        images = self._list_images(images)
        parts = [encoded for _, encoded in self.encoded_batches(images, batch_size)]
        return EncodedImages.join(parts or [self._encode(images if isinstance(images, Tensor) else self.prepare([]))])

    @torch.inference_mode()
    def encode_videos(self, videos: values.Videos, num_frames: int = 8, batch_size: int | None = None) -> EncodedImages:
        """Encode frames spread evenly over each video; calls take the result as `images`.

        The paper takes 8 frames for retrieval and 16 for questions (BLIP section 5.6). batch_size: frames at a time.
        Raises as `prepare_videos` does.
        """
        videos = values.as_list(videos)
        batches = list(values.batches(max(1, len(videos)), batch_size, max(1, num_frames)))
        with closing(self._prepared_batches(videos, batches, num_frames)) as prepared:
            return EncodedImages.join([self._encode(pixels) for pixels in prepared])

    def encoded_batches(self, images: Images, batch_size: int | None = None) -> Iterator[tuple[slice, EncodedImages]]:
        """Batches of encoded images, each with its rows among all images; a video counts as its frames."""
        items = self._list_images(images)
        if isinstance(items, EncodedImages):
            yield from ((rows, items.part(rows)) for rows in values.batches(len(items), batch_size, items.num_frames))
            return
        num_frames = items.shape[1] if isinstance(items, Tensor) and items.ndim == 5 else 1
        batches = list(values.batches(len(items), batch_size, num_frames))
        given = (items[rows] for rows in batches) if isinstance(items, Tensor) else None
        with closing(given or self._prepared_batches(values.as_list(items), batches)) as prepared:
            for rows in batches:
                yield rows, self._encode(next(prepared))

    # Texts that the model writes.

    @model_call("caption")
    def caption(
        self,
        images: Images,
        prompt: TextInput | None = None,
        decoding: Decoding = CAPTION_DECODING,
        num_captions: int = 1,
        batch_size: int | None = None,
        return_scores: bool = False,
        seeds: values.Seeds = None,
    ) -> Any:
        """Captions: a string per image, or a list of `num_captions` strings if that is more than one.

        prompt: words that the caption continues, the same for all images, a list with one for each, or several for one
        image; None is the checkpoint's own, "" is none. The result is without the prompt. A language model takes any
        instruction as prompt. return_scores: `ScoredText` objects instead of strings. seeds: one integer per image for
        `Nucleus`; by default they come from its seed and the image.
        """
        prompt = self.prompt if prompt is None else prompt
        listed, prompts, single = self._pair("caption", images, prompt, "prompt")
        self._check_length(prompts, decoding, num_captions)
        seeds = None if seeds is None else list(seeds)
        values.check_equal("caption", images=prompts, seeds=prompts if seeds is None else seeds)
        captions: list[list[ScoredText]] = []
        for rows, encoded in self._paired_batches(listed, len(prompts), batch_size):
            if len(encoded) != len(prompts[rows]):
                encoded = encoded.select(torch.zeros(len(prompts[rows]), dtype=torch.int64))
            hashes = partial(getattr, encoded, "seeds")
            row_seeds = values.sampling_seeds(decoding, len(encoded), hashes) if seeds is None else seeds[rows]
            captions += self._write_captions(encoded, prompts[rows], decoding, num_captions, row_seeds)
        results = [values.as_asked(texts, return_scores, single=num_captions == 1) for texts in captions]
        return results[0] if single else results

    @model_call("caption")
    def score_captions(
        self, images: Images, texts: values.Candidates, prompt: str | None = None, batch_size: int | None = None
    ) -> list[list[CaptionScore]]:
        """The log-probability of each given text as what the model writes about its image.

        texts: a list for each image, of any and different lengths, or texts for all images. They are read as training
        reads captions, up to the number of positions that the model has. prompt: what they continue; None is the
        checkpoint's own. Raises CheckpointError when a score is not a number.
        """
        prompt = self.prompt if prompt is None else prompt
        listed = self._list_images(images)
        lists = values.as_lists_of_texts(texts, len(listed))
        values.check_equal("score_captions", images=listed, lists=lists)
        scores: list[list[CaptionScore]] = []
        for rows, encoded in self.encoded_batches(listed, batch_size):
            scores += [[] for _ in lists[rows]]
            for position in range(max(map(len, lists[rows]), default=0)):  # one text of each image at a time
                having = [row for row, image_texts in enumerate(lists[rows]) if len(image_texts) > position]
                given = [lists[rows][row][position] for row in having]
                logits, labels = self._predict_captions(encoded.select(torch.tensor(having)), prompt, given)
                is_predicted = labels >= 0
                chosen = logits.gather(2, labels.clamp(min=0)[..., None]).squeeze(2).float()  # (B, T)
                logprobs = torch.where(is_predicted, chosen - logits.float().logsumexp(dim=2), 0.0).sum(dim=1)
                if not logprobs.isfinite().all():
                    raise CheckpointError("The scores are not numbers (NaN or infinite): the weights are broken.")
                counts = is_predicted.sum(dim=1)
                for row, logprob, count in zip(having, logprobs.tolist(), counts.tolist(), strict=True):
                    scores[rows.start + row].append(CaptionScore(logprob, count))
        return scores

    @model_call("answer")
    def answer(
        self,
        images: Images,
        questions: TextInput,
        candidates: values.Candidates | None = None,
        decoding: Decoding | None = None,
        batch_size: int | None = None,
        return_scores: bool = False,
        num_candidates: int = 128,
        examples: Sequence[values.AnsweredQuestion] = (),
    ) -> Any:
        """Answers, a string per question; questions go with images in pairs, several with one image, or one with all.

        candidates: texts to choose from, for all questions or a list for each, instead of writing freely: the
        `num_candidates` likeliest to begin the answer are compared by their whole log-probability. decoding: by default
        `answer_decoding`. return_scores: `ScoredText` objects instead of strings. examples: images with a question and
        its answer, which a language model reads before each question; a model without one raises `ConfigError`.
        """
        if examples:
            settings: dict[str, Any] = {"candidates": candidates, "decoding": decoding, "batch_size": batch_size}
            settings |= {"return_scores": return_scores, "num_candidates": num_candidates}
            return self._with_examples(examples).answer(images, questions, **settings)
        listed, asked, single = self._pair("answer", images, questions, "question")
        decoding = decoding or self.answer_decoding
        choices = [] if candidates is None else values.check_candidates(candidates, len(asked))
        if candidates is None:
            self._check_length([""], decoding)
        answers: list[ScoredText] = []
        for rows, encoded in self._paired_batches(listed, len(asked), batch_size):
            if candidates is None:
                answers += self._write_answers(encoded, asked[rows], decoding)
            else:
                answers += self._choose_answers(encoded, asked[rows], choices[rows], num_candidates)
        return values.as_asked(answers, return_scores, single)

    def chat(
        self,
        images: Images,
        turns: values.Conversations,
        decoding: Decoding = CHAT_DECODING,
        batch_size: int | None = None,
        return_scores: bool = False,
    ) -> Any:
        """The model's replies, a string for each image.

        turns: the conversation about the image, of which the language model reads all: (question, answer) pairs, and
        last the open question, or that alone; for a list of images a list of them. They are put in the words of the
        checkpoint's `question_prompt`. return_scores: `ScoredText` objects instead of strings.
        """
        raise self._unsupported("chat")

    # How well texts and images fit.

    @model_call("match")
    def match(self, images: Images, texts: TextInput, batch_size: int | None = None) -> Tensor:
        """P(match) of each pair by ITM, float32 (B,) on the CPU; or of one image or text with all of the other."""
        listed, given, _ = self._pair("match", images, texts, "text")
        scores = [torch.zeros(0)]
        for rows, encoded in self._paired_batches(listed, len(given), batch_size):
            tokens = self._tokenize(given[rows], self._encoder_id)
            scores.append(self._match_probability(tokens, self._image_kv(encoded.tokens, "encode")))
        return torch.cat(scores)

    @model_call("match_matrix")
    def match_matrix(
        self, images: Images, texts: TextInput, batch_size: int | None = None, max_text_length: int | None = None
    ) -> Tensor:
        """P(match) of every image with every text by ITM, float32 (I, T) on the CPU.

        max_text_length: tokens to which texts are cut, special ones included; by default all that the model can read.
        """
        texts = values.as_texts(texts, "text")
        tokens = self._tokenize(texts, self._encoder_id, max_text_length)
        by_length = tokens.mask.sum(dim=1).argsort(stable=True)
        scores = [torch.zeros(0, len(texts))]
        for _, encoded in self.encoded_batches(images, batch_size):
            count = len(encoded)
            image_kv = self._image_kv(encoded.tokens, "encode")  # once for all texts
            scores.append(torch.zeros(count, len(texts)))
            for rows in by_length.split(max(1, 4 * values.DEFAULT_BATCH_SIZE // count)) if texts else ():
                part = tokens.part(rows)
                repeated = Tokens(part.ids.repeat(count, 1), part.mask.repeat(count, 1))
                scores[-1][:, rows.cpu()] = self._match_probability(repeated, image_kv).view(count, -1)
        return torch.cat(scores)

    @model_call("similarity")
    def similarity(self, images: Images, texts: TextInput, batch_size: int | None = None) -> Tensor:
        """ITC cosine of every image with every text, float32 (I, T) on the CPU; BLIP-2: of the best query."""
        return similarity_matrix(self.embed_images(images, batch_size), self.embed_texts(texts, batch_size))

    @model_call("embed_images")
    def embed_images(self, images: Images, batch_size: int | None = None) -> Tensor:
        """Unit vectors, float32 on the CPU: (I, E), for BLIP-2 one for each query, (I, Q, E)."""
        vectors = [self._embed(encoded).float().cpu() for _, encoded in self.encoded_batches(images, batch_size)]
        return torch.cat(vectors) if vectors else torch.zeros(0, *self._embedding_shape)

    @model_call("embed_texts")
    def embed_texts(
        self, texts: TextInput, batch_size: int | None = None, max_text_length: int | None = None
    ) -> Tensor:
        """Unit vectors, float32 (T, E) on the CPU. max_text_length: as in `match_matrix`."""
        vectors = [torch.zeros(0, self.model.config.embed_dim)]
        texts = values.as_texts(texts, "text")
        for rows in values.batches(len(texts), batch_size):
            tokens = self._tokenize(texts[rows], self._text_tokenizer().cls_id, max_text_length)
            vectors.append(self.model.embed_text(tokens.ids, tokens.mask).float().cpu())
        return torch.cat(vectors)

    @model_call("match", "similarity")
    def score_texts(
        self, images: Images, texts: values.Candidates, batch_size: int | None = None
    ) -> list[list[TextScore]]:
        """ITM and ITC of the texts of each image; the image is encoded and projected once for all of them.

        texts: a list for each image, of any and different lengths, or texts for all images. An empty text describes
        nothing: it is not shown to the model and scores 0. Raises CheckpointError when a score is not a number.
        """
        listed = self._list_images(images)
        lists = values.as_lists_of_texts(texts, len(listed))
        values.check_equal("score_texts", images=listed, lists=lists)
        scores: list[list[TextScore]] = []
        for rows, encoded in self.encoded_batches(listed, batch_size):
            flat = [text for image_texts in lists[rows] for text in image_texts]  # R
            owners = [image for image, image_texts in enumerate(lists[rows]) for _ in image_texts]
            itm, itc = torch.zeros(len(flat)), torch.zeros(len(flat))
            described = [row for row, text in enumerate(flat) if text.strip()]
            if described:
                tokens = self._tokenize([flat[row] for row in described], self._encoder_id)  # (R', T)
                itm[described], itc[described] = self._score_tokens(tokens, [owners[row] for row in described], encoded)
            if not (itm.isfinite().all() and itc.isfinite().all()):
                raise CheckpointError("The scores are not numbers (NaN or infinite): the weights are broken.")
            flat_scores = map(TextScore, itm.tolist(), itc.tolist())
            scores += [list(islice(flat_scores, len(image_texts))) for image_texts in lists[rows]]
        return scores

    def judge(self, images: values.ImagePairs, statements: TextInput, batch_size: int | None = None) -> Tensor:
        """P(true) of each statement about a (left, right) pair of images, float32 (B,) on the CPU.

        images: one pair or a list of them; one pair goes with all statements, one statement with all pairs. (NLVR2,
        BLIP section 5.4.)
        """
        raise self._unsupported("judge")

    def rank_answers(
        self,
        images: Images,
        captions: TextInput,
        dialogs: values.Dialogs,
        candidates: values.Candidates,
        batch_size: int | None = None,
    ) -> Any:
        """P(right) of every candidate answer: for each image a tensor, float32 (C,) on the CPU.

        Each image has a caption, a dialog and a list of candidates; with one image they are not in lists. A dialog is a
        list of the earlier rounds, each as (question, answer) or in one string, and last the open question. (VisDial,
        BLIP section 5.5.)
        """
        raise self._unsupported("rank_answers")

    # What the model sees.

    @model_call()
    def features(
        self, images: Images | None = None, texts: TextInput | None = None, batch_size: int | None = None
    ) -> Features:
        """The states behind the heads: of images, of texts, or of pairs of both, then also read together. One image
        stays one for several texts, and one text is repeated for several images.
        """
        if images is None and texts is None:
            raise ConfigError("features are those of images, of texts or of both: neither was given.")
        given = None
        if images is None:
            given = values.as_texts(texts, "text")
        elif texts is not None:
            images, given, _ = self._pair("features", images, texts, "text")
        if texts is not None:
            needed = self.text_feature_heads if images is None else self.multimodal_feature_heads
            what = "alone" if images is None else "with images (ask for them apart)"
            self._require_head(
                needed, f"Features of texts {what} need the text encoder of an {' or '.join(needed)} head"
            )
        encoded = None if images is None else self.encode(images, batch_size)
        features = self._features(encoded, given, batch_size)
        return Features(**{name: (x if name == "text_mask" else x.float()).cpu() for name, x in features.items()})

    @count_texts(warn_caller)
    def explain(self, image: Images, text: TextInput | None = None, layer: int | None = None) -> Any:
        """Where in an image the model looked, for each word of a text: an `Explanation`, or for lists a list of them.

        With a text: why it matches the image, where the checkpoint has an ITM head; else its answer, where the
        checkpoint answers questions; else why it is a caption. Without a text: the caption that the model writes.

        BLIP: a word is shown where it looks itself (for an answer, the words of the question), in a layer of the text
        transformer, by default the middle one: in the last, only the first token counts for a match. BLIP-2: the
        queries look, in a layer of the Q-Former with cross-attention, by default the middle one. A word of a match is
        shown where the queries look that it attends to; a word that is written (for an answer, those of the answer),
        where more attention of the queries would make it likelier.

        Raises UnsupportedTaskError for a missing head or an image encoder whose tokens are no grid, and ConfigError for
        a layer that does not exist, a text without words, or a video.
        """
        of_texts, of_captions = self.text_explanation_heads, self.caption_explanation_heads
        self._require_head(
            of_captions if text is None else of_texts,
            f"explain needs one of the heads {', '.join(of_texts)} for a text that is given, and for the model's own "
            f"caption an {' or '.join(of_captions)} head",
        )
        listed, texts, single = self._pair("explain", image, "" if text is None else text, "text")
        encoded = self.encode(listed)
        if encoded.num_frames != 1:
            raise ConfigError("explain takes images, and no video.")
        single = single or (isinstance(text, str | None) and not isinstance(listed, list) and len(encoded) == 1)
        explanations = [
            self._explain(encoded.beside(slice(row, row + 1)), None if text is None else each, layer)
            for row, each in enumerate(texts)
        ]
        return explanations[0] if single else explanations

    def _explain(self, encoded: EncodedImages, text: str | None, layer: int | None) -> Explanation:
        """The explanation of a text with one image, or of the caption that the model writes."""
        with torch.inference_mode(False), torch.enable_grad():
            # A tensor that was made in inference mode cannot be part of a graph.
            encoded = replace(encoded, tokens=encoded.tokens.clone())
            if text is not None and "itm" in self.model.config.heads:
                tokens = self._tokenize([text], self._encoder_id)
                words = join_pieces(self._text_tokenizer().pieces(tokens.ids[0, 1:-1].tolist()))
                logits, maps = self._match_maps(encoded.tokens, tokens, layer)
                return explain_read_text(text, float(logits.detach().float().softmax(dim=1)[0, 1]), words, maps)
            if text is not None and "answer" in self.tasks:
                return self._explain_answer(encoded, text, layer)
            return self._explain_caption(encoded, text, layer)

    # What the models implement.

    @abstractmethod
    def _image_kv(self, tokens: Tensor, mode: Mode) -> Any:
        """Image tokens (B, N, Dv) as the texts attend to them that `self.model` reads or writes."""

    @abstractmethod
    def _embed(self, images: EncodedImages) -> Tensor:
        """Unit vectors (B, E), or (B, Q, E) of a model with queries."""

    @abstractmethod
    def _write_answers(self, images: EncodedImages, questions: Sequence[str], decoding: Decoding) -> list[ScoredText]:
        """An answer to each of R = B * K questions, K about each image."""

    def _with_examples(self, examples: Sequence[values.AnsweredQuestion]) -> Self:
        """This predictor, with examples before every question."""
        raise ConfigError("Examples are for a language model that reads images, of BLIP-2; leave them out.")

    @abstractmethod
    def _choose_answers(
        self, images: EncodedImages, questions: Sequence[str], candidates: Sequence[Sequence[str]], num_candidates: int
    ) -> list[ScoredText]:
        """The likeliest of each question's candidates, of equal ones the first."""

    @abstractmethod
    def _features(
        self, images: EncodedImages | None, texts: Sequence[str] | None, batch_size: int | None
    ) -> dict[str, Tensor]:
        """The fields of `Features` that the model has, of images, texts or pairs of both, in any precision."""

    @abstractmethod
    def _match_maps(self, image_tokens: Tensor, tokens: Tokens, layer: int | None) -> tuple[Tensor, Tensor]:
        """The logits (1, 2) of a match, and where in the image each token of the text looked for them, (T, G, G)."""

    @abstractmethod
    def _explain_answer(self, images: EncodedImages, question: str, layer: int | None) -> Explanation:
        """The explanation of the answer to a question about one image."""

    @abstractmethod
    def _recording(self, mode: Mode, layer: int | None) -> tuple[Self, list[Tensor]]:
        """A predictor around a view of the model that records where texts of `mode`, or the queries, look in a layer:
        weights (1, H, T or Q, N) of each pass. The predictor itself, and its model, do not change.
        """

    # What the calls are made of.

    def _prepared_batches(
        self, items: Sequence[Any], batches: Sequence[slice], num_frames: int | None = None, first: int = 0
    ) -> Generator[Tensor]:
        """Prepared images, or with `num_frames` videos, batch by batch. Threads read and stack the next ones while the
        model works on one.
        """
        if num_frames is not None and num_frames < 1:
            raise ConfigError(f"num_frames is {num_frames}; it must be at least 1.")
        kind = "image" if num_frames is None else "video"

        def read(numbered: tuple[int, Any]) -> Pixels:
            position, item = numbered
            name = values.name_or_position(item, position, kind)
            return self.read_image(item, name) if num_frames is None else self.read_video(item, num_frames, name)

        def groups() -> Generator[list[Pixels]]:
            size = max(rows.stop - rows.start for rows in batches)
            threads = min(num_cores(), len(items))
            with closing(read_ahead(enumerate(items, first), read, num_workers=threads, ahead=2 * size)) as pixels:
                for rows in batches:
                    yield list(islice(pixels, rows.stop - rows.start))

        if len(items) > 1:
            return read_ahead(groups(), self.stack, num_workers=1, ahead=1)
        if items:  # without threads
            return (self.stack([read((first, item))]) for item in items)
        shape = (3, self.preprocessing.image_size, self.preprocessing.image_size)
        return (torch.zeros(0, *filter(None, (num_frames,)), *shape, dtype=torch.uint8) for _ in batches)

    def _list_images(self, images: Images) -> values.ListedImages:
        """The same images, with a length; of tensors only what `prepare` or `prepare_videos` returned stays one."""
        prepared = (torch.uint8, (3, self.preprocessing.image_size, self.preprocessing.image_size))
        if isinstance(images, Tensor) and images.ndim in (4, 5) and (images.dtype, images.shape[-3:]) == prepared:
            return images
        return images if isinstance(images, EncodedImages) else values.as_list(images)

    def _pair(
        self, call: str, images: Images, texts: TextInput, kind: str
    ) -> tuple[values.ListedImages, list[str], bool]:
        """Images and the texts that go with them, as `values.texts_beside` says, and whether one result was asked for,
        and no list. An encoded image is one image.
        """
        single, listed = values.is_single(images), self._list_images(images)
        is_one_image = single or (isinstance(listed, EncodedImages) and len(listed) == 1)
        given = values.texts_beside(call, listed, texts, ("image", kind), is_one_image)
        return listed, given, single and isinstance(texts, str)

    def _paired_batches(
        self, images: values.ListedImages, num_texts: int, batch_size: int | None
    ) -> Iterator[tuple[slice, EncodedImages]]:
        """The rows of texts with their images, as `_pair` gives them; one image is encoded once for all texts."""
        if len(images) == num_texts:
            yield from self.encoded_batches(images, batch_size)
        else:
            once = self.encode(images)
            yield from ((rows, once) for rows in values.batches(num_texts, batch_size))

    def _unsupported(self, call: str) -> UnsupportedTaskError:
        can_do = ", ".join(sorted(self.tasks))
        return UnsupportedTaskError(f"This checkpoint has no weights to {call}; it can do {can_do}.")

    def _require_head(self, needed: Sequence[str], message: str) -> None:
        present = self.model.config.heads
        if not set(needed) & set(present):
            raise UnsupportedTaskError(f"{message}; this checkpoint has {', '.join(present)}.")

    @property
    def _language(self) -> LanguageModel | None:
        """The language model of a BLIP-2 that has one."""
        return self.model.language if isinstance(self.model, Blip2) else None

    @torch.inference_mode()
    def _encode(self, pixels: Tensor) -> EncodedImages:
        """uint8 (B, 3, S, S), or for videos (B, F, 3, S, S)."""
        if not len(pixels):  # an encoder may refuse an empty batch: encode one image and leave it out
            return self._encode(pixels.new_zeros(1, *pixels.shape[1:])).part(slice(0))
        tokens = encode_media(self.model.encode_image, self._normalize(pixels))
        return EncodedImages(tokens, tuple(pixels), num_frames=pixels.shape[1] if pixels.dim() == 5 else 1)

    def _normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (..., 3, S, S) -> the input of the image encoder, on its device."""
        moved = pixels.to(self.device, non_blocking=self.device.type == "cuda")
        return self.preprocessing.normalize(moved).to(self.dtype)

    def _text_tokenizer(self) -> Tokenizer:
        """The model's own vocabulary; UnsupportedTaskError for a BLIP-2 whose Q-Former reads no text."""
        if self.tokenizer is None:
            raise UnsupportedTaskError("The Q-Former of this checkpoint reads no text.")
        return self.tokenizer

    @property
    def _encoder_id(self) -> int:
        """The first token of a text that is read together with an image."""
        tokenizer = self._text_tokenizer()
        return tokenizer.enc_id if self.encoder_token == "[ENC]" else tokenizer.cls_id

    def _tokenize(
        self, texts: Sequence[str], first_id: int, limit: int | None = None, normalize: Any = normalize_caption
    ) -> Tokens:
        """Texts, normalised, from `first_id` on, cut to `limit` or what the model reads; ids (R, T) on its device."""
        limit = min(limit or self._max_positions, self._max_positions)
        tokens = self._text_tokenizer().encode([normalize(text) for text in texts], limit).to(self.device)
        tokens.ids[:, :1] = first_id  # a list of no texts has no first token
        return tokens

    def _check_length(self, prompts: Iterable[str], decoding: Decoding, num_texts: int = 1) -> None:
        """ConfigError unless the strategy writes so many texts, and the decoder has positions for the longest."""
        check_decoding(decoding, num_texts)
        if self._language is not None:
            return  # it checks the length itself, which also depends on its visual prompts
        for prompt in dict.fromkeys(prompts):
            length = len(self._text_tokenizer().prompt(prompt))
            room = self._max_positions - length + 1  # the last token is not read
            if room < decoding.max_new_tokens:
                advice = f"ask for {room} or fewer" if room > 0 else f"give a prompt of less than {self._max_positions}"
                raise ConfigError(
                    f"max_new_tokens {decoding.max_new_tokens} after a prompt of {length} tokens: the model reads at "
                    f"most {self._max_positions}; {advice}."
                )

    def _write_captions(
        self, images: EncodedImages, prompts: Sequence[str], decoding: Decoding, num_captions: int, seeds: values.Seeds
    ) -> list[list[ScoredText]]:
        """`num_captions` for each image, by the model's own decoder, which reads one prompt at a time."""
        tokenizer, image_kv = self._text_tokenizer(), self._image_kv(images.tokens, "decode")
        settings: dict[str, Any] = {"num_captions": num_captions, "eos_id": tokenizer.sep_id}
        captions: list[list[ScoredText]] = [[] for _ in prompts]
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, row_prompt in enumerate(prompts) if row_prompt == prompt]
            rows_kv, ids = self._select(image_kv, rows, len(prompts)), tokenizer.prompt(prompt).to(self.device)
            row_seeds = None if seeds is None else [seeds[row] for row in rows]
            written = generate(self.model, rows_kv, ids, len(rows), decoding, seeds=row_seeds, **settings)
            for row, texts in zip(rows, written, strict=True):
                captions[row] = [self._scored(text) for text in texts]
        return captions

    def _select(self, context_kv: Any, rows: Sequence[int], count: int) -> Any:
        """Keys and values of some of `count` images or questions; of all of them without a copy."""
        if list(rows) == list(range(count)):
            return context_kv
        return context_kv.select(torch.tensor(rows, device=self.device))

    def _scored(self, generated: Generated, text: str | None = None) -> ScoredText:
        """What the language model wrote, or the model's own decoder where there is none; `text` where it is more than
        its tokens decoded.
        """
        writer: Any = self._text_tokenizer() if self._language is None else self._language
        if self._language is None:
            end_id, pieces = writer.sep_id, writer.pieces
        else:
            end_id, pieces = writer.end_id, writer.tokenizer.convert_ids_to_tokens
        logprobs, ids = generated.token_logprobs, generated.ids
        text = writer.decode(ids) if text is None else text
        has_end = len(logprobs) > len(ids)
        ids = [*ids, end_id] if has_end else ids
        return ScoredText(
            text=text,
            logprob=generated.logprob,
            tokens=tuple(pieces(ids)),
            token_logprobs=logprobs,
            ids=tuple(ids),
            has_end=has_end,
        )

    def _predict_captions(self, images: EncodedImages, prompt: str, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) over a text of each image, by the model's own decoder, and what they are to predict, int64
        (B, T), negative where nothing is.
        """
        tokenizer = self._text_tokenizer()
        prompt_ids = tokenizer.prompt(prompt).to(self.device)  # (P,)
        tokens = self._tokenize(texts, tokenizer.cls_id, self._max_positions - len(prompt_ids) + 2)
        ids = torch.cat([prompt_ids.expand(len(texts), -1), tokens.ids[:, 1:]], dim=1)
        logits = self.model.decode(ids[:, :-1], self._image_kv(images.tokens, "decode"))[:, len(prompt_ids) - 1 :]
        return logits, tokens.ids[:, 1:].masked_fill(~tokens.mask[:, 1:], -1)

    def _match_probability(self, tokens: Tokens, image_kv: Any) -> Tensor:
        """P(match) of R texts over B images, float32 (R,) on the CPU."""
        logits = self.model.match_logits(tokens.ids, tokens.mask, image_kv)  # (R, 2)
        return logits.float().softmax(dim=1)[:, 1].cpu()

    def _score_tokens(self, tokens: Tokens, owners: Sequence[int], images: EncodedImages) -> tuple[Tensor, Tensor]:
        """ITM and ITC, float32 (R,) on the CPU, of texts (R, T) and the images that own them; like lengths together."""
        lengths, image_kv = tokens.mask.sum(dim=1), self._image_kv(images.tokens, "encode")
        vectors, itm = torch.zeros(len(owners), self.model.config.embed_dim), torch.zeros(len(owners))
        for rows in lengths.argsort(stable=True).split(values.MAX_ROWS):
            part = tokens.part(rows)
            part.ids[:, 0] = self._text_tokenizer().cls_id
            vectors[rows.cpu()] = self.model.embed_text(part.ids, part.mask).float().cpu()
        for group in values.group_by_count(owners, lengths.tolist()):
            rows = torch.tensor([row for _, image_rows in group for row in image_rows])
            group_kv = self._select(image_kv, [image for image, _ in group], len(images))
            itm[rows] = self._match_probability(tokens.part(rows.to(self.device)), group_kv)
        return itm, similarity_of_pairs(self.embed_images(images)[list(owners)], vectors)

    def _explain_caption(self, images: EncodedImages, text: str | None, layer: int | None) -> Explanation:
        """The explanation of a given caption of one image, or of the one that the model's own decoder writes."""
        tokenizer = self._text_tokenizer()
        prompt_ids: list[int] = tokenizer.prompt(self.prompt).tolist()  # P
        if text is None:
            (caption,) = self.caption(images, return_scores=True)
            text, ids = caption.text, caption.ids
        else:
            ids = (*tokenizer.prompt(text).tolist()[1:], tokenizer.sep_id)  # L, with the end
        words = join_pieces(tokenizer.pieces([i for i in ids if i != tokenizer.sep_id]))
        if len(prompt_ids) + len(ids) - 1 > self._max_positions:
            raise ConfigError(
                f"A text of {len(ids)} tokens with its end, after a prompt of {len(prompt_ids)}: the model reads at "
                f"most {self._max_positions}; give a shorter one."
            )
        image_kv = self._image_kv(images.tokens, "decode")
        view, weights = self._recording("decode", layer)
        logits = view.model.decode(torch.tensor([[*prompt_ids, *ids[:-1]]], device=self.device), image_kv)
        return explain_written_text(text, ids, words, logits[:, len(prompt_ids) - 1 :], weights[0])

"""Cosines of images and texts by any CLIP or SigLIP of transformers: a score that a BLIP's own heads do not give.

B images, T texts, L text tokens, E embedding width.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from openblip.checkpoints.backbones import PathOrName
from openblip.checkpoints.state_dict import ChooseDtype
from openblip.checkpoints.transformers_models import TransformersModel
from openblip.data.images import ImageInput, read_image
from openblip.data.reader import num_cores, read_ahead
from openblip.errors import CheckpointError
from openblip.predictor import values
from openblip.text_counts import count_text, count_texts, warn_caller

_PADDED_ALWAYS = ("siglip", "siglip2")  # trained so: the last position, padding or not, stands for the text


class SimilarityScorer:
    """A model of transformers with an image side and a text side: cosines of their embeddings.

    Results do not depend on batch size, order or padding.
    """

    def __init__(self, loaded: TransformersModel) -> None:
        self.loaded = loaded
        self.model, self.tokenizer = loaded.model, loaded.processor.tokenizer
        config = self.model.config
        positions = getattr(config, "text_config", config).max_position_embeddings
        self._max_text_tokens: int = min(positions, self.tokenizer.model_max_length)
        self._padding = "max_length" if config.model_type in _PADDED_ALWAYS else "longest"

    def read_image(self, image: ImageInput, name: str | None = None) -> Mapping[str, Tensor]:
        """Read one image and make it the input of the image side. Raises `ImageError`, in which `name` stands for it.
        Meant for threads that read ahead: `embed_images` takes what it returns.
        """
        return self.image_reader(read_image(image, name=name))

    @property
    def image_reader(self) -> Callable[[Image.Image], Mapping[str, Tensor]]:
        """What makes an RGB image the input of the image side; it holds no model, so it may be pickled."""
        reader = partial(self.loaded.processor.image_processor, return_tensors="pt")
        return cast(Callable[[Image.Image], Mapping[str, Tensor]], reader)

    @torch.inference_mode()
    def embed_images(
        self, images: Sequence[ImageInput | Mapping[str, Tensor]], batch_size: int | None = None
    ) -> Tensor:
        """Unit vectors, float32 (B, E) on the CPU, of images, or of what `read_image` returned."""
        images, size = list(images), batch_size or values.DEFAULT_BATCH_SIZE

        def read(numbered: tuple[int, Any]) -> Mapping[str, Tensor]:
            position, image = numbered
            if isinstance(image, Mapping):
                return image
            return self.read_image(image, values.name_or_position(image, position, "image"))

        vectors = []
        workers = min(num_cores(), max(1, len(images)))
        with closing(read_ahead(enumerate(images), read, num_workers=workers, ahead=2 * size)) as inputs:
            for _ in values.batches(len(images), batch_size):
                batch = list(islice(inputs, size))
                joined = {name: torch.cat([each[name] for each in batch]).to(self.loaded.device) for name in batch[0]}
                joined["pixel_values"] = joined["pixel_values"].to(self.loaded.dtype)
                vectors.append(_unit_vectors(self.model.get_image_features(**joined)))
        return torch.cat(vectors) if vectors else torch.zeros(0, 0)

    @count_texts(warn_caller)
    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int | None = None) -> Tensor:
        """Unit vectors, float32 (T, E) on the CPU, of texts cut to what the model reads."""
        vectors = []
        for rows in values.batches(len(texts), batch_size):
            vectors.append(_unit_vectors(self.model.get_text_features(**self._tokenize(texts[rows]))))
        return torch.cat(vectors) if vectors else torch.zeros(0, 0)

    @count_texts(warn_caller)
    def score(
        self,
        images: Sequence[ImageInput | Mapping[str, Tensor]],
        texts: Sequence[Sequence[str]],
        batch_size: int | None = None,
    ) -> list[list[float]]:
        """The cosine of each image with each of its texts; an image is embedded once for all of them.

        texts: a list for each image, of any and different lengths. An empty text describes nothing and scores 0. Raises
        CheckpointError when a score is not a number.
        """
        values.check_equal("score", images=images, lists=texts)
        flat = [text for image_texts in texts for text in image_texts]
        owners = [image for image, image_texts in enumerate(texts) for _ in image_texts]
        described = [row for row, text in enumerate(flat) if text.strip()]
        scores = torch.zeros(len(flat))
        if described:
            of_images = self.embed_images(images, batch_size)[[owners[row] for row in described]]  # (T, E)
            of_texts = self.embed_texts([flat[row] for row in described], batch_size)
            scores[described] = (of_images * of_texts).sum(dim=1)
        if not scores.isfinite().all():
            raise CheckpointError("The scores are not numbers (NaN or infinite): the weights are broken.")
        remaining = iter(scores.tolist())
        return [list(islice(remaining, len(image_texts))) for image_texts in texts]

    def fingerprint(self) -> str:
        """A SHA-256 of everything that decides the scores."""
        return self.loaded.fingerprint()

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """ids (T, L) and what else the text side takes, on its device."""
        limit, given = self._max_text_tokens, [text.strip() for text in texts]
        tokens = self.tokenizer(given, padding=self._padding, truncation=True, max_length=limit, return_tensors="pt")
        for text, encoding in zip(given, tokens.encodings or (), strict=bool(tokens.encodings)):
            count_text(
                text,
                num_tokens=encoding.special_tokens_mask.count(0),
                num_unknown=0,
                is_cut=bool(encoding.overflowing),
                limit=limit,
            )
        return {name: tensor.to(self.loaded.device) for name, tensor in tokens.items()}


def _unit_vectors(features: Any) -> Tensor:
    """(N, E), float32 on the CPU; transformers before 5.1 returned the tensor itself."""
    return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1).cpu()


def load_similarity_scorer(source: PathOrName, device: torch.device, dtype: ChooseDtype) -> SimilarityScorer:
    """A scorer around any model of transformers that embeds images and texts, by folder or hub name. dtype: chooses the
    precision by the number of weights. Raises CheckpointError for any other model.
    """
    import transformers

    loaded = TransformersModel.load(source, transformers.AutoModel, device, dtype)
    if not hasattr(loaded.model, "get_image_features") or not hasattr(loaded.model, "get_text_features"):
        kind = loaded.model.config.model_type
        raise CheckpointError(f"{source} is a {kind}, which does not compare images with texts: name a CLIP or SigLIP.")
    return SimilarityScorer(loaded)

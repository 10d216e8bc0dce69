"""A BLIP checkpoint on its device, for the calls of `BlipPredictor`.

B images, N image tokens, Dv their width, R texts, T text tokens, E embedding width.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.data.prompts import MAX_QUESTION_TOKENS, normalize_question
from openblip.data.tokenizer import Tokenizer, Tokens
from openblip.models.blip import Blip, CrossKV
from openblip.models.config import Mode
from openblip.predictor.images import EncodedImages
from openblip.predictor.runtime import DeviceName, Runtime, chosen_device


class BlipRuntime(Runtime):
    """What the calls of a `BlipPredictor` work with."""

    model: Blip
    tokenizer: Tokenizer
    max_match_tokens: ClassVar[int] = 35  # released code: retrieval and matching

    def __init__(
        self, checkpoint: BlipCheckpoint, device: DeviceName = None, dtype: torch.dtype | None = None
    ) -> None:
        self.device = chosen_device(device)
        self.dtype = dtype or torch.float32
        self.model = checkpoint.model.to(self.device, self.dtype).eval()
        self.tokenizer = checkpoint.tokenizer
        self.preprocessing = checkpoint.preprocessing
        self.prompt = checkpoint.prompt
        self.encoder_token = checkpoint.encoder_token

    @property
    def encoder_id(self) -> int:
        return self.tokenizer.enc_id if self.encoder_token == "[ENC]" else self.tokenizer.cls_id

    @property
    def max_positions(self) -> int:
        return self.model.config.text.max_positions

    @property
    def image_shape(self) -> tuple[int, int]:
        vision = self.model.config.vision
        return vision.num_tokens, vision.hidden_dim

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        return (self.model.config.embed_dim,)

    def image_kv(self, tokens: Tensor, mode: Mode) -> CrossKV:
        return self.model.image_kv(tokens, mode)

    def embed(self, encoded: EncodedImages) -> Tensor:
        return self.model.embed_image(encoded.tokens, encoded.num_frames)

    def tokenize_questions(self, questions: Sequence[str]) -> Tokens:
        """Questions as training read them (`normalize_question`), on the model's device."""
        normalized = [normalize_question(question) for question in questions]
        return self.tokens(normalized, MAX_QUESTION_TOKENS, self.encoder_id)

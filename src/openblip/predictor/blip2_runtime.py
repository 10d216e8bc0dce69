"""A BLIP-2 checkpoint on its device, for the calls of `Blip2Predictor`.

B images, R rows of text, N image tokens, Dv their width, Q queries, E embedding width, Dl width of the
language model.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.models.blip2 import Blip2, ImageKV
from openblip.models.config import Mode, VisionConfig
from openblip.predictor.images import EncodedImages
from openblip.predictor.runtime import DeviceName, Runtime, chosen_device

MAX_INSTRUCTION_TOKENS = 128  # InstructBLIP, released code


class Blip2Runtime(Runtime):
    """What the calls of a `Blip2Predictor` work with.

    dtype: of the image encoder and the language model; the Q-Former between them stays in float32.
    """

    model: Blip2
    max_match_tokens: ClassVar[int] = 32  # released code

    def __init__(
        self, checkpoint: Blip2Checkpoint, device: DeviceName = None, dtype: torch.dtype | None = None
    ) -> None:
        self.device = chosen_device(device)
        self.dtype = dtype or torch.float32
        self.model = checkpoint.model.to(self.device).eval()
        self.model.vision.to(self.dtype)
        if self.model.language is not None:
            self.model.language.to(self.dtype)
        self.tokenizer = checkpoint.tokenizer
        self.preprocessing = checkpoint.preprocessing
        self.prompt = checkpoint.prompt
        self.question_prompt = checkpoint.question_prompt

    @property
    def encoder_id(self) -> int:
        return self.require_tokenizer().cls_id

    @property
    def max_positions(self) -> int:
        return self.model.config.qformer.max_positions

    @property
    def image_shape(self) -> tuple[int, int]:
        vision = self.model.config.vision
        return vision.num_tokens if isinstance(vision, VisionConfig) else 0, vision.hidden_dim

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        return self.model.config.qformer.num_queries, self.model.config.embed_dim

    def image_kv(self, tokens: Tensor, mode: Mode) -> ImageKV:
        """The same in both modes: texts reach the image through the queries."""
        return self.model.image_kv(tokens)

    def embed(self, encoded: EncodedImages) -> Tensor:
        return self.model.embed_image(self.model.encode_queries(self.model.image_kv(encoded.tokens)).queries)

    def visual_prompts(self, tokens: Tensor, instructions: Sequence[str]) -> Tensor:
        """What the language model reads of B images (B, N, Dv) before each of R = B * K texts, (R, Q, Dl).

        instructions: R texts that the Q-Former reads beside its queries, where it was trained so.
        """
        image_kv = self.model.image_kv(tokens)
        if self.model.config.instructed:
            read = self.tokens(instructions, MAX_INSTRUCTION_TOKENS, self.encoder_id)
            return self.model.visual_prompts(self.model.encode_multimodal(read.ids, read.mask, image_kv))
        prompts = self.model.visual_prompts(self.model.encode_queries(image_kv).queries)
        return prompts.repeat_interleave(len(instructions) // len(tokens), dim=0)

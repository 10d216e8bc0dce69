"""Two decoders for the loop: a table language model, and transformers' tiny BLIP decoder."""

import torch
from torch import Tensor
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from tiny_blip import Uncached

PAD, EOS, DEC, VOCAB = 0, 2, 3, 24
PROMPT = torch.tensor([DEC])


class Images:
    """Encoded images (B, N, D), selected along B."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def select(self, index: Tensor, /) -> "Images":
        return Images(self.tokens[index])


class TableDecoder(Uncached):
    """Next-token logits read from a table by (image, last two tokens): any probability can be looked up."""

    def __init__(self, seed: int, vocab_size: int = VOCAB, scale: float = 2.0) -> None:
        self.table = torch.randn(64, vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
        self.table[..., EOS] += scale  # or few texts would end before the limit
        self.rows_read: list[int] = []

    def decode(self, ids: Tensor, context_kv: Images) -> Tensor:
        self.rows_read.append(len(ids))
        before = torch.nn.functional.pad(ids, (1, 0))[:, :-1]
        image = context_kv.tokens[:, 0, 0].long().repeat_interleave(len(ids) // len(context_kv.tokens))
        context = (image[:, None] * 7 + before * 3) % 64
        return self.table[context, ids]


class HuggingFaceDecoder(Uncached):
    """transformers' BLIP text decoder behind our interface, recomputing everything at each step."""

    def __init__(self, seed: int) -> None:
        config = BlipTextConfig(
            vocab_size=VOCAB, hidden_size=32, encoder_hidden_size=16, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, bos_token_id=DEC, eos_token_id=EOS, sep_token_id=EOS,
            pad_token_id=PAD, is_decoder=True,
        )  # fmt: skip
        torch.manual_seed(seed)
        self.model = BlipTextLMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(std=0.35) if parameter.dim() > 1 else None
            # The end must compete, or no text would finish before the limit.
            self.model.cls.predictions.bias.zero_()
            self.model.cls.predictions.bias[EOS] += 1.0

    def decode(self, ids: Tensor, context_kv: Images) -> Tensor:
        images = context_kv.tokens.repeat_interleave(len(ids) // len(context_kv.tokens), dim=0)
        mask = torch.ones_like(ids)
        logits: Tensor = self.model(ids, encoder_hidden_states=images, attention_mask=mask, use_cache=False).logits
        return logits

    def generate_there(self, images: Images, prompt: Tensor, **settings: object) -> list[list[int]]:
        """What transformers' own `generate` writes: token lists without prompt, end and padding."""
        ids = prompt.expand(len(images.tokens), -1)
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=images.tokens,
            encoder_attention_mask=torch.ones(images.tokens.shape[:2]), eos_token_id=EOS, pad_token_id=PAD,
            do_sample=False, **settings,
        )  # fmt: skip
        return [until_end(row) for row in output[:, len(prompt) :].tolist()]


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids


def numbered_images(*numbers: int) -> Images:
    """Images for `TableDecoder`, told apart by a number."""
    return Images(torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1))

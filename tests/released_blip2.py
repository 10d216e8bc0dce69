"""LAVIS' BLIP-2 written down once more, tiny and slow: modules with the released names and arithmetic.

Their state dicts are the released layout, and what they compute is what a file means; neither knows our
tables. `saved` keeps of a state dict what LAVIS' runner keeps.

B images, Q queries, T text tokens, S = Q + T, N image tokens, D width, H heads.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer as Words
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn

from tiny_blip import randomise, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCAB_SIZE = TOKENIZER.vocab_size - 1  # without [ENC]
SIZE, PATCH, BLOCKS = 32, 8, 2
EVA_DIM, CLIP_DIM = 176, 128
WIDTH, HEADS, LAYERS, QUERIES, POSITIONS, EMBED_DIM = 128, 2, 4, 5, 30, 10
LANGUAGE_DIM = 16
TEMPERATURE = 0.05
STAGE2 = [("opt", False), ("t5", False), ("t5", True), ("llm", True)]  # and whether it reads instructions
PIXELS = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """(B, T, D) over (B, S, D), mask bool (B, T, S) -> (B, T, D), head by head."""
    width = query.shape[-1] // heads
    outputs = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        outputs.append(scores.softmax(dim=-1) @ value[..., part])
    return torch.cat(outputs, dim=-1)


class EvaAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(EVA_DIM, 3 * EVA_DIM, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(EVA_DIM))
        self.v_bias = nn.Parameter(torch.zeros(EVA_DIM))
        self.proj = nn.Linear(EVA_DIM, EVA_DIM)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        output: Tensor = self.proj(attention(query + self.q_bias, key, value + self.v_bias, EVA_DIM // 88))
        return output


class EvaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(EVA_DIM, eps=1e-6)
        self.attn = EvaAttention()
        self.norm2 = nn.LayerNorm(EVA_DIM, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(EVA_DIM, 100), "fc2": nn.Linear(100, EVA_DIM)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Eva(nn.Module):
    """whole: with the last block, norm and head, which BLIP-2 does not use."""

    def __init__(self, whole: bool = False, size: int = SIZE) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, EVA_DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // PATCH) ** 2 + 1, EVA_DIM))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, EVA_DIM, PATCH, PATCH)})
        self.blocks = nn.ModuleList(EvaBlock() for _ in range(BLOCKS + whole))
        if whole:
            self.norm, self.head = nn.LayerNorm(EVA_DIM), nn.Linear(EVA_DIM, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks[:BLOCKS]:
            x = block(x)
        return x


class ClipBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(CLIP_DIM, CLIP_DIM // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(CLIP_DIM), nn.LayerNorm(CLIP_DIM)
        c_fc, c_proj = nn.Linear(CLIP_DIM, 4 * CLIP_DIM), nn.Linear(4 * CLIP_DIM, CLIP_DIM)
        self.mlp = nn.ModuleDict({"c_fc": c_fc, "c_proj": c_proj})

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class Clip(nn.Module):
    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CLIP_DIM, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(CLIP_DIM))
        self.positional_embedding = nn.Parameter(torch.zeros((SIZE // PATCH) ** 2 + 1, CLIP_DIM))
        self.ln_pre = nn.LayerNorm(CLIP_DIM)
        blocks = nn.Sequential(*(ClipBlock() for _ in range(BLOCKS + whole)))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        if whole:
            self.ln_post = nn.LayerNorm(CLIP_DIM)
            self.proj = nn.Parameter(torch.zeros(CLIP_DIM, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer["resblocks"][:BLOCKS]:
            x = block(x)
        return x


class Output(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(hidden) + x)


class Attention(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        sizes = {"query": WIDTH, "key": context, "value": context}
        self.self = nn.ModuleDict({name: nn.Linear(size, WIDTH) for name, size in sizes.items()})
        self.output = Output(WIDTH)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.self.values()
        return self.output(attention(query(x), key(context), value(context), HEADS, mask), x)


class Layer(nn.Module):
    def __init__(self, index: int, image_dim: int, text: bool) -> None:
        super().__init__()
        self.attention = Attention(WIDTH)
        self.crossattention = Attention(image_dim) if index % 2 == 0 else None
        for ending in ("_query", "") if text else ("_query",):
            setattr(self, f"intermediate{ending}", nn.ModuleDict({"dense": nn.Linear(WIDTH, 90)}))
            setattr(self, f"output{ending}", Output(90))

    def feed_forward(self, x: Tensor, ending: str) -> Tensor:
        hidden = F.gelu(getattr(self, f"intermediate{ending}")["dense"](x))
        return getattr(self, f"output{ending}")(hidden, x)

    def forward(self, x: Tensor, queries: int, image: Tensor | None, mask: Tensor) -> Tensor:
        x = self.attention(x, x, mask)
        query, text = x[:, :queries], x[:, queries:]
        parts = []
        if queries:
            if self.crossattention is not None:
                query = self.crossattention(query, image)
            parts.append(self.feed_forward(query, "_query"))
        if text.shape[1]:
            parts.append(self.feed_forward(text, ""))
        return torch.cat(parts, dim=1)


class Embeddings(nn.Module):
    def __init__(self, text: bool) -> None:
        super().__init__()
        if text:
            self.word_embeddings = nn.Embedding(VOCAB_SIZE, WIDTH)
            self.position_embeddings = nn.Embedding(POSITIONS, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(POSITIONS)[None])


class Bert(nn.Module):
    def __init__(self, image_dim: int, text: bool) -> None:
        super().__init__()
        self.embeddings = Embeddings(text)
        layers = nn.ModuleList(Layer(i, image_dim, text) for i in range(LAYERS))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, queries: Tensor | None, ids: Tensor | None, image: Tensor | None, mask: Tensor) -> Tensor:
        """queries (B, Q, D), ids (B, T), image (B, N, Dv), mask bool (B, S, S) -> (B, S, D)."""
        parts = [] if queries is None else [queries]
        if ids is not None:
            e = self.embeddings
            parts.append(e.word_embeddings(ids) + e.position_embeddings.weight[: ids.shape[1]])
        x = self.embeddings.LayerNorm(torch.cat(parts, dim=1))
        for layer in self.encoder["layer"]:
            x = layer(x, 0 if queries is None else queries.shape[1], image, mask)
        return x


class WordHead(nn.Module):
    """BERT's, its matrix and bias tied."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(VOCAB_SIZE))
        self.transform = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12)})
        self.decoder = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        self.decoder.weight, self.decoder.bias = words.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform["LayerNorm"](F.gelu(self.transform["dense"](x))))


class Released(nn.Module):
    """Stage 1; with a language model stage 2, named `opt`, `t5` or `llm`, and `instructed` or not."""

    def __init__(
        self, encoder: nn.Module, language: nn.Module | None = None, name: str = "", instructed: bool = False
    ) -> None:
        super().__init__()
        image_dim = EVA_DIM if isinstance(encoder, Eva) else CLIP_DIM
        self.ln_vision = nn.LayerNorm(image_dim)
        self.query_tokens = nn.Parameter(torch.zeros(1, QUERIES, WIDTH))
        self.Qformer = nn.ModuleDict({"bert": Bert(image_dim, language is None or instructed)})
        if language is None:
            head = WordHead(self.Qformer["bert"].embeddings.word_embeddings)
            self.Qformer["cls"] = nn.ModuleDict({"predictions": head})
            self.vision_proj, self.text_proj = nn.Linear(WIDTH, EMBED_DIM), nn.Linear(WIDTH, EMBED_DIM)
            self.itm_head = nn.Linear(WIDTH, 2)
            self.temp = nn.Parameter(torch.tensor(TEMPERATURE))
        else:
            self.projection = f"{name}_proj"
            setattr(self, self.projection, nn.Linear(WIDTH, LANGUAGE_DIM))
        randomise(self, seed=0, scale=0.1)
        if language is None:
            self.temp.data.fill_(TEMPERATURE)
        else:
            setattr(self, f"{name}_model", language.requires_grad_(False))
        self.visual_encoder = encoder.requires_grad_(False)

    def read(self, pixels: Tensor, ids: Tensor | None = None, causal: bool = False) -> Tensor:
        """Queries (B, Q, D), and text (B, T) that sees them: itself whole, or only what precedes."""
        image = self.ln_vision(self.visual_encoder(pixels))
        total = QUERIES + (0 if ids is None else ids.shape[1])
        mask = torch.ones(len(pixels), total, total, dtype=torch.bool)
        if causal:
            mask[:, :QUERIES, QUERIES:] = False
            mask[:, QUERIES:, QUERIES:] = torch.ones(total - QUERIES, total - QUERIES).tril().bool()
        return self.Qformer["bert"](self.query_tokens.expand(len(pixels), -1, -1), ids, image, mask)

    def embed_text(self, ids: Tensor) -> Tensor:
        mask = torch.ones(len(ids), ids.shape[1], ids.shape[1], dtype=torch.bool)
        return F.normalize(self.text_proj(self.Qformer["bert"](None, ids, None, mask)[:, 0]), dim=-1)

    def visual_prompts(self, pixels: Tensor, ids: Tensor | None = None) -> Tensor:
        return getattr(self, self.projection)(self.read(pixels, ids)[:, :QUERIES])


def saved(model: nn.Module) -> dict[str, Tensor]:
    """As LAVIS' runner filters: out goes what is a parameter by name and needs no gradient.

    Second names of shared parameters are no parameters by name, and stay.
    """
    needs_gradient = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return {n: t.clone() for n, t in model.state_dict().items() if needs_gradient.get(n, True)}


def encoder_state(kind: type[Eva] | type[Clip]) -> dict[str, Tensor]:
    """The file of a whole image encoder."""
    encoder = kind(whole=True)
    randomise(encoder, seed=3, scale=0.1)
    return encoder.state_dict()


def encoder_of(state: dict[str, Tensor], kind: type[Eva] | type[Clip]) -> nn.Module:
    """The same encoder as BLIP-2 uses it."""
    encoder = kind(whole=True)
    encoder.load_state_dict(state)
    del encoder.get_submodule("blocks" if kind is Eva else "transformer.resblocks")[-1]
    for name in ("norm", "head", "ln_post", "proj"):
        if hasattr(encoder, name):
            delattr(encoder, name)
    return encoder


@cache
def language_words() -> Any:
    """Single characters, with OPT's and T5's special tokens."""
    alphabet = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Words(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def language_model(kind: str, width: int = LANGUAGE_DIM) -> Any:
    """A tiny `opt`, `t5` or `llama` of transformers, embeddings tied."""
    common = {"vocab_size": len(language_words()), "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(4)
    if kind == "t5":
        config: Any = transformers.T5Config(
            **common, d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).eval()
    common |= {"bos_token_id": 1, "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "opt":
        config = transformers.OPTConfig(**common, word_embed_proj_dim=width, ffn_dim=24, dropout=0.0)
        return transformers.OPTForCausalLM(config).eval()
    config = transformers.LlamaConfig(**common, intermediate_size=24)
    return transformers.LlamaForCausalLM(config).eval()


def write(path: Path, model: nn.Module | dict[str, Tensor]) -> Path:
    """A .pth as LAVIS' runner writes it, with its vocabulary beside it."""
    TOKENIZER.save(path.parent)
    state = saved(model) if isinstance(model, nn.Module) else model
    torch.save({"model": state, "optimizer": {"state": {}}, "config": {"run": {}}, "epoch": 3}, path)
    return path


def write_parts(folder: Path) -> Path:
    """The frozen parts, each by itself: Eva.pth, Clip.pth, and folders opt, t5 and llm."""
    for kind in (Eva, Clip):
        torch.save(encoder_state(kind), folder / f"{kind.__name__}.pth")
    for name in ("opt", "t5", "llm"):
        write_language_model(folder / name, language_model(name))
    return folder


def write_language_model(folder: Path, model: Any) -> None:
    model.save_pretrained(folder)
    language_words().save_pretrained(folder)


def stage1(kind: type[Eva] | type[Clip] = Eva) -> Released:
    """Around the encoder of `encoder_state`, as with every stage."""
    return Released(encoder_of(encoder_state(kind), kind)).eval()


def stage2(name: str, instructed: bool = False, kind: type[Eva] | type[Clip] = Eva) -> Released:
    encoder = encoder_of(encoder_state(kind), kind)
    return Released(encoder, language_model(name), name, instructed).eval()

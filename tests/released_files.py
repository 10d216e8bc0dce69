"""Tiny .pth files with the names and shapes of the released ones, their weights random.

Dv image width, D text width.
"""

import torch
from torch import Tensor

from tiny_blip import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IMAGE_DIM, TEXT_DIM, NUM_LAYERS, PATCH, GRID, EMBED_DIM, POSITIONS = 192, 128, 2, 8, 5, 10, 30
VOCAB_SIZE = TOKENIZER.vocab_size
SIZE = PATCH * GRID
TEMPERATURE = 0.05
KINDS = ("pre-trained", "captions", "retrieval", "VQA", "NLVR2")
State = dict[str, Tensor]


def released_file(kind: str, image_dim: int = IMAGE_DIM, seed: int = 0) -> State:
    """The state dict of a released class, training-only state included."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    def linear(name: str, inputs: int, outputs: int) -> State:
        return {f"{name}.weight": random(outputs, inputs), f"{name}.bias": random(outputs)}

    def norm(name: str, width: int) -> State:
        return {f"{name}.weight": 1 + random(width), f"{name}.bias": random(width)}

    def vit(v: str, width: int) -> State:
        state = {f"{v}cls_token": random(1, 1, width), f"{v}pos_embed": random(1, GRID**2 + 1, width)}
        state[f"{v}patch_embed.proj.weight"] = random(width, 3, PATCH, PATCH)
        state[f"{v}patch_embed.proj.bias"] = random(width)
        for i in range(NUM_LAYERS + 1):
            block = f"{v}blocks.{i}."
            state |= norm(f"{block}norm1", width) | norm(f"{block}norm2", width)
            state |= linear(f"{block}attn.qkv", width, 3 * width) | linear(f"{block}attn.proj", width, width)
            state |= linear(f"{block}mlp.fc1", width, 100) | linear(f"{block}mlp.fc2", 100, width)
        return state | norm(f"{v}norm", width)

    def attention(name: str, context_dim: int) -> State:
        state = linear(f"{name}.query", TEXT_DIM, TEXT_DIM)
        return state | linear(f"{name}.key", context_dim, TEXT_DIM) | linear(f"{name}.value", context_dim, TEXT_DIM)

    def bert(t: str, context_dim: int, pair: bool = False) -> State:
        e = f"{t}embeddings."
        state = {f"{e}position_ids": torch.arange(POSITIONS)[None]} | norm(f"{e}LayerNorm", TEXT_DIM)
        state[f"{e}word_embeddings.weight"] = random(VOCAB_SIZE, TEXT_DIM)
        state[f"{e}position_embeddings.weight"] = random(POSITIONS, TEXT_DIM)
        for i in range(NUM_LAYERS):
            layer = f"{t}encoder.layer.{i}."
            state |= attention(f"{layer}attention.self", TEXT_DIM)
            state |= linear(f"{layer}attention.output.dense", TEXT_DIM, TEXT_DIM)
            for k in ("0", "1") if pair else ("",):
                state |= attention(f"{layer}crossattention.self{k}", context_dim)
                state |= linear(f"{layer}crossattention.output.dense{k}", TEXT_DIM, TEXT_DIM)
            if pair and i >= NUM_LAYERS // 2:
                state |= linear(f"{layer}crossattention.output.merge_layer", 2 * TEXT_DIM, TEXT_DIM)
            state |= linear(f"{layer}intermediate.dense", TEXT_DIM, 90) | linear(f"{layer}output.dense", 90, TEXT_DIM)
            for name in ("attention.", "crossattention.", ""):
                state |= norm(f"{layer}{name}output.LayerNorm", TEXT_DIM)
        return state

    state = vit("visual_encoder.", image_dim)
    head, decoder = "text_decoder.cls.predictions.", "text_decoder.bert."
    if kind not in ("captions", "NLVR2"):
        state |= bert("text_encoder.", image_dim)
    if kind in ("pre-trained", "captions", "VQA"):
        state |= bert(decoder, TEXT_DIM if kind == "VQA" else image_dim)
        state |= linear(f"{head}transform.dense", TEXT_DIM, TEXT_DIM) | norm(f"{head}transform.LayerNorm", TEXT_DIM)
        state[f"{head}bias"] = state[f"{head}decoder.bias"] = random(VOCAB_SIZE)
        state[f"{head}decoder.weight"] = state[f"{decoder}embeddings.word_embeddings.weight"]
    if kind in ("pre-trained", "retrieval"):
        state |= linear("itm_head", TEXT_DIM, 2) | {"temp": torch.tensor(TEMPERATURE)}
        for m in ("", "_m"):
            state |= linear(f"vision_proj{m}", image_dim, EMBED_DIM) | linear(f"text_proj{m}", TEXT_DIM, EMBED_DIM)
        state |= vit("visual_encoder_m.", image_dim) | bert("text_encoder_m.", image_dim)
        state |= {"image_queue": random(EMBED_DIM, 8), "text_queue": random(EMBED_DIM, 8)}
        if kind == "retrieval":
            state["idx_queue"] = torch.full((1, 8), -100)
        state["ptr_queue" if kind == "retrieval" else "queue_ptr"] = torch.zeros(1, dtype=torch.long)
    if kind == "pre-trained":  # which ties everything but self-attention, its output and its norm
        for name in list(state):
            if name.startswith("text_encoder.") and ".attention." not in name:
                state[name] = state[name.replace("text_encoder.", decoder)]
    if kind == "NLVR2":
        state |= bert("text_encoder.", image_dim, pair=True)
        state |= linear("cls_head.0", TEXT_DIM, TEXT_DIM) | linear("cls_head.2", TEXT_DIM, 2)
    return state

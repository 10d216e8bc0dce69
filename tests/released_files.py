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


def released_file(kind: str, image_dim: int = IMAGE_DIM, seed: int = 0) -> dict[str, Tensor]:
    """The state dict of a released class, training-only state included."""
    make = _Maker(seed)
    make.vit("visual_encoder.", image_dim)
    if kind in ("pre-trained", "retrieval", "VQA"):
        make.bert("text_encoder.", image_dim)
    if kind in ("pre-trained", "captions", "VQA"):
        make.bert("text_decoder.bert.", TEXT_DIM if kind == "VQA" else image_dim)
        make.words()
    if kind in ("pre-trained", "retrieval"):
        make.matching(image_dim)
        make.training_state(image_dim, kind)
    if kind == "pre-trained":
        make.tie_decoder_to_encoder()
    if kind == "NLVR2":
        make.bert("text_encoder.", image_dim, pair=True)
        make.linear("cls_head.0", TEXT_DIM, TEXT_DIM)
        make.linear("cls_head.2", TEXT_DIM, 2)
    return make.state


class _Maker:
    def __init__(self, seed: int) -> None:
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self.state[f"{name}.weight"] = self.random(outputs, inputs)
        self.state[f"{name}.bias"] = self.random(outputs)

    def norm(self, name: str, width: int) -> None:
        self.state[f"{name}.weight"] = 1 + self.random(width)
        self.state[f"{name}.bias"] = self.random(width)

    def vit(self, v: str, width: int) -> None:
        self.state[f"{v}cls_token"] = self.random(1, 1, width)
        self.state[f"{v}pos_embed"] = self.random(1, GRID**2 + 1, width)
        self.state[f"{v}patch_embed.proj.weight"] = self.random(width, 3, PATCH, PATCH)
        self.state[f"{v}patch_embed.proj.bias"] = self.random(width)
        for i in range(NUM_LAYERS + 1):
            block = f"{v}blocks.{i}."
            self.norm(f"{block}norm1", width)
            self.linear(f"{block}attn.qkv", width, 3 * width)
            self.linear(f"{block}attn.proj", width, width)
            self.norm(f"{block}norm2", width)
            self.linear(f"{block}mlp.fc1", width, 100)
            self.linear(f"{block}mlp.fc2", 100, width)
        self.norm(f"{v}norm", width)

    def bert(self, t: str, context_dim: int, pair: bool = False) -> None:
        e = f"{t}embeddings."
        self.state[f"{e}position_ids"] = torch.arange(POSITIONS)[None]
        self.state[f"{e}word_embeddings.weight"] = self.random(VOCAB_SIZE, TEXT_DIM)
        self.state[f"{e}position_embeddings.weight"] = self.random(POSITIONS, TEXT_DIM)
        self.norm(f"{e}LayerNorm", TEXT_DIM)
        for i in range(NUM_LAYERS):
            layer = f"{t}encoder.layer.{i}."
            self.attention(f"{layer}attention.self", TEXT_DIM)
            self.linear(f"{layer}attention.output.dense", TEXT_DIM, TEXT_DIM)
            self.norm(f"{layer}attention.output.LayerNorm", TEXT_DIM)
            for k in ("0", "1") if pair else ("",):
                self.attention(f"{layer}crossattention.self{k}", context_dim)
                self.linear(f"{layer}crossattention.output.dense{k}", TEXT_DIM, TEXT_DIM)
            if pair and i >= NUM_LAYERS // 2:
                self.linear(f"{layer}crossattention.output.merge_layer", 2 * TEXT_DIM, TEXT_DIM)
            self.norm(f"{layer}crossattention.output.LayerNorm", TEXT_DIM)
            self.linear(f"{layer}intermediate.dense", TEXT_DIM, 90)
            self.linear(f"{layer}output.dense", 90, TEXT_DIM)
            self.norm(f"{layer}output.LayerNorm", TEXT_DIM)

    def attention(self, name: str, context_dim: int) -> None:
        self.linear(f"{name}.query", TEXT_DIM, TEXT_DIM)
        self.linear(f"{name}.key", context_dim, TEXT_DIM)
        self.linear(f"{name}.value", context_dim, TEXT_DIM)

    def words(self) -> None:
        head = "text_decoder.cls.predictions."
        self.linear(f"{head}transform.dense", TEXT_DIM, TEXT_DIM)
        self.norm(f"{head}transform.LayerNorm", TEXT_DIM)
        self.state[f"{head}bias"] = self.random(VOCAB_SIZE)
        self.tie_words()

    def tie_words(self) -> None:
        head = "text_decoder.cls.predictions."
        self.state[f"{head}decoder.bias"] = self.state[f"{head}bias"]
        words = "text_decoder.bert.embeddings.word_embeddings.weight"
        self.state[f"{head}decoder.weight"] = self.state[words]

    def tie_decoder_to_encoder(self) -> None:
        """As pre-training does: everything but self-attention, its output and its norm."""
        for name in list(self.state):
            if name.startswith("text_encoder.") and ".attention." not in name:
                self.state[name] = self.state[name.replace("text_encoder.", "text_decoder.bert.")]
        self.tie_words()

    def matching(self, image_dim: int) -> None:
        self.linear("vision_proj", image_dim, EMBED_DIM)
        self.linear("text_proj", TEXT_DIM, EMBED_DIM)
        self.linear("itm_head", TEXT_DIM, 2)
        self.state["temp"] = torch.tensor(TEMPERATURE)

    def training_state(self, image_dim: int, kind: str) -> None:
        self.vit("visual_encoder_m.", image_dim)
        self.bert("text_encoder_m.", image_dim)
        self.linear("vision_proj_m", image_dim, EMBED_DIM)
        self.linear("text_proj_m", TEXT_DIM, EMBED_DIM)
        self.state["image_queue"] = self.random(EMBED_DIM, 8)
        self.state["text_queue"] = self.random(EMBED_DIM, 8)
        if kind == "retrieval":
            self.state["idx_queue"] = torch.full((1, 8), -100)
        pointer = "ptr_queue" if kind == "retrieval" else "queue_ptr"
        self.state[pointer] = torch.zeros(1, dtype=torch.long)

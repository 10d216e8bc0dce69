"""Every kind of BLIP once as others compute it and once as we do, on the same images and texts.

B images, T tokens. Scores are floats of any shape; texts are ids without end.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from released_reference import as_transformers, nlvr_prediction, vqa_logits
from torch import Tensor

import openblip
import released_files
from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.data.tokenizer import Tokens
from openblip.generation.search import generate
from tiny_blip import random_pixels, randomise, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SIZE, MAX_TOKENS = 40, 6
PIXELS = random_pixels(3, size=SIZE)
PAIRS = random_pixels(6, seed=1, size=SIZE).unflatten(0, (3, 2))
TEXTS = TOKENIZER.encode(["a red dog", "two blue cars beside a tree", "a green bird"])
QUESTIONS = TOKENIZER.encode(["is a dog red?", "what is below the big tree?", "a bird?"])
DECODINGS = {
    "greedy": (openblip.Greedy(max_new_tokens=MAX_TOKENS), {"num_beams": 1}),
    "beam": (openblip.Beam(num_beams=3, max_new_tokens=MAX_TOKENS), {"num_beams": 3}),
}


@dataclass
class Outputs:
    """What a model says: scores by name, texts by decoding."""

    scores: dict[str, Tensor] = field(default_factory=dict)
    texts: dict[str, list[list[int]]] = field(default_factory=dict)


def assert_same(found: Outputs, expected: Outputs) -> None:
    assert found.scores.keys() >= expected.scores.keys() != set()
    for name, scores in expected.scores.items():
        assert scores.std() > 1e-3, name  # something is compared
        torch.testing.assert_close(found.scores[name], scores, atol=1e-5, rtol=0, msg=name)
    for name, texts in expected.texts.items():
        assert found.texts[name] == texts
        assert len({tuple(text) for text in texts}) > 1


def from_token(tokens: Tokens, first: int) -> Tensor:
    ids = tokens.ids.clone()
    ids[:, 0] = first
    return ids


CAPTION_IDS = from_token(TEXTS, TOKENIZER.dec_id)
GROUNDED_IDS = from_token(TEXTS, TOKENIZER.enc_id)
QUESTION_IDS = from_token(QUESTIONS, TOKENIZER.enc_id)


@torch.no_grad()
def our_outputs(checkpoint: BlipCheckpoint, encoder_id: int = TOKENIZER.enc_id) -> Outputs:
    """All that the model's heads can say."""
    model, out = checkpoint.model, Outputs()
    heads = set(model.config.heads)
    images = model.encode_image(PIXELS)
    if "itc" in heads:
        cosine = model.embed_image(images) @ model.embed_text(TEXTS.ids, TEXTS.mask).T
        out.scores["itc"] = cosine / model.temperature if model.config.pooled else cosine
    if "itm" in heads:
        ids = from_token(TEXTS, encoder_id)
        out.scores["itm"] = model.match_logits(ids, TEXTS.mask, model.image_kv(images, "encode"))
    if "lm" in heads:
        kv = model.image_kv(images, "decode")
        out.scores["lm"] = model.decode(CAPTION_IDS, kv)[TEXTS.mask]
        out.texts = {name: _ours(model, kv, 3, decoding) for name, (decoding, _) in DECODINGS.items()}
    if "vqa" in heads:
        kv = model.question_kv(from_token(QUESTIONS, encoder_id), QUESTIONS.mask, model.image_kv(images, "encode"))
        out.scores["vqa"] = model.decode(CAPTION_IDS, kv)[TEXTS.mask]
        out.texts = {name: _ours(model, kv, 3, decoding) for name, (decoding, _) in DECODINGS.items()}
    if "nlvr" in heads:
        kv = model.image_kv(model.encode_pair(PAIRS), "encode")
        out.scores["nlvr"] = model.judge_logits(GROUNDED_IDS, TEXTS.mask, kv)
    return out


def _ours(model: Any, kv: Any, count: int, decoding: Any) -> list[list[int]]:
    prompt = torch.tensor([TOKENIZER.dec_id])
    texts = generate(model, kv, prompt, count, decoding, eos_id=TOKENIZER.sep_id)
    return [text.ids for (text,) in texts]


@torch.no_grad()
def their_outputs(theirs: Any, encoder_id: int = TOKENIZER.enc_id, texts: bool = True) -> Outputs:
    """What a class of transformers says of the same; writing texts takes it a while."""
    out, mask = Outputs(), TEXTS.mask.long()
    match type(theirs).__name__:
        case "BlipForConditionalGeneration":
            logits = theirs(PIXELS, CAPTION_IDS, attention_mask=mask).logits
            out.scores["lm"] = logits[TEXTS.mask]
            for name, (_, settings) in DECODINGS.items() if texts else ():
                ids = theirs.generate(pixel_values=PIXELS, max_new_tokens=MAX_TOKENS, **settings)
                out.texts[name] = [_until_end(row) for row in ids.tolist()]
        case "BlipForImageTextRetrieval":
            scores = theirs(TEXTS.ids, PIXELS, attention_mask=mask, use_itm_head=False)
            out.scores["itc"] = scores["itm_score"]
            ids = from_token(TEXTS, encoder_id)
            out.scores["itm"] = theirs(ids, PIXELS, attention_mask=mask, use_itm_head=True)["itm_score"]
        case "BlipForQuestionAnswering":
            _answers(theirs, encoder_id, out, texts)
        case "BlipModel":
            out.scores["itc"] = theirs(TEXTS.ids, PIXELS, attention_mask=mask).logits_per_image
    return out


def _answers(theirs: Any, encoder_id: int, out: Outputs, texts: bool) -> None:
    """One question at a time: transformers' answers read the padding of shorter questions too."""
    ids, rows = from_token(QUESTIONS, encoder_id), []
    out.texts = {name: [] for name in DECODINGS if texts}
    for i, length in enumerate(QUESTIONS.mask.sum(dim=1).tolist()):
        question, pixels = ids[i : i + 1, :length], PIXELS[i : i + 1]
        states = theirs.text_encoder(question, encoder_hidden_states=theirs.vision_model(pixels)[0])[0]
        logits = theirs.text_decoder(CAPTION_IDS[i : i + 1], encoder_hidden_states=states).logits
        rows.append(logits[0][TEXTS.mask[i]])
        for name in out.texts:
            settings = DECODINGS[name][1]
            answer = theirs.generate(question, pixels, max_new_tokens=MAX_TOKENS, **settings)
            out.texts[name].append(_until_end(answer[0].tolist()))
    out.scores["vqa"] = torch.cat(rows)


def _until_end(row: list[int]) -> list[int]:
    row = row[1:]  # [DEC]
    return row[: row.index(TOKENIZER.sep_id)] if TOKENIZER.sep_id in row else row


@torch.no_grad()
def released_outputs(kind: str, state: dict[str, Tensor], texts: bool = True) -> Outputs:
    """What the released code says with a .pth's tensors: by transformers' classes where there is one."""
    if kind == "NLVR2":
        return Outputs({"nlvr": nlvr_prediction(state, PAIRS, GROUNDED_IDS, TEXTS.mask)})
    image_dim, text_dim = len(state["visual_encoder.norm.bias"]), released_files.TEXT_DIM
    if kind == "VQA" and image_dim != text_dim:
        logits = vqa_logits(state, PIXELS, QUESTION_IDS, QUESTIONS.mask, CAPTION_IDS, TEXTS.mask)
        return Outputs({"vqa": logits[TEXTS.mask]})
    out = Outputs()
    for class_name in RELEASED_AS[kind]:
        theirs = getattr(transformers, class_name)(released_config(image_dim)).eval()
        renamed = as_transformers(state)
        theirs.load_state_dict({name: renamed[name] for name in theirs.state_dict()})
        found = their_outputs(theirs, texts=texts)
        out.scores |= found.scores
        out.texts |= found.texts
    return out


RELEASED_AS = {
    "pre-trained": ("BlipForConditionalGeneration", "BlipForImageTextRetrieval"),
    "captions": ("BlipForConditionalGeneration",),
    "retrieval": ("BlipForImageTextRetrieval",),
    "VQA": ("BlipForQuestionAnswering",),
}


def released_config(image_dim: int) -> transformers.BlipConfig:
    """transformers' settings for `released_file`."""
    text_dim = released_files.TEXT_DIM
    return transformers.BlipConfig(
        vision_config={
            "hidden_size": image_dim, "intermediate_size": 100, "num_attention_heads": image_dim // 64,
            "num_hidden_layers": released_files.NUM_LAYERS + 1, "image_size": SIZE,
            "patch_size": released_files.PATCH, "layer_norm_eps": 1e-6,
        },
        text_config={
            "vocab_size": released_files.VOCAB_SIZE, "hidden_size": text_dim, "intermediate_size": 90,
            "num_hidden_layers": released_files.NUM_LAYERS, "num_attention_heads": text_dim // 64,
            "max_position_embeddings": released_files.POSITIONS, **_special_tokens(),
        },
        image_text_hidden_size=released_files.EMBED_DIM,
    )  # fmt: skip


def unusual_config(text_dim: int = 24, image_dim: int = 36) -> transformers.BlipConfig:
    """Three heads, an odd grid of 5, more rows than words, epsilons of its own."""
    return transformers.BlipConfig(
        vision_config={
            "hidden_size": image_dim, "intermediate_size": 52, "num_hidden_layers": 3,
            "num_attention_heads": 3, "image_size": SIZE, "patch_size": 8, "layer_norm_eps": 1e-3,
        },
        text_config={
            "vocab_size": TOKENIZER.vocab_size + 3, "hidden_size": text_dim, "intermediate_size": 44,
            "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 30,
            "layer_norm_eps": 1e-2, **_special_tokens(),
        },
        image_text_hidden_size=10,
        projection_dim=14,
    )  # fmt: skip


def _special_tokens() -> dict[str, int]:
    return {
        "pad_token_id": TOKENIZER.pad_id,
        "bos_token_id": TOKENIZER.dec_id,
        "sep_token_id": TOKENIZER.sep_id,
        "eos_token_id": TOKENIZER.sep_id,
    }


CLASSES: dict[str, Callable[[], transformers.BlipConfig]] = {
    "BlipForConditionalGeneration": unusual_config,
    "BlipForImageTextRetrieval": unusual_config,
    "BlipForQuestionAnswering": lambda: unusual_config(text_dim=36),  # it knows no other width
    "BlipModel": unusual_config,
}


def their_model(class_name: str, seed: int = 4) -> Any:
    """A random model of one of transformers' classes."""
    theirs = getattr(transformers, class_name)(CLASSES[class_name]()).eval()
    randomise(theirs, seed)
    if class_name == "BlipModel":
        theirs.logit_scale.data.fill_(1.5)
    return theirs


def write_theirs(folder: Path, class_name: str, **settings: Any) -> Any:
    """A random model of one of transformers' classes, saved as a folder with its tokenizer."""
    theirs = their_model(class_name)
    theirs.save_pretrained(folder, **settings)
    TOKENIZER.save(folder)
    return theirs


def loaded_by_them(class_name: str, folder: Path) -> Any:
    """What transformers makes of a folder; it must find exactly its weights there."""
    theirs, report = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return theirs.eval()

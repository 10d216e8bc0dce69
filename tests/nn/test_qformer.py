"""The Q-Former: one masked pass against its fast paths, a plain rewrite and transformers' own.

R rows, Q queries, T text tokens, N image tokens, Dv image width.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

from openblip.nn import qformer as qformer_module
from openblip.nn.attention import DecodingCache, SelfAttentionCache
from openblip.nn.config import QFormerConfig
from openblip.nn.qformer import QFormer, generation_mask, matching_mask, without_padding
from tiny_blip import contrastive_mask, gradients, randomise, saved_bytes

QUERIES, IMAGE_DIM, TOKENS = 3, 10, 6
TINY = QFormerConfig(
    num_queries=QUERIES, hidden_dim=16, num_layers=4, num_heads=2, mlp_dim=24, vocab_size=30,
    max_positions=12, dropout=0.0,
)  # fmt: skip
KINDS = [contrastive_mask, matching_mask, generation_mask]


def qformer(*, has_text_branch: bool = True, has_lm_head: bool = True, **changes: Any) -> QFormer:
    model = QFormer(
        replace(TINY, **changes),
        context_dim=IMAGE_DIM,
        has_text_branch=has_text_branch,
        has_lm_head=has_lm_head and has_text_branch,
    )
    randomise(model, seed=0, scale=0.15)
    return model.eval()


def images(count: int) -> Tensor:
    """float (B, N, Dv)."""
    return torch.randn(count, 5, IMAGE_DIM, generator=torch.Generator().manual_seed(1))


def texts(rows: int, tokens: int = TOKENS) -> Tensor:
    """int64 (R, T)."""
    return torch.randint(0, TINY.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(2))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Of states, which a norm keeps near one."""
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


class PlainQFormer:
    """The Q-Former slow and obvious: one row, one head, one token at a time (BLIP-2 section 3.1).

    weights: those of a `QFormer` by name, in any precision; they are used in float64."""

    def __init__(self, weights: dict[str, Tensor], num_heads: int, eps: float) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.num_heads = num_heads
        self.eps = eps
        self.num_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))

    def read(self, ids: list[int], image: Tensor, may_attend: Tensor) -> Tensor:
        """States (S, D) of queries and ids, which see image tokens (N, Dv) and what a mask (S, S) allows."""
        queries = self.weights["embeddings.queries"][0]
        words = [
            self.weights["embeddings.word.weight"][token] + self.weights["embeddings.position.weight"][place]
            for place, token in enumerate(ids)
        ]
        states = [self.norm("embeddings.norm", token) for token in [*queries, *words]]
        for number in range(self.num_layers):
            states = self.layer(f"layers.{number}", states, len(queries), image.double(), may_attend)
        return torch.stack(states)

    def layer(
        self, name: str, states: list[Tensor], num_queries: int, image: Tensor, may_attend: Tensor
    ) -> list[Tensor]:
        query, key, value = self.parts(f"{name}.self_attention.branch.qkv", 3)
        attended = []
        for place, state in enumerate(states):
            seen = [other for column, other in enumerate(states) if may_attend[place, column]]
            mixed = self.attend(query(state), [key(s) for s in seen], [value(s) for s in seen])
            attended.append(self.after(f"{name}.self_attention", state, mixed))
        results = []
        for place, state in enumerate(attended):
            is_query = place < num_queries
            if is_query and f"{name}.cross_attention.norm.weight" in self.weights:
                (ask,) = self.parts(f"{name}.cross_attention.branch.query", 1)
                key, value = self.parts(f"{name}.cross_attention.branch.key_value", 2)
                mixed = self.attend(ask(state), [key(patch) for patch in image], [value(patch) for patch in image])
                state = self.after(f"{name}.cross_attention", state, mixed)
            kind = f"{name}.{'query' if is_query else 'text'}_feed_forward"
            inner = self.linear(f"{kind}.branch.0", state)
            gelu = inner * 0.5 * (1.0 + torch.erf(inner / math.sqrt(2.0)))
            results.append(self.norm(f"{kind}.norm", state + self.linear(f"{kind}.branch.2", gelu)))
        return results

    def attend(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Each head's mean of the values (D,), weighted by a softmax of scaled products."""
        width = len(query) // self.num_heads
        heads = []
        for start in range(0, len(query), width):
            part = slice(start, start + width)
            scores = torch.stack([query[part] @ key[part] for key in keys]) / math.sqrt(width)
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(weight * value[part] for weight, value in zip(weights, values, strict=True)))
        return torch.cat(heads)

    def after(self, name: str, state: Tensor, mixed: Tensor) -> Tensor:
        """BERT's residual: the norm comes last."""
        return self.norm(f"{name}.norm", state + self.linear(f"{name}.branch.out", mixed))

    def parts(self, name: str, count: int) -> list[Callable[[Tensor], Tensor]]:
        """The projections that one of our linear layers holds, one below the other."""
        weights = self.weights[f"{name}.weight"].chunk(count)
        biases = self.weights[f"{name}.bias"].chunk(count)
        return [lambda x, w=w, b=b: w @ x + b for w, b in zip(weights, biases, strict=True)]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        unit = centred / torch.sqrt((centred**2).mean() + self.eps)
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_gives_what_a_plain_rewrite_gives(kind: Any, every: int) -> None:
    model, ids, tokens = qformer(cross_attention_every=every), texts(2), images(2)
    plain = PlainQFormer(dict(model.state_dict()), TINY.num_heads, TINY.layer_norm_eps)
    mask = kind(QUERIES, TOKENS)
    found = model(ids, model.image_kv(tokens), mask=mask)
    for row in range(2):
        expected = plain.read(ids[row].tolist(), tokens[row], mask)
        torch.testing.assert_close(found[row].double(), expected, atol=1e-5, rtol=1e-5)


def hugging_face(has_text_branch: bool) -> Blip2QFormerModel:
    config = Blip2QFormerConfig(
        vocab_size=TINY.vocab_size, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=24, encoder_hidden_size=IMAGE_DIM, max_position_embeddings=12,
        use_qformer_text_input=has_text_branch, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Blip2QFormerModel(config).eval()


def copy_weights(ours: QFormer, theirs: Blip2QFormerModel) -> None:
    """By hand, as REFERENCE tells the names; every weight of theirs must be met."""
    found = {"layernorm": ours.embeddings.norm}
    for number, layer in enumerate(ours.layers):
        name = f"encoder.layer.{number}"
        attention = [("attention", layer.self_attention), ("crossattention", layer.cross_attention)]
        for part, residual in attention:
            if residual is not None:
                found[f"{name}.{part}.output.dense"] = residual.branch.out
                found[f"{name}.{part}.output.LayerNorm"] = residual.norm
        for suffix, residual in [("_query", layer.query_feed_forward), ("", layer.text_feed_forward)]:
            if residual is not None:
                found[f"{name}.intermediate{suffix}.dense"] = residual.branch[0]
                found[f"{name}.output{suffix}.dense"] = residual.branch[2]
                found[f"{name}.output{suffix}.LayerNorm"] = residual.norm
    weights = {
        f"{name}.{leaf}": tensor for name, module in found.items() for leaf, tensor in module.state_dict().items()
    }
    for number, layer in enumerate(ours.layers):
        name = f"encoder.layer.{number}"
        for leaf in ("weight", "bias"):
            three = getattr(layer.self_attention.branch.qkv, leaf).chunk(3)
            for part, tensor in zip(("query", "key", "value"), three, strict=True):
                weights[f"{name}.attention.attention.{part}.{leaf}"] = tensor
            if layer.cross_attention is not None:
                cross = layer.cross_attention.branch
                two = getattr(cross.key_value, leaf).chunk(2)
                for part, tensor in zip(("query", "key", "value"), (getattr(cross.query, leaf), *two), strict=True):
                    weights[f"{name}.crossattention.attention.{part}.{leaf}"] = tensor
    theirs.load_state_dict({name: tensor.detach() for name, tensor in weights.items()}, strict=True)


@torch.no_grad()
def test_queries_alone_are_those_of_transformers() -> None:
    ours, theirs = qformer(has_text_branch=False), hugging_face(has_text_branch=False)
    copy_weights(ours, theirs)
    tokens = images(3)
    found = ours(image_kv=ours.image_kv(tokens))
    queries = ours.embeddings.queries.expand(3, -1, -1)
    expected = theirs(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    close(found, expected, 1e-5)


@torch.no_grad()
def test_queries_with_text_are_those_of_transformers() -> None:
    ours, theirs = qformer(), hugging_face(has_text_branch=True)
    copy_weights(ours, theirs)
    embeddings = Blip2TextEmbeddings(theirs.config)
    embeddings.word_embeddings.weight.copy_(ours.embeddings.word.weight)
    embeddings.position_embeddings.weight.copy_(ours.embeddings.position.weight)
    ids, tokens = texts(3), images(3)
    real = torch.arange(TOKENS) < torch.tensor([TOKENS, 2, 4])[:, None]
    found = ours(ids, ours.image_kv(tokens), mask=without_padding(matching_mask(QUERIES, TOKENS), real))
    expected = theirs(
        query_embeds=embeddings(ids, query_embeds=ours.embeddings.queries.expand(3, -1, -1)),
        query_length=QUERIES,
        attention_mask=torch.cat([torch.ones(3, QUERIES), real], dim=1),
        encoder_hidden_states=tokens,
    ).last_hidden_state
    seen = torch.cat([torch.ones(3, QUERIES, dtype=torch.bool), real], dim=1)
    close(found[seen], expected[seen], 1e-5)


def fast(kind: Any, model: QFormer, ids: Tensor, kv: Any) -> Tensor:
    """What a mask gives, without the mask: its parts one after another."""
    if kind is contrastive_mask:
        return torch.cat([model(image_kv=kv), model(ids)], dim=1)
    cache = SelfAttentionCache(TINY.num_layers)
    queries = model(image_kv=kv, cache=cache)
    return torch.cat([queries, model(ids, causal=True, cache=cache)], dim=1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [contrastive_mask, generation_mask])
def test_parts_one_after_another_give_what_the_masked_pass_gives(kind: Any, checkpointing: bool) -> None:
    """The values, and the gradients of every parameter and of the image."""
    results = []
    for joint in (True, False):
        model = qformer(activation_checkpointing=checkpointing and not joint).train().double()
        ids, tokens = texts(2), images(2).double().requires_grad_()
        kv = model.image_kv(tokens)
        states = model(ids, kv, mask=kind(QUERIES, TOKENS)) if joint else fast(kind, model, ids, kv)
        words = model.predict_words(states[:, QUERIES:])
        (states.sin().sum() + words.sin().sum()).backward()
        results.append({"states": states.detach(), "image": tokens.grad, **gradients(model)})
    for name, expected in results[0].items():
        assert expected is not None
        assert expected.any(), name
        torch.testing.assert_close(results[1][name], expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", [contrastive_mask, generation_mask])
def test_parts_agree_in_float32_too(kind: Any) -> None:
    model, ids = qformer(), texts(2)
    kv = model.image_kv(images(2))
    close(fast(kind, model, ids, kv), model(ids, kv, mask=kind(QUERIES, TOKENS)))


@torch.no_grad()
@pytest.mark.parametrize("steps", [[1] * TOKENS, [2, 1, 3], [TOKENS]])
def test_cached_steps_give_what_the_masked_pass_gives(steps: list[int]) -> None:
    """In slots of a buffer with room to spare, whose mask says what is there."""
    model, ids = qformer(), texts(2)
    kv = model.image_kv(images(2))
    joint = model(ids, kv, mask=generation_mask(QUERIES, TOKENS))
    cache, slots = DecodingCache(TINY.num_layers, QUERIES + TOKENS + 2), torch.arange(QUERIES + TOKENS + 2)
    found = [model(image_kv=kv, mask=(slots < QUERIES)[None], cache=cache.at(slots[:QUERIES]))]
    for positions, part in zip(torch.arange(TOKENS).split(steps), ids.split(steps, dim=1), strict=True):
        own = QUERIES + positions
        found.append(model(part, mask=slots <= own[:, None], cache=cache.at(own), positions=positions))
    close(torch.cat(found, dim=1), joint)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_a_row(kind: Any) -> None:
    model, ids, tokens = qformer(), texts(3), images(3)
    lengths = [TOKENS, 2, 4]
    real = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
    mask = without_padding(kind(QUERIES, TOKENS), real)
    padded = model(ids, model.image_kv(tokens), mask=mask)
    other = model(ids.masked_fill(~real, 7), model.image_kv(tokens), mask=mask)
    for row, length in enumerate(lengths):
        kv = model.image_kv(tokens[row : row + 1])
        alone = model(ids[row : row + 1, :length], kv, mask=kind(QUERIES, length))
        close(padded[row, : QUERIES + length], alone[0])
        assert torch.equal(padded[row, : QUERIES + length], other[row, : QUERIES + length])


def reach(kind: Any) -> tuple[Tensor, Tensor]:
    """Which tokens a change of a text token reaches, bool (T, S), and which one of the image, bool (S,)."""
    model, ids, tokens = qformer(), texts(1), images(1)
    mask = kind(QUERIES, TOKENS)

    def read(ids: Tensor, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            states: Tensor = model(ids, model.image_kv(tokens), mask=mask)
        return states[0]

    before = read(ids, tokens)
    by_text = []
    for place in range(TOKENS):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % TINY.vocab_size
        by_text.append((read(changed, tokens) != before).any(dim=-1))
    return torch.stack(by_text), (read(ids, tokens + 1.0) != before).any(dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_information_flows_only_where_the_mask_lets_it(kind: Any) -> None:
    """Through all layers: nothing leaks by way of a third token."""
    by_text, by_image = reach(kind)
    assert torch.equal(by_text.T, kind(QUERIES, TOKENS)[:, QUERIES:])
    assert by_image[:QUERIES].all()
    assert by_image[QUERIES:].all() == (kind is not contrastive_mask)
    assert by_image[QUERIES:].any() == (kind is not contrastive_mask)


def test_several_texts_of_an_image_are_consecutive_rows() -> None:
    model, ids, tokens = qformer(), texts(6), images(2)
    mask = matching_mask(QUERIES, TOKENS)
    folded = model(ids, model.image_kv(tokens), mask=mask)
    copied = model(ids, model.image_kv(tokens.repeat_interleave(3, dim=0)), mask=mask)
    close(folded, copied)
    assert not torch.allclose(folded[2], folded[3], atol=1e-2)


def test_checkpointing_keeps_fewer_activations_also_of_queries_that_are_cached() -> None:
    def saved(model: QFormer) -> int:
        return saved_bytes(lambda: fast(generation_mask, model, texts(2), model.image_kv(images(2))))

    plain, checkpointed = (qformer(activation_checkpointing=on).train() for on in (False, True))
    assert saved(checkpointed) < saved(plain) / 2


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_noise_in_training_only(training: bool) -> None:
    model = qformer(dropout=0.5).train(training)
    kv = model.image_kv(images(1))
    assert torch.equal(model(texts(1), kv), model(texts(1), kv)) != training


def test_a_text_longer_than_the_positions_is_refused() -> None:
    model = qformer()
    kv = model.image_kv(images(1))
    assert model(texts(1, 12), kv).shape == (1, QUERIES + 12, 16)
    with pytest.raises(ValueError, match="A text of 13 tokens: the model has 12 positions"):
        model(texts(1, 13), kv)


def test_a_model_without_text_says_so() -> None:
    model = qformer(has_text_branch=False)
    with pytest.raises(KeyError, match="has no text branch"):
        model(texts(1), model.image_kv(images(1)))
    with pytest.raises(KeyError, match="has no ITG head"):
        model.predict_words(torch.zeros(1, 2, 16))
    assert not any("text" in name or "word" in name for name, _ in model.named_parameters())


def drawing() -> Tensor:
    """The three masks of the docstring, bool (3, 6, 6): three queries, then three tokens."""
    lines = [line.split() for line in (qformer_module.__doc__ or "").splitlines()]
    rows = [line for line in lines if len(line) == 9 and set("".join(line)) <= set("QT#.")]
    assert [line[0::3] for line in rows] == [["Q"] * 3] * 3 + [["T"] * 3] * 3
    cells = [[list(line[3 * kind + 1] + line[3 * kind + 2]) for line in rows] for kind in range(3)]
    return torch.tensor([[[cell == "#" for cell in row] for row in kind] for kind in cells])


def test_masks_are_what_is_drawn() -> None:
    assert torch.equal(torch.stack([kind(3, 3) for kind in KINDS]), drawing())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_queries", "num_tokens"), [(2, 5), (4, 1), (3, 0)])
def test_other_sizes_follow_the_same_rule(kind: object, num_queries: int, num_tokens: int) -> None:
    found = kind(num_queries, num_tokens)  # type: ignore[operator]
    size = num_queries + num_tokens
    for row in range(size):
        for column in range(size):
            row_is_text, column_is_text = row >= num_queries, column >= num_queries
            expected = {
                contrastive_mask: row_is_text == column_is_text,
                matching_mask: True,
                generation_mask: not column_is_text or (row_is_text and column <= row),
            }[kind]
            assert found[row, column].item() is expected
    assert found.shape == (size, size)
    assert found.dtype == torch.bool


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_hidden_from_all_and_nothing_else(kind: object) -> None:
    texts = torch.tensor([[True, True, False], [True, True, True]])
    mask = kind(2, 3)  # type: ignore[operator]
    found = without_padding(mask, texts)
    assert found.shape == (2, 1, 5, 5)
    assert not found[0, 0, :, 4].any()
    assert torch.equal(found[0, 0, :, :4], mask[:, :4])
    assert torch.equal(found[1, 0], mask)
    assert without_padding(mask, texts.to("meta")).device.type == "meta"

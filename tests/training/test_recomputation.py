"""Blocks are computed again in the backward pass, frozen ones in eval mode too, and nothing else changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_sharded import trainer
from tiny_frozen import SIZE, pairs_at, stage1, stage2, texts_at, tiny_opt
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from openblip.models.blip import Blip
from openblip.tasks.base import Task
from openblip.training.sharding import find_stacks, recompute_activations
from tiny_blip import TINY, gradients, random_pixels, random_tokens, randomise

ALL = slice(0, 4)


@contextmanager
def passes(*modules: nn.Module) -> Iterator[list[int]]:
    """How often each module's first linear layer is computed, by forward passes and recomputations.

    Not the last: recomputation stops when it has all that the backward pass needs.
    """
    counts = [0] * len(modules)
    handles = []
    for i, module in enumerate(modules):
        linear = next(part for part in module.modules() if isinstance(part, nn.Linear))

        def count(*_: Any, i: int = i) -> None:
            counts[i] += 1

        handles.append(linear.register_forward_hook(count))
    yield counts
    for handle in handles:
        handle.remove()


def loss_of(task: Task, batch: Any) -> Tensor:
    torch.manual_seed(0)
    return torch.stack(list(task(batch, 0, torch.Generator().manual_seed(0)).values())).sum()


def bytes_kept(task: Task, batch: Any) -> int:
    """What the forward pass leaves for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in task.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(task, batch)  # alive to the end, so that no address is given twice
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("lora", [False, True])
def test_a_frozen_language_model_is_computed_twice_and_keeps_less(lora: bool) -> None:
    """transformers' own switch leaves blocks in eval mode alone."""
    usual, recomputed = stage2(lora=lora, dropout=0.1).train(), stage2(lora=lora, dropout=0.1).train()
    recompute_activations(recomputed)
    batch = texts_at(0, ALL)
    blocks = find_stacks(recomputed.get_submodule("model.language"))[0].blocks
    assert not any(block.training for block in blocks)  # of adapters, dropout alone trains
    with passes(*blocks) as counts:
        loss = loss_of(recomputed, batch)
        assert counts == [1, 1]
        loss.backward()
        assert counts == [2, 2]
    expected = loss_of(usual, batch)
    expected.backward()
    assert torch.equal(loss, expected)
    for name, gradient in gradients(usual).items():
        found = gradients(recomputed)[name]
        assert (gradient is None) == (found is None), name
        assert gradient is None or torch.equal(gradient, found), name
    assert bytes_kept(recomputed, batch) < 0.7 * bytes_kept(usual, batch)


def test_without_gradients_nothing_is_computed_twice_and_texts_are_written_alike() -> None:
    usual, recomputed = stage2(), stage2()
    recompute_activations(recomputed)
    blocks = find_stacks(recomputed)[0].blocks
    with torch.no_grad(), passes(*blocks) as counts:
        loss_of(recomputed, texts_at(0, ALL))
        assert counts == [1, 1]
    visual = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    written = [
        task.get_submodule("model.language").generate(visual, ["", "a dog"], max_new_tokens=5)
        for task in (usual, recomputed)
    ]
    assert written[0] == written[1]


def test_the_qformer_is_computed_twice_also_where_it_reads_a_cache() -> None:
    """ITC's and ITM's texts, and ITG, which goes on from the queries' keys and values."""
    usual, recomputed = stage1().train(), stage1().train()
    recompute_activations(recomputed)
    layers = [recomputed.get_submodule(f"model.qformer.layers.{i}") for i in range(2)]
    batch = pairs_at(0, ALL)
    with passes(*layers) as counts:
        loss = loss_of(recomputed, batch)
        forwards = list(counts)
        loss.backward()
    assert counts == [2 * forward for forward in forwards]
    expected = loss_of(usual, batch)
    expected.backward()
    assert torch.equal(loss, expected)
    for name, gradient in gradients(usual).items():
        found = gradients(recomputed)[name]
        assert gradient is None or (found is not None and torch.equal(gradient, found)), name


def test_every_transformer_of_blip_is_computed_twice() -> None:
    model = Blip(TINY)
    randomise(model, seed=0)
    recompute_activations(model.train())
    parts = [model.vision.blocks[0], model.text.layers[0]]
    with passes(*parts) as counts:
        tokens = random_tokens([5, 4])
        image, text = model.encode_image(random_pixels(2)), model.embed_text(tokens.ids, tokens.mask)
        assert counts == [1, 1]
        (image.sum() + text[:, 0].sum()).backward()
        assert counts == [2, 2]


def test_a_run_recomputes_where_its_config_says_so(tmp_path: Path) -> None:
    losses = []
    for recompute in (False, True):
        task = stage2()
        run = trainer(tmp_path / str(recompute), task, steps=1, activation_checkpointing=recompute)
        with passes(*find_stacks(task)[0].blocks) as counts:
            run.run()
        assert counts == [4, 4] if recompute else [2, 2]  # two micro-batches
        losses.append((tmp_path / str(recompute) / "metrics.jsonl").read_text().split('"samples')[0])
    assert losses[0] == losses[1]


def tiny(kind: str) -> Any:
    """A language model of another architecture, with its number of blocks."""
    small = {"vocab_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    match kind:
        case "t5":
            config: Any = transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
            return transformers.T5ForConditionalGeneration(config), 4
        case "bart":
            names = ("encoder", "decoder")
            sizes = {f"{n}_{k}": v for n in names for k, v in (("layers", 2), ("attention_heads", 2))}
            config = transformers.BartConfig(vocab_size=20, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes)
            return transformers.BartForConditionalGeneration(config), 4
        case "gpt2":
            config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2)
            return transformers.GPT2LMHeadModel(config), 2
        case "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, intermediate_size=24)), 2
        case "clip":
            del small["vocab_size"]
            config = transformers.CLIPVisionConfig(**small, intermediate_size=24, image_size=SIZE, patch_size=8)
            return transformers.CLIPVisionModel(config), 2
        case _:
            return tiny_opt(lora=True), 2


@pytest.mark.parametrize("kind", ["opt with lora", "gpt2", "llama", "t5", "bart", "clip"])
def test_blocks_of_any_architecture_are_found(kind: str) -> None:
    """Blocks and nothing else: no embeddings, no part of a block."""
    model, number = tiny(kind)
    (stack,) = find_stacks(nn.ModuleDict({"within": model}))
    assert len(stack.blocks) == number
    held = [id(parameter) for block in stack.blocks for parameter in block.parameters()]
    assert len(held) == len(set(held))
    assert all(id(parameter) in set(held) for name, parameter in model.named_parameters() if ".1." in name)
    assert type(stack.model) is type(model.model if kind == "opt with lora" else model)

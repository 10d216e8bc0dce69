"""The vision transformer: positions, stochastic depth, activation checkpointing, and the forms of it."""

import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor, nn

from openblip.nn.config import VisionConfig
from openblip.nn.vit import DropPath, QuickGELU, VisionTransformer, interpolate_positions, sine_positions
from tiny_blip import randomise, saved_bytes


def vit(**changes: object) -> VisionTransformer:
    config = VisionConfig(image_size=24, patch_size=8, hidden_dim=16, num_layers=3, num_heads=2, mlp_dim=32)
    model = VisionTransformer(replace(config, **changes))
    randomise(model, seed=0)
    return model


def pictures(count: int, size: int = 24) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def cubic(x: float, a: float = -0.75) -> float:
    """The kernel of bicubic convolution (Keys 1981), with the coefficient that torch uses."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic_by_loops(square: Tensor, grid: int) -> Tensor:
    """(G0, G0, D) -> (grid, grid, D): pixel centres at half integers, borders repeated."""
    old = square.shape[0]
    result = torch.zeros(grid, grid, square.shape[2], dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            y, x = (row + 0.5) * old / grid - 0.5, (column + 0.5) * old / grid - 0.5
            top, left = int(y // 1), int(x // 1)
            for i in range(top - 1, top + 3):
                for j in range(left - 1, left + 3):
                    weight = cubic(y - i) * cubic(x - j)
                    result[row, column] += weight * square[min(max(i, 0), old - 1), min(max(j, 0), old - 1)]
    return result


@pytest.mark.parametrize("grid", [3, 6, 7])
def test_positions_are_resized_bicubically_with_the_class_token_kept(grid: int) -> None:
    positions = torch.randn(1, 26, 4, generator=torch.Generator().manual_seed(0))
    found = interpolate_positions(positions, grid)
    assert interpolate_positions(positions, 5) is positions
    assert found.shape == (1, grid * grid + 1, 4)
    torch.testing.assert_close(found[:, 0], positions[:, 0], atol=0, rtol=0)
    expected = bicubic_by_loops(positions[0, 1:].view(5, 5, 4).double(), grid)
    torch.testing.assert_close(found[0, 1:].view(grid, grid, 4).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_patch_and_its_position_belong_together() -> None:
    """The token of a patch carries that patch: row-major, after the class token."""
    model = vit(num_layers=0).eval()
    first, second = pictures(1), pictures(1)
    second[:, :, 8:16, 16:24] += 1.0  # row 1, column 2 of 3 x 3
    changed = (model(first) != model(second)).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 + 1 * 3 + 2]


@pytest.mark.parametrize(("height", "width"), [(24, 16), (20, 20)])
def test_pictures_of_other_sizes_are_encoded_where_patches_tile_them(height: int, width: int) -> None:
    assert vit()(pictures(2)).shape == (2, 10, 16)
    assert vit()(pictures(2, size=40)).shape == (2, 26, 16)
    with pytest.raises(ValueError, match=f"An image of {height}x{width}: patches of 8"):
        vit()(torch.zeros(1, 3, height, width))


def test_drop_path_drops_whole_samples_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.3)
    dropped = layer(torch.ones(20_000, 2, 3))
    kept = dropped[:, 0, 0] != 0
    assert torch.equal(dropped, kept[:, None, None] * torch.full((20_000, 2, 3), 1 / 0.7))
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.015)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)


def test_drop_path_rises_linearly_and_is_the_identity_in_eval() -> None:
    model, plain = vit(drop_path=0.9).eval(), vit(drop_path=0.0).eval()
    torch.testing.assert_close(model(pictures(2)), plain(pictures(2)), atol=0, rtol=0)
    # it rises linearly to the last layer
    rates = [block.drop_path.probability for block in vit(drop_path=0.1, num_layers=5).blocks]
    assert rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])
    assert [block.drop_path.probability for block in vit(drop_path=0.1, num_layers=1).blocks] == [0.0]


def test_activation_checkpointing_changes_nothing_but_memory() -> None:
    results = []
    for checkpointing in (False, True):
        model = vit(drop_path=0.5, activation_checkpointing=checkpointing).train()
        torch.manual_seed(3)
        output = model(pictures(4))
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, atol=0, rtol=0)
    plain, checkpointed = (vit(activation_checkpointing=on).train() for on in (False, True))
    assert saved_bytes(lambda: checkpointed(pictures(4))) < saved_bytes(lambda: plain(pictures(4))) / 2


def test_sines_tell_every_place_apart_and_how_far_two_are() -> None:
    positions = sine_positions(7, 40)[0]
    assert not positions[0].any()  # the class token is nowhere
    square = positions[1:].view(7, 7, 40)
    nearest = torch.cdist(positions[1:], positions[1:]).fill_diagonal_(float("inf")).min()
    assert nearest > 2.0
    down, right = square[1:] - square[:-1], square[:, 1:] - square[:, :-1]
    assert not down[..., 20:].any()  # one half is the row's
    assert not right[..., :20].any()  # the other the column's
    torch.testing.assert_close(down.norm(dim=-1), down[:1, :1].norm(dim=-1).expand(6, 7))
    # any width is filled
    assert sine_positions(3, 10).shape == (1, 10, 10)
    assert not sine_positions(3, 10)[..., 8:].any()


def clip() -> transformers.CLIPVisionModel:
    config = transformers.CLIPVisionConfig(
        image_size=24, patch_size=8, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    model = transformers.CLIPVisionModel(config).eval()
    randomise(model, seed=4)
    return model


def copy_clip(theirs: nn.Module, ours: VisionTransformer) -> None:
    """As many of its layers as ours has; every weight of ours must be met."""
    given = dict(theirs.state_dict())
    weights = {
        "patch_embedding.weight": given["embeddings.patch_embedding.weight"],
        "class_token": given["embeddings.class_embedding"].view(1, 1, -1),
        "position_embedding": given["embeddings.position_embedding.weight"][None],
    }
    names = {"input_norm": "pre_layrnorm"}
    for number in range(len(ours.blocks)):
        block, layer = f"blocks.{number}", f"encoder.layers.{number}"
        names |= {
            f"{block}.attention_norm": f"{layer}.layer_norm1",
            f"{block}.attention.out": f"{layer}.self_attn.out_proj",
            f"{block}.mlp_norm": f"{layer}.layer_norm2",
            f"{block}.mlp.0": f"{layer}.mlp.fc1",
            f"{block}.mlp.2": f"{layer}.mlp.fc2",
        }
        for leaf in ("weight", "bias"):
            parts = [given[f"{layer}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            weights[f"{block}.attention.qkv.{leaf}"] = torch.cat(parts)
    for name, other in names.items():
        weights |= {f"{name}.{leaf}": given[f"{other}.{leaf}"] for leaf in ("weight", "bias")}
    ours.load_state_dict(weights)


@torch.no_grad()
def test_features_before_clips_last_block_are_those_of_transformers() -> None:
    theirs = clip()
    ours = vit(layer_norm_eps=1e-5, activation="quick_gelu", input_norm=True, output_norm=False).eval()
    copy_clip(getattr(theirs, "vision_model", theirs), ours)
    expected = theirs(pixel_values=pictures(2), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(ours(pictures(2)), expected, atol=1e-5, rtol=1e-5)


def test_quick_gelu_is_not_gelu() -> None:
    x = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(QuickGELU()(x), transformers.activations.ACT2FN["quick_gelu"](x))
    assert (QuickGELU()(x) - nn.GELU()(x)).abs().max() > 0.01


def test_what_is_left_out_has_no_weights_and_does_nothing() -> None:
    names = set(vit().state_dict())
    assert set(vit(output_norm=False).state_dict()) == names - {"norm.weight", "norm.bias"}
    with_input_norm = names - {"patch_embedding.bias"} | {"input_norm.weight", "input_norm.bias"}
    assert set(vit(input_norm=True).state_dict()) == with_input_norm
    plain, bare = vit().eval(), vit(output_norm=False).eval()
    bare.load_state_dict({n: t for n, t in plain.state_dict().items() if not n.startswith("norm.")})
    torch.testing.assert_close(plain.norm(bare(pictures(2))), plain(pictures(2)), atol=0, rtol=0)


@pytest.mark.parametrize("cached_bytes", [1, 10 * 32 * 4 * 2, 2**24])
def test_images_in_groups_equal_images_at_once(monkeypatch: pytest.MonkeyPatch, cached_bytes: int) -> None:
    """On a CPU without gradients only so many go through the blocks at a time as the constant says."""
    monkeypatch.setattr("openblip.nn.vit.CACHED_BYTES", cached_bytes)
    model, pixels = vit().eval(), pictures(5)
    sizes: list[int] = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    at_once = model(pixels)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), at_once)
        assert model(pixels[:0]).shape == (0, 10, 16)
    assert sizes == {1: [5, 1, 1, 1, 1, 1, 0], 2560: [5, 2, 2, 1, 0], 2**24: [5, 5, 0]}[cached_bytes]


def test_an_encoder_can_be_traced_for_any_number_of_images() -> None:
    model = VisionTransformer(VisionConfig(image_size=16, patch_size=8, hidden_dim=24, num_layers=1, num_heads=3))
    pixels = torch.randn(5, 3, 16, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model.eval(), pixels[:2])
        torch.testing.assert_close(traced(pixels), model(pixels))

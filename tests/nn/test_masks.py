"""The Q-Former's masks: exactly the drawing in the docstring of their file, and padding."""

import pytest
import torch
from torch import Tensor

from openblip.nn import qformer
from openblip.nn.qformer import generation_mask, matching_mask, without_padding
from tiny_blip import contrastive_mask

KINDS = (contrastive_mask, matching_mask, generation_mask)


def drawing() -> Tensor:
    """The three masks of the docstring, bool (3, 6, 6): three queries, then three tokens."""
    lines = [line.split() for line in (qformer.__doc__ or "").splitlines()]
    rows = [line for line in lines if len(line) == 9 and set("".join(line)) <= set("QT#.")]
    assert [line[0::3] for line in rows] == [["Q"] * 3] * 3 + [["T"] * 3] * 3
    cells = [[list(line[3 * kind + 1] + line[3 * kind + 2]) for line in rows] for kind in range(3)]
    return torch.tensor([[[cell == "#" for cell in row] for row in kind] for kind in cells])


def test_masks_are_what_is_drawn() -> None:
    drawn = drawing()
    assert drawn.shape == (3, 6, 6)
    for kind, expected in zip(KINDS, drawn, strict=True):
        assert torch.equal(kind(3, 3), expected)


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


def test_padding_decides_the_device() -> None:
    texts = torch.ones(2, 3, dtype=torch.bool, device="meta")
    assert without_padding(generation_mask(2, 3), texts).device.type == "meta"

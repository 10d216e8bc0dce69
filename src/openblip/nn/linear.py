"""Linear layers of a model that only infers, their weights laid out once for the processor's own kernels (oneDNN), and
the feed-forward of every transformer here.

torch lays a weight out anew, or reads it in an order that does not suit the kernel, in every call of F.linear. At the
few rows of a decoding step that takes longer than the arithmetic, and in float32 on AMD the kernel is a slower one.

R rows, I width of the input, O width of the output.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYOUT_ROWS = 64
"""For how many rows weights are laid out: the layout that oneDNN then chooses serves one row and thousands equally."""


class FrozenLinear(nn.Module, ABC):
    """A linear layer on the CPU whose weight is only there in the layout of a kernel, and cannot be trained.

    Gradients with respect to the input, as explanations need them, flow through a plain copy of the weight.
    `state_dict` holds such a copy too. Moving or casting the layer lays its weight out anew.
    """

    packed: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, packed: Tensor, bias: Tensor | None) -> None:
        """packed: the weight in the kernel's layout. bias: (O,) or None."""
        super().__init__()
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight in its layout, for who asks for its dtype or device, as transformers' T5 does in every pass."""
        return self.packed

    @abstractmethod
    def plain_weight(self) -> Tensor:
        """A plain copy of the weight, (O, I)."""

    @abstractmethod
    def _project(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), by the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, self.plain_weight().to(x.dtype), self.bias)
        return self._project(x)

    def __reduce__(self) -> tuple[type[Self], tuple[Tensor, Tensor | None]]:
        """Copies and pickles are made from the plain weight: torch cannot copy these layouts."""
        return type(self), (self.plain_weight(), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias = None if self.bias is None else fn(self.bias)
        self.__init__(fn(self.plain_weight()), bias)  # type: ignore[misc]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.plain_weight()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


class PackedLinear(FrozenLinear):
    """In float32 or bfloat16, with the results of `nn.Linear` up to rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (O, I); bias: (O,) or None."""
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), LAYOUT_ROWS), bias)

    def plain_weight(self) -> Tensor:
        """The weight exactly as it was, (O, I)."""
        return self.packed.to_dense()

    def _project(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], ""))


class Int8Linear(FrozenLinear):
    """With weights of 8 bits, a scale for each output, and inputs that are rounded to 8 bits as they come, with a scale
    for each row (a token), so that a row's result does not depend on the rows beside it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (O, I), of any floating dtype; bias: (O,) or None."""
        wide = weight.detach().float()
        scale = wide.abs().amax(dim=1).clamp_min(SMALLEST_SCALE) / WEIGHT_RANGE
        integers = (wide / scale[:, None]).round_().to(torch.int8).contiguous()
        super().__init__(torch.ops.onednn.qlinear_prepack(integers, None), bias)
        self.scale = nn.Parameter(scale, requires_grad=False)  # (O,)
        self.zero_point = nn.Parameter(torch.zeros_like(scale, dtype=torch.int32), requires_grad=False)

    def plain_weight(self) -> Tensor:
        """The weight after rounding, float32 (O, I)."""
        return self.packed.to_dense().T * self.scale[:, None]

    def _project(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (R, I)
        largest = torch.maximum(rows.amax(dim=1, keepdim=True), -rows.amin(dim=1, keepdim=True))
        scale = largest.clamp_min_(SMALLEST_SCALE) / ROW_RANGE  # (R, 1)
        integers = (rows / scale).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO_POINT)  # to unsigned
        projected = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, ZERO_POINT, self.packed, self.scale, self.zero_point, None, 1.0, 0, x.dtype, "none", [], ""
        )
        if self.bias is None:
            projected.mul_(scale)
        else:
            torch.addcmul(self.bias, projected, scale, out=projected)
        return cast(Tensor, projected.unflatten(0, x.shape[:-1]))


SMALLEST_SCALE = 1e-30
WEIGHT_RANGE = 127 if torch.cpu._is_vnni_supported() else 63
"""The largest integer of a weight: without VNNI a processor adds two products in 16 bits, which overflow above 63."""
ROW_RANGE = 126
"""The largest integer of a row: 127 could be exceeded where the scale is rounded to bfloat16."""
ZERO_POINT = 128
"""What stands for zero: oneDNN's kernel is fast for unsigned inputs only."""


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be laid out on this device: float32 on CPUs that oneDNN knows, bfloat16 where
    it has kernels for it.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def replace_linear_layers(model: nn.Module, layer: type[PackedLinear] | type[Int8Linear]) -> None:
    """Replace every `nn.Linear` inside a model on the CPU, one after the other, so that no more than one weight is
    there twice. A subclass of `nn.Linear` (a quantised layer, say) stays.
    """
    for module in model.modules():
        for name, child in module._modules.items():
            if type(child) is nn.Linear:
                module._modules[name] = layer(child.weight, child.bias)


class FeedForward(nn.Sequential):
    """A linear layer, an activation, and a linear layer back to the width: (..., D) -> (..., D).

    Where a GPU infers in half precision, the matrix product before a GELU computes it too, which saves a pass over the
    widest tensor. It is the form with tanh, at most 5e-4 from the exact one: what the shipped filter makes of images
    moves by 1/40 of what rounding to bfloat16 does, and by 1/4 of what rounding to float16 does.
    """

    def __init__(self, width: int, inner_width: int, activation: nn.Module | None = None) -> None:
        super().__init__(nn.Linear(width, inner_width), activation or nn.GELU(), nn.Linear(inner_width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        first, activation, last = self
        if isinstance(activation, nn.GELU) and type(first) is nn.Linear and _infers_in_half(x, first.weight):
            inner = torch._addmm_activation(first.bias, x.flatten(0, -2), first.weight.T, use_gelu=True)
            return cast(Tensor, last(inner.unflatten(0, x.shape[:-1])))
        return cast(Tensor, last(activation(first(x))))


def _infers_in_half(x: Tensor, weight: Tensor) -> bool:
    """Whether both are bfloat16 or float16 on a GPU, without gradients."""
    is_half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return is_half and x.device.type == "cuda" and not torch.is_grad_enabled()

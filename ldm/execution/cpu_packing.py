"""Prepares the weights of inference-only networks for the CPU once, instead of at every call.

Large weights are packed into oneDNN's layout. The operations are those that torch.compile emits for frozen weights;
torch has no public API for them. Convolutions after upsampling are folded, see `FoldedUpsample`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.device import has_bf16
from ldm.nn.layers import Upsample

MIN_SIZE = 2**18  # elements of a weight from which packing pays off
ONEDNN: Any = torch.ops.mkldnn


class Packed(nn.Module, ABC):
    """A layer with a packed weight, without gradients, that computes in the dtype of its weight.

    Its state dict holds the plain layer's weight; `parameters()` does not, because no optimizer could update it.
    """

    def __init__(self, plain: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.bias, self.packed = plain.bias, self._pack(plain.weight.detach())

    @property
    def weight(self) -> Tensor:
        """The weight in the plain layout; a copy where it is packed."""
        return self.packed.to_dense() if self.packed.is_mkldnn else self.packed

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "the weights of a pipeline on the CPU are packed for inference and have no gradients: "
                "call it under torch.no_grad(), or read the network with ldm.weights.model.read_model"
            )
        return self._run(x.to(self.packed.dtype))

    @abstractmethod
    def plain(self) -> nn.Linear | nn.Conv2d:
        """Returns the layer with the weight in the plain layout."""

    @abstractmethod
    def _pack(self, weight: Tensor) -> Tensor:
        """Returns the plain weight in the packed layout."""

    @abstractmethod
    def _run(self, x: Tensor) -> Tensor: ...

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.packed = self._pack(fn(self.weight))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "packed": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.packed = self._pack(self.packed)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = state_dict.pop(name := f"{prefix}weight", None)
        if weight is None:
            missing_keys.append(name)
        elif weight.shape != self.packed.shape:
            error_msgs.append(f"{name} is {tuple(weight.shape)}, but must be {tuple(self.packed.shape)}")
        else:
            self.packed = self._pack(weight.detach().to(self.packed.dtype, copy=True))
        problems = missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *problems)


class PackedLinear(Packed):
    def plain(self) -> nn.Linear:
        outputs, inputs = self.packed.shape
        return _with_weights(nn.Linear(inputs, outputs, self.bias is not None, device="meta"), self)

    def _pack(self, weight: Tensor) -> Tensor:
        return cast(Tensor, ONEDNN._reorder_linear_weight(weight))

    def _run(self, x: Tensor) -> Tensor:
        return cast(Tensor, ONEDNN._linear_pointwise(x, self.packed, self.bias, "none", [], ""))


class PackedConv2d(Packed):
    """Packs its weight when it is called, because the best layout of a convolution depends on the size of its input.

    With another layout than the one that oneDNN selects for a size, it would repack the weight at every call, which
    takes up to fifty times as long as a small convolution.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        self.arguments = plain.padding, plain.stride, plain.dilation, plain.groups
        super().__init__(plain)

    def plain(self) -> nn.Conv2d:
        outputs, inputs, *kernel = self.packed.shape
        padding, stride, dilation, groups = self.arguments
        made = nn.Conv2d(
            *(inputs * groups, outputs, tuple(kernel), stride, padding, dilation, groups),  # type: ignore[arg-type]
            bias=self.bias is not None,
            device="meta",
        )
        return _with_weights(made, self)

    def _pack(self, weight: Tensor) -> Tensor:
        self.sizes: set[torch.Size] = set()  # of inputs that the layout fits
        return weight

    def _run(self, x: Tensor) -> Tensor:
        if x.shape not in self.sizes:
            self._fit(x.shape)
        return cast(Tensor, ONEDNN._convolution_pointwise(x, self.packed, self.bias, *self.arguments, "none", [], ""))

    def _fit(self, size: torch.Size) -> None:
        fitting = ONEDNN._reorder_convolution_weight(self.weight, *self.arguments, size)
        if not self.sizes or not torch.equal(_layout(fitting), _layout(self.packed)):
            self.packed, self.sizes = fitting, set()
        self.sizes.add(size)


def _layout(packed: Tensor) -> Tensor:
    return cast(Tensor, ONEDNN._get_mkldnn_serialized_md(packed))


class FoldedUpsample(Upsample):
    """Nearest-neighbour upsampling to twice the size and its 3x3 convolution as four 2x2 convolutions of the input.

    In every window of the upsampled image some pixels are equal, so that their weights can be added beforehand: 4/9 of
    the multiplications give the same result up to rounding. Each convolution gives every second pixel per direction.
    Other sizes, gradients, and dtypes that cannot be packed use the plain layers.
    """

    def __init__(self, plain: Upsample) -> None:
        nn.Module.__init__(self)
        self.conv = plain.conv
        self.training = plain.training
        self.quarters: dict[tuple[int, int], PackedConv2d] = {}  # not submodules: the state dict has the plain weight
        self.folded: tuple[Any, ...] = ()  # the state of the plain weight that they were made from

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x.shape[2:]
        needs_gradient = x.requires_grad and torch.is_grad_enabled()
        doubles = size in (None, (2 * height, 2 * width))
        if not doubles or needs_gradient or not can_pack(x.device, self.conv.weight.dtype):
            return super().forward(x, size)
        if self.folded != _state(self.conv.weight):
            self._fold()
        x = F.pad(x, (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
        channels, dtype = self.conv.out_channels, self.conv.weight.dtype
        out = x.new_empty(len(x), 2 * height, 2 * width, channels, dtype=dtype).permute(0, 3, 1, 2)
        for (row, column), conv in self.quarters.items():
            out[:, :, row::2, column::2] = conv(x[:, :, row : row + height + 1, column : column + width + 1])
        return out

    def plain(self) -> Upsample:
        made = Upsample.__new__(Upsample)
        nn.Module.__init__(made)
        made.conv = self.conv
        return made.train(self.training)

    def _fold(self) -> None:
        weight = self.conv.weight.detach().float()
        positions = [(row, column) for row in (0, 1) for column in (0, 1)]
        self.quarters = {at: self._quarter(_added(_added(weight, 2, at[0]), 3, at[1])) for at in positions}
        self.folded = _state(self.conv.weight)

    def _quarter(self, weight: Tensor) -> PackedConv2d:
        conv = nn.Conv2d(self.conv.in_channels, self.conv.out_channels, 2, device="meta")
        conv.weight = nn.Parameter(weight.to(self.conv.weight), requires_grad=False)
        conv.bias = self.conv.bias
        return PackedConv2d(conv)


def _state(weight: Tensor) -> tuple[Any, ...]:
    """Returns what changes whenever the values of a weight do."""
    return weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version


def _added(weight: Tensor, dim: int, position: int) -> Tensor:
    """Adds the two of three weights along `dim` that apply to the same pixel of the small image.

    Of two pixels that are copies of one, the first (position 0) has another pixel before it, the second one after it.
    """
    before, at, after = weight.unbind(dim)
    return torch.stack([before, at + after] if position == 0 else [before + at, after], dim)


L = TypeVar("L", nn.Linear, nn.Conv2d)


def _with_weights(layer: L, packed: Packed) -> L:
    layer.weight = nn.Parameter(packed.weight, requires_grad=False)
    bias: Any = packed.bias  # a parameter or None
    layer.bias = bias
    return layer.train(packed.training)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether packing is known to be faster: on x86-64 processors that compute natively in `dtype`."""
    has_onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not has_onednn or torch.cpu.get_capabilities().get("architecture") != "x86_64":
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16(device))


def pack(network: nn.Module) -> None:
    """Replaces large layers one by one, so that only one weight at a time is in memory in both layouts."""
    for name in [name for name, _ in network.named_children()]:
        layer = getattr(network, name)
        if isinstance(layer, Packed | FoldedUpsample):
            continue
        if _can_fold(layer):
            setattr(network, name, FoldedUpsample(layer))
        elif isinstance(layer, nn.Linear) and layer.weight.numel() >= MIN_SIZE:
            setattr(network, name, PackedLinear(layer))
        # A 1x1 convolution is a matrix product, which is as fast without packing.
        elif isinstance(layer, nn.Conv2d) and layer.weight.numel() >= MIN_SIZE and layer.kernel_size != (1, 1):
            setattr(network, name, PackedConv2d(layer))
        else:
            pack(layer)


def fold(network: nn.Module) -> None:
    """Replaces only upsampling: for autoencoders, whose feature maps are so large that packing would change nothing."""
    for name, layer in list(network.named_children()):
        if _can_fold(layer):
            setattr(network, name, FoldedUpsample(layer))
        elif not isinstance(layer, Packed | FoldedUpsample):
            fold(layer)


def _can_fold(layer: nn.Module) -> TypeGuard[Upsample]:
    return type(layer) is Upsample and layer.conv.weight.numel() >= MIN_SIZE


def unpack(network: nn.Module) -> None:
    """Replaces packed layers by plain ones with the same weights, so that the network can be moved or cast."""
    for name, layer in list(network.named_children()):
        if isinstance(layer, Packed | FoldedUpsample):
            setattr(network, name, layer.plain())
        else:
            unpack(layer)

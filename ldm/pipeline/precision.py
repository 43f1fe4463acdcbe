"""Names the precisions of a pipeline's networks, and chooses one. Torch is imported only where it is needed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

AUTO = "auto"
DTYPES = {"32": "float32", "bf16": "bfloat16", "16": "float16"}  # each precision's dtype in torch


def dtype_of(precision: str) -> "torch.dtype":
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[precision])
    return dtype


def choose_precision(name: str, device: str) -> str:
    """Returns the precision; "auto" is the fastest that generates nearly the same images as float32.

    Raises ValueError for an unavailable device.
    """
    if name != AUTO:
        return name
    from ldm.device import choose_device, has_bf16

    return "bf16" if has_bf16(choose_device(device)) else "32"

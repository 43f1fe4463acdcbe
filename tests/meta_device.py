"""Lets a Trainer run on the meta device, which stands in for a GPU, and records what waits for the device."""

import traceback
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


class MetaAccelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Accepts the meta device."""


def on_meta() -> dict[str, Any]:
    """Returns Trainer arguments that put the module and its batches on the meta device."""
    return {"accelerator": "auto", "strategy": SingleDeviceStrategy(META, MetaAccelerator())}


class Waits(TorchDispatchMode):
    """Records the places that read a value of the meta device, or copy one to it, which on a GPU waits for the device.

    Booleans read as True, and numbers as 0. Copies from pinned memory do not wait, but there is none without a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [arg for arg in args if isinstance(arg, Tensor)]
        devices = {tensor.device.type for tensor in given}
        if func is torch.ops.aten._local_scalar_dense.default and devices == {"meta"}:
            self._note("read")
            return given[0].dtype == torch.bool
        if func is torch.ops.aten._to_copy.default and devices == {"meta"} and kwargs.get("device") not in (None, META):
            self._note("read")
            return torch.full_like(given[0], given[0].dtype == torch.bool, **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.device == META and "cpu" in devices:
            self._note("copy")
        return result

    def _note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack()[:-2] if "/torch/" not in frame.filename]
        self.places.append(f"{what} in {Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}")

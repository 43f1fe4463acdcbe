"""Exports the trained networks as model files at the end of a run."""

from contextlib import nullcontext
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.find import find
from ldm.execution.fsdp import full_tensor
from ldm.weights.native import save_network


class Export(Callback):
    """Writes each of the module's `exported_files` to `folder`/NAME.safetensors, with EMA weights if there are any."""

    def __init__(self, folder: str | Path, dtype: str = "float32") -> None:
        self.folder, self.dtype = Path(folder), getattr(torch, dtype)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        ema = find(trainer, EMA)
        with ema.swapped(module) if ema else nullcontext():
            write_files(module, self.folder, self.dtype, trainer.is_global_zero)


def write_files(module: LightningModule, folder: Path, dtype: torch.dtype, writes: bool = True) -> None:
    """Writes the module's `exported_files` in this dtype; every rank must call this, also one that writes none."""
    for file in module.exported_files():  # type: ignore[operator]
        state = {
            name: full_tensor(tensor).to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in file.state.items()
        }
        if writes:
            save_network(folder / f"{file.name}.safetensors", state=state, metadata=file.metadata, **file.about)

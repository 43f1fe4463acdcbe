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
            for file in module.exported_files():  # type: ignore[operator]
                state = {
                    name: full_tensor(tensor).to(self.dtype) if tensor.is_floating_point() else tensor
                    for name, tensor in file.state.items()
                }
                if trainer.is_global_zero:
                    save_network(
                        self.folder / f"{file.name}.safetensors", state=state, metadata=file.metadata, **file.about
                    )

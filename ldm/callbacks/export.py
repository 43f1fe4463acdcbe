"""The trained networks as files of their own."""

from contextlib import nullcontext
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.find import find
from ldm.execution.fsdp import whole
from ldm.weights.native import save_network


class Export(Callback):
    """At the end writes `folder`/NAME.safetensors for each of the module's `parts`, with EMA weights if it has them."""

    def __init__(self, folder: str | Path, dtype: str = "float32") -> None:
        self.folder, self.dtype = Path(folder), getattr(torch, dtype)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        ema = find(trainer, EMA)
        with ema.swapped(module) if ema else nullcontext():
            for part in module.parts():  # type: ignore[operator]
                state = {
                    name: whole(tensor).to(self.dtype) if tensor.is_floating_point() else tensor
                    for name, tensor in part.state.items()
                }
                if trainer.is_global_zero:
                    save_network(
                        self.folder / f"{part.name}.safetensors", state=state, metadata=part.metadata, **part.about
                    )

"""The trained networks as files of their own, and the last validation as numbers."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ldm.callbacks.ema import EMA
from ldm.files import write_json
from ldm.sharding import whole
from ldm.weights.native import save_network


class Export(Callback):
    """At the end writes `folder`/NAME.safetensors for each of the module's `parts`, with EMA weights if there are any.

    With `metrics` the last validation goes into `folder`/metrics.json.
    """

    def __init__(self, folder: str | Path, dtype: str = "float32", metrics: bool = False) -> None:
        self.folder, self.dtype, self.metrics = Path(folder), getattr(torch, dtype), metrics

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)  # type: ignore[attr-defined]
        with ema.swapped(module) if ema else nullcontext():
            for part in module.parts():  # type: ignore[operator]
                state = {
                    name: whole(tensor).to(self.dtype) if tensor.is_floating_point() else tensor
                    for name, tensor in part.state.items()
                }
                if trainer.is_global_zero:
                    save_network(self.folder / f"{part.name}.safetensors", state=state, **part.about)
        if self.metrics and trainer.is_global_zero and trainer.callback_metrics:  # a finished run has none
            self._write_metrics(trainer)

    def _write_metrics(self, trainer: Trainer) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        provenance: dict[str, Any] = {"steps": trainer.global_step, "torch": torch.__version__}
        write_json(self.folder / "metrics.json", {"metrics": values, "provenance": provenance})
        for name, value in sorted(values.items()):
            print(f"{name:32} {value:.4f}")
        print(f"{'files':32} {self.folder}")

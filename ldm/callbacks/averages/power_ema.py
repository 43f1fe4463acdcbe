"""Power-function EMAs of the trained weights; `ldm ema` combines their snapshots into averages of any length."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.full_disk import tolerate_full_disk
from ldm.ema.profiles import decay, exponent
from ldm.execution.fsdp import full_tensor
from ldm.weights.native import save_network


class PowerEMA(EMA):
    """Keeps one average per length in `lengths` (shares of the training); validation and sampling use the first.

    Every `every_n_train_steps` steps and at the end each average is written in `snapshot_dtype` to
    `folder`/step_N_length_L.safetensors, a complete model file.
    """

    def __init__(
        self,
        folder: str | Path,
        lengths: list[float],
        every_n_train_steps: int = 1000,
        snapshot_dtype: str = "float16",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__(0.0, False, device, dtype)
        if not lengths or every_n_train_steps < 1:
            raise ValueError(
                f"ema.lengths is {lengths} and ema.every_n_train_steps is {every_n_train_steps}, but at least one "
                "length and one step are needed"
            )
        self.folder, self.lengths, self.every_n_train_steps = Path(folder), lengths, every_n_train_steps
        self.snapshot_dtype = getattr(torch, snapshot_dtype)
        self.exponents = [exponent(length) for length in lengths]
        self.tracks = [{} for _ in lengths]
        self._snapshot = 0  # the step of the last snapshot

    @property
    def about(self) -> dict[str, Any]:
        return {"length": self.lengths[0], "updates": self.updates}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"lengths": list(self.lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        lengths = state.get("lengths", self.lengths)
        if [*lengths] != [*self.lengths]:
            raise ValueError(
                f"ema.lengths is {[*self.lengths]}, but the checkpoint's averages have the lengths {[*lengths]}: "
                "resume with those; after training, ldm ema computes averages of any length"
            )

    def decays(self) -> list[float]:
        return [decay(gamma, self.updates) for gamma in self.exponents]

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        super().on_train_batch_end(trainer, module)
        if trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, module)

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if step in (self._snapshot, 0):
            return
        self._snapshot = step
        for length, track in zip(self.lengths, self.tracks, strict=True):
            state = {name: full_tensor(average).to("cpu", self.snapshot_dtype) for name, average in track.items()}
            if not trainer.is_global_zero:
                continue
            about = module.about() | {"ema": {"length": length, "step": self.updates}}  # type: ignore[operator]
            with tolerate_full_disk(f"the EMA snapshot of step {step}"):
                save_network(self.folder / f"step_{step:08}_length_{length:.3f}.safetensors", state=state, **about)

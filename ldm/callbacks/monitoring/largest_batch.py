"""Finds the largest batch size that fits in GPU memory by trial."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import batch_size_scaling

from ldm.execution.offload import is_out_of_memory


class LargestBatch(BatchSizeFinder):
    """Trains on increasing batch sizes until memory runs out, restores the state, and prints the largest that fit."""

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        vars(batch_size_scaling)["is_oom_error"] = is_out_of_memory  # Lightning's misses errors of cuBLAS and cuDNN
        super().on_fit_start(trainer, module)
        print(
            f"data.batch_size={self.optimal_batch_size} is about the largest that fits on {module.device}", flush=True
        )

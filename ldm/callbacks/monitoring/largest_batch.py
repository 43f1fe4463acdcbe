"""The largest batch that a GPU holds, by trying."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder


class LargestBatch(BatchSizeFinder):
    """Trains on ever larger batches until memory is full, puts everything back, and says which was the largest."""

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_fit_start(trainer, module)
        print(f"data.batch_size={self.optimal_batch_size} fits on {module.device}, and not much more", flush=True)

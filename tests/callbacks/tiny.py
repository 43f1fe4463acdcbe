"""A minimal module, data loader and Trainer for tests of callbacks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO


class Batches:
    """A data loader of 6 batches of 2 samples that can resume within an epoch."""

    position = 0

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in range(self.position % 6, 6):
            self.position = index + 1
            generator = torch.Generator().manual_seed(index)
            yield {"x": torch.randn(2, 3, generator=generator), "id": torch.arange(2)}

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Tiny(LightningModule):
    """Trains the output of one linear layer towards 1; the loss of the batch `broken_at` is NaN."""

    def __init__(self, broken_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(3, 3)
        self.broken_at = broken_at

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = (self.backbone(batch["x"]) - 1).square().mean()
        return loss * torch.nan if index == self.broken_at else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.backbone.parameters(), lr=0.1)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.backbone.named_parameters())

    def weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.backbone.parameters()).detach().clone()


def trainer(folder: Path, *callbacks: Callback, max_steps: int = 4, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "callbacks": list(callbacks),
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
        "logger": False,
        "max_steps": max_steps,
        "num_sanity_val_steps": 0,
        "plugins": [AtomicCheckpointIO()],
    }
    return Trainer(**(defaults | settings))

"""Trains CLIP text and image towers contrastively (Radford et al. 2021)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ldm.nn.backbone import trainable
from ldm.nn.clip import CLIP
from ldm.nn.tokenizer import Tokenizer
from ldm.training.batch import Batch, as_float
from ldm.training.export import ExportedFile
from ldm.training.optim import Curve, MakeOptimizer, with_curve
from ldm.training.training_module import TrainingModule
from ldm.training.validation import log_validation
from ldm.weights.native import check_fits


class ClipTraining(TrainingModule):
    """Trains each image to match its caption within the batch, and each caption its image.

    If several rows have the same caption, all of them count as matches.
    """

    def __init__(self, clip: CLIP, tokenizer: Tokenizer, optimizer: MakeOptimizer, lr: Curve) -> None:
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self.make_optimizer, self.curve = optimizer, lr

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return with_curve(self.make_optimizer, self.trainable().values(), self.curve, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fits(self, checkpoint["state_dict"], "the checkpoint")

    def trainable(self) -> dict[str, nn.Parameter]:
        return trainable(self.clip)

    @property
    def tokenize(self) -> Callable[[list[str]], Tensor]:
        """Maps captions to tokens; see `cropped_tokens`."""
        return partial(cropped_tokens, self.tokenizer)

    def similarities(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns scaled cosine similarities (captions, images), and which pairs match (bool, same shape)."""
        tokens = batch["tokens"] if "tokens" in batch else self.tokenize(batch["caption"])
        tokens = tokens.to(self.device)
        same = (tokens[:, None] == tokens[None]).all(-1)
        return self.clip(tokens, as_float(batch["image"])), same

    def training_step(self, batch: Batch, _: int) -> Tensor:
        logits, same = self.similarities(batch)
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        self.means.add(loss=loss)
        return loss

    def on_train_batch_start(self, *_: Any) -> None:  # on_train_batch_end would run after a checkpoint is saved
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=math.log(100))

    def validation_step(self, batch: Batch, _: int, dataloader_idx: int = 0) -> None:
        """Logs the share of captions whose nearest image in the batch matches, and vice versa."""
        logits, same = self.similarities(batch)
        rows = torch.arange(len(same), device=same.device)
        matches = {"picture_found": same[rows, logits.argmax(1)], "caption_found": same[logits.argmax(0), rows]}
        log_validation(self, dataloader_idx, matches)

    @property
    def validation_meaning(self) -> dict[str, Any]:
        """The batch size, because the nearest of more candidates is harder to find."""
        return {"batch": self.trainer.datamodule.val_batch_size}  # type: ignore[attr-defined]

    def exported_files(self) -> list[ExportedFile]:
        towers = {"text_tower": self.clip.text, "image_tower": self.clip.image}
        return [
            ExportedFile(name, tower.state_dict(), {"kind": name, "config": tower.config})
            for name, tower in towers.items()
        ]


def cropped_tokens(tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    """Returns tokens (b, n), n being the length of the longest caption; what follows would be padding for all."""
    tokens = tokenizer(captions)
    longest = int((tokens == tokenizer.end).int().argmax(1).max()) + 1
    return tokens[:, :longest].contiguous()

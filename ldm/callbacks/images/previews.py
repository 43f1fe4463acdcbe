"""Periodically samples images of fixed prompts and seeds during training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ldm.callbacks.full_disk import tolerate_full_disk
from ldm.callbacks.images.sampling import image_sampler
from ldm.callbacks.steps import stepped
from ldm.image import grid, pixels, save_png, to_pil

COUNT = 4  # number of prompts taken from the validation set
SEARCHED = 64  # number of samples among which they are chosen


class Previews(Callback):
    """Writes `folder`/step_000500.png and a TensorBoard image every `every_n_train_steps` steps, and `at_end`.

    The i-th prompt is sampled with seed + i. Without `prompts`, they are the first four different captions of the
    validation set, or fewer captions repeated.
    """

    def __init__(
        self,
        folder: str | Path,
        prompts: Sequence[str] | None,
        every_n_train_steps: int,
        seed: int = 0,
        at_end: bool = True,
    ) -> None:
        if (prompts is not None and not prompts) or every_n_train_steps < 1:
            raise ValueError(
                f"callbacks.previews has {prompts} as prompts and every_n_train_steps={every_n_train_steps}, but "
                "needs at least one prompt and one step"
            )
        self.folder, self.prompts, self.seed = Path(folder), None if prompts is None else list(prompts), seed
        self.every_n_train_steps, self.at_end = every_n_train_steps, at_end
        self._sampled_step = 0  # the step of the last images

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.prompts is None:
            dataset = next(iter(trainer.datamodule.val.values()))  # type: ignore[attr-defined]
            captions = list(dict.fromkeys(dataset[index]["caption"] for index in range(min(len(dataset), SEARCHED))))
            self.prompts = [captions[k % len(captions)] for k in range(COUNT)]

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_train_steps == 0 and stepped(trainer, batch_idx):
            self._sample(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.at_end:
            self._sample(trainer, module)

    def _sample(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if step == self._sampled_step:
            return
        self._sampled_step = step
        assert self.prompts is not None
        seeds = [self.seed + i for i in range(len(self.prompts))]
        images = None
        # The sampler may write an adapter, too. All ranks sample, because each may hold only a shard of the weights.
        with tolerate_full_disk(f"the preview of step {step}"), image_sampler(trainer, module) as sample:
            images = sample(self.prompts, seeds)
        if images is None or not trainer.is_global_zero:
            return
        sheet = grid(to_pil(images), self.prompts)
        about = {"step": step, "prompts": self.prompts, "seeds": seeds}
        with tolerate_full_disk(f"the preview of step {step}"):
            save_png(sheet, self.folder / f"step_{step:06}.png", about)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", pixels(sheet), step - 1)  # scalars count steps from 0, too

"""Minimal data sets, LightningModules and training runs for tests."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO
from ldm.data.loading.datamodule import DataModule, collate
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow
from ldm.diffusion.time_sampling import Uniform
from ldm.diffusion.weighting import uniform
from ldm.training.autoencoder import AutoencoderTraining
from ldm.training.clip import ClipTraining
from ldm.training.diffusion import DiffusionTraining
from ldm.training.optim import constant
from ldm.weights.parts import Frozen
from tests.tiny import SAMPLING, tiny_text_encoder, tiny_unet, tiny_vae

ADAM = partial(torch.optim.AdamW, lr=1e-2)
# For runs that add the same numbers in different orders, on several ranks or in shards. AdamW divides by
# sqrt(v) + eps, so its default eps would turn the rounding of a gradient near 0 into up to 2·lr.
STEADY = partial(torch.optim.AdamW, lr=1e-2, eps=1.0, fused=True)
UNIT = 2.0**-24  # the largest relative error of one rounding to float32
GRADIENT = 16 * UNIT  # error of a float32 gradient relative to its norm (test_rounding.py)
CAPTIONS = ["a red circle", "blue square on white background", "a white square", "red"]


class Images(Dataset[dict[str, Any]]):
    """Random images (3, side, side), each with one of four captions."""

    def __init__(self, length: int = 8, seed: int = 0, side: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(256, (length, 3, side, side), generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        caption = CAPTIONS[index % len(CAPTIONS)]
        return {"image": self.images[index], "caption": caption, "key": str(index), "id": index}


def batch(*ids: int, draw: int = 0) -> dict[str, Any]:
    samples = [Images(max(ids) + 1)[index] for index in ids]
    return {**collate(samples), "draw": torch.full((len(ids),), draw)}


def frozen_parts() -> dict[str, Any]:
    return {
        "first_stage": Frozen(tiny_vae(), {"weights": "vae.safetensors", "fingerprint": "v"}),
        "text_encoder": Frozen(tiny_text_encoder(), {"weights": "text.safetensors", "fingerprint": "t"}),
    }


def diffusion(**how: Any) -> DiffusionTraining:
    settings: dict[str, Any] = {
        "backbone": tiny_unet().train(),
        **frozen_parts(),
        "schedule": Flow(),
        "prediction": Prediction("flow"),
        "weighting": uniform(),
        "times": Uniform(Flow()),
        "optimizer": ADAM,
        "lr": constant(),
        "sampling": SAMPLING,
        "size": (8, 8),
    }
    return DiffusionTraining(**(settings | how))


def fit(
    folder: Path,
    module: LightningModule,
    steps: int = 2,
    resume: Path | None = None,
    batch_size: int = 4,
    side: int = 8,
    tokenize: bool | None = False,
    **how: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "plugins": [AtomicCheckpointIO()],
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    trainer = Trainer(**(settings | how))
    data = DataModule(
        Images(side=side),
        {"pictures": Images(6, seed=1, side=side)},
        batch_size,
        global_batch=batch_size * trainer.accumulate_grad_batches * trainer.world_size,
        val_batch_size=4,
        workers=int(tokenize is True),
        tokenize=tokenize,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return trainer


def logged(module: DiffusionTraining | AutoencoderTraining | ClipTraining) -> dict[str, Tensor]:
    """Returns what the module logs for the batches since the last optimizer step, without a Trainer."""
    values: dict[str, Tensor] = {}
    module.trainer = SimpleNamespace(log_every_n_steps=0)  # type: ignore[assignment]
    module.log = lambda name, value, **_: values.update({name: value})  # type: ignore[assignment, method-assign]
    module.means.log(module)
    return values


def drift(steps: int, lr: float = 1e-2, eps: float = 1.0) -> dict[str, float]:
    """Returns tolerances for two AdamW runs with different orders of addition and gradients clipped to norm 1.

    The gradients differ by at most 2·GRADIENT. AdamW steps by lr·m/(sqrt(v) + eps). m and sqrt(v) differ by no more
    than the gradients, and |m| is at most 1.02·sqrt(v) in the first six steps, so the steps differ by at most 2·lr/eps
    times as much. Each step also rounds a weight twice, and its average twice, in both runs.
    """
    return {"rtol": steps * 8 * UNIT, "atol": steps * 2 * lr / eps * 2 * GRADIENT}

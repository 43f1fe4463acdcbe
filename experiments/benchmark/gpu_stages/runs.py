"""Runs of the Trainer on random latents; as a program, a run that is killed.

python -m experiments.benchmark.gpu_stages.runs --folder DIR --size full --device cuda --kill-at STEP [--deterministic]
"""

import argparse
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch.utils.data import Dataset

from experiments.benchmark.gpu_stages.context import Context, filled
from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO, Checkpoint
from ldm.callbacks.monitoring.health import Health
from ldm.callbacks.monitoring.images_seen import ImagesSeen
from ldm.callbacks.monitoring.loss_by_noise import LossByNoise
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.data.loading.datamodule import DataModule
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from ldm.diffusion.time_sampling import Uniform
from ldm.diffusion.weighting import uniform
from ldm.nn.clip import TextTower
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.training.diffusion import DiffusionTraining
from ldm.training.optim import constant
from ldm.weights.parts import Frozen

SAMPLES = 512
STEPS, EVERY = 6, 2  # of runs that are killed and resumed, and between their checkpoints


class Latents(Dataset[dict[str, Any]]):
    """Random moments with captions."""

    def __init__(self, side: int) -> None:
        self.moments = torch.randn(SAMPLES, 8, side, side, generator=torch.Generator().manual_seed(0)).half()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        return {"moments": self.moments[index], "caption": f"a red circle, number {index}", "id": index}


def module(context: Context, unet: dict[str, Any]) -> DiffusionTraining:
    """Returns the training of a UNet with random weights, the same in every process."""
    size, schedule = context.size, scaled_linear()
    torch.manual_seed(0)
    vae = filled(lambda: VAE(**size.vae), context.device)
    tower = filled(lambda: TextTower(**size.tower), context.device)
    return DiffusionTraining(
        filled(lambda: UNet(**unet), context.device).train(),
        Frozen(vae, {"weights": "random", "fingerprint": "vae"}),
        Frozen(TextEncoder([tower], [Tokenizer()]), {"weights": "random", "fingerprint": "tower"}),
        schedule,
        Prediction("eps"),
        uniform(),
        Uniform(schedule),
        partial(torch.optim.AdamW, lr=1e-4, fused=True),
        constant(),
        {"sampler": "ddim", "spacing": "leading", "steps": 30, "guidance": 7.5},
        (size.side * vae.factor,) * 2,
    )


def measures(folder: Path) -> list[Callback]:
    """Returns the callbacks that act in every step of a run."""
    return [ImagesSeen(), Health(folder), LossByNoise(), Throughput(), EMA()]


def fit(
    context: Context,
    training: DiffusionTraining,
    batch: int,
    steps: int,
    callbacks: list[Callback],
    resume: Path | None = None,
    **how: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "gpu" if context.on_gpu else "cpu",
        "devices": 1,
        "precision": "bf16-mixed",
        "max_steps": steps,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 50,
        "callbacks": callbacks,
        "plugins": [AtomicCheckpointIO()],
        "default_root_dir": context.folder,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
    }
    trainer = Trainer(**(settings | how))
    data = DataModule(Latents(context.size.side), {}, batch, workers=4 if context.on_gpu else 0)
    trainer.fit(training, data, ckpt_path=resume, weights_only=True)
    return trainer


class Kill(Callback):
    """Kills this process before a step, once there is a checkpoint, which is written in the background."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step, self.checkpoint = step, checkpoint

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            while not self.checkpoint.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def short_run(
    context: Context, checkpoint: Checkpoint, deterministic: bool, *more: Callback, resume: Path | None = None
) -> list[torch.Tensor]:
    """Returns the weights of a small network after STEPS."""
    training = module(context, context.size.small)
    callbacks = [EMA(), *more, checkpoint]
    fit(context, training, context.size.batch // 2, STEPS, callbacks, resume, deterministic=deterministic)
    return [weight.detach().cpu() for weight in training.trainable().values()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--kill-at", type=int, required=True)
    parser.add_argument("--deterministic", action="store_true")
    args = parser.parse_args()
    context = Context.of(args.size, args.device, args.folder)
    checkpoint = Checkpoint(args.folder, EVERY)
    short_run(context, checkpoint, args.deterministic, Kill(args.kill_at, checkpoint.path))


if __name__ == "__main__":
    main()

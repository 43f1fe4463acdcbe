"""Compares a training step of Stable Diffusion 1.5's UNet with that of diffusers' training script, on the CPU.

    python -m experiments.benchmark.finetune [--json FILE]      or: ldm bench finetune --json FILE

A step trains all weights on one cached latent of 256x256 pixels and its caption in bf16-mixed, with gradient clipping,
AdamW and an EMA, which need 20 GB together. The peer is the loop of diffusers' train_text_to_image.py with --use_ema:
its optimizer, which is not fused, and its `EMAModel`. ldm trains as train.py does, with the Trainer, progress, checks
of gradients, logging and the fused AdamW of `optimizer=adamw`. Each runs in a process of its own, one after the other,
because the two do not fit in memory together.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import Dataset
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO
from ldm.callbacks.monitoring.health import Health
from ldm.callbacks.monitoring.progress import Progress
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.commands.bench.command import check_replaceable, save
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

PEER: Any = diffusers  # its calls are untyped
PIXELS, STEPS, SKIPPED = 256, 8, 2
CAPTION = "a photo of a cat"
ADAMW = {"lr": 1e-5, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}


class Latents(Dataset[dict[str, Any]]):
    """Random moments, each with the same caption."""

    def __len__(self) -> int:
        return STEPS + 1

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        moments = torch.randn(8, PIXELS // 8, PIXELS // 8, generator=torch.Generator().manual_seed(index))
        return {"moments": moments.half(), "caption": CAPTION, "id": index}


class Times(Callback):
    """Records when each step started."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began.append(time.perf_counter())


def ours(width: int) -> list[float]:
    """Returns the seconds of each step."""
    schedule, times = scaled_linear(), Times()
    text = TextEncoder([TextTower()], [Tokenizer()]).requires_grad_(False)
    module = DiffusionTraining(
        UNet(width=width),
        Frozen(VAE(widths=[32] * 4), {}),  # only its size matters, because latents are cached
        Frozen(text, {}),
        schedule,
        Prediction("eps"),
        uniform(),
        Uniform(schedule),
        partial(torch.optim.AdamW, fused=True, **ADAMW),  # type: ignore[arg-type]
        constant(),
        {"sampler": "dpmpp_2m"},
        (PIXELS, PIXELS),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            precision="bf16-mixed",
            max_steps=STEPS + 1,
            gradient_clip_val=1.0,
            log_every_n_steps=10,
            callbacks=[times, Progress(), Throughput(), Health(Path(folder)), EMA()],
            logger=TensorBoardLogger(folder),
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        trainer.fit(module, DataModule(Latents(), {}, batch_size=1))
    return [end - begin for begin, end in pairwise(times.began)]


def theirs(width: int) -> list[float]:
    """Returns the seconds of each step of train_text_to_image.py, on cached latents."""
    widths = [width * m for m in (1, 2, 4, 4)]
    unet: Any = PEER.UNet2DConditionModel(
        sample_size=PIXELS // 8, block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8
    )
    tower: Any = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    tower, tokenizer = tower.to(torch.bfloat16), Tokenizer()
    scheduler = PEER.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(unet.parameters(), **ADAMW)  # type: ignore[arg-type]
    average: Any = EMAModel(unet.parameters(), model_cls=PEER.UNet2DConditionModel, model_config=unet.config)
    unet.train()

    def step(batch: dict[str, Any]) -> None:
        mean, log_variance = batch["moments"][None].float().chunk(2, dim=1)
        latents = (mean + (log_variance / 2).exp() * torch.randn_like(mean)) * 0.18215
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (1,))
        noisy = scheduler.add_noise(latents, noise, t)
        with torch.no_grad():
            states = tower(input_ids=tokenizer([batch["caption"]]))[0]
        with torch.autocast("cpu", torch.bfloat16):
            made = unet(noisy, t, states, return_dict=False)[0]
        loss = F.mse_loss(made.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())

    return list(_timed(step))


def _timed(step: Callable[[dict[str, Any]], None]) -> Iterator[float]:
    for index in range(STEPS):
        began = time.perf_counter()
        step(Latents()[index])
        yield time.perf_counter() - began


def side(name: str, width: int) -> dict[str, float]:
    """Returns seconds per step and the peak memory of this process in bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = {"ldm": ours, "diffusers": theirs}[name](width)[SKIPPED:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_bytes": 1024 * peak,
        "bytes_of_imports": 1024 * before,
    }


def measure(width: int = 320) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("ldm", "diffusers"):
        with get_context("spawn").Pool(1) as pool:  # a new process, whose memory starts from nothing
            found[name] = pool.apply(side, (name, width))
    return found | {
        "times_as_fast": found["diffusers"]["seconds"] / found["ldm"]["seconds"],
        "memory_ratio": found["ldm"]["peak_bytes"] / found["diffusers"]["peak_bytes"],
        "settings": {"pixels": PIXELS, "batch": 1, "width": width, "steps": STEPS - SKIPPED},
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the file for the results")
    parser.add_argument("--width", type=int, default=320, help="width of the UNet; smaller for trial runs only (320)")
    args = parser.parse_args()
    if args.json:
        check_replaceable(args.json, "finetune")
    result = measure(args.width)
    print(json.dumps(result, indent=2))
    if args.json:
        save(args.json, "finetune", result)


if __name__ == "__main__":
    main()

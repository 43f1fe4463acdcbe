"""Compares a training step of the Trainer with minimal training loops around the same UNet and diffusers' UNet.

    ldm bench train --json FILE

The Trainer runs as `python train.py` does: keyed noise, batches by a DataLoader, gradient clipping, EMA, logging,
progress. The loops do only what is necessary: encode captions, add noise, forward, backward, clip, AdamW. On a CPU
processor time is measured, in one thread, because other jobs may share the machine; on a GPU wall time.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmark.trainer_steps import Latents, trainer_steps
from ldm.data.loading.datamodule import collate
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow
from ldm.diffusion.time_sampling import Uniform
from ldm.diffusion.weighting import uniform
from ldm.nn.unet import UNet
from ldm.random import normal
from ldm.training.diffusion import DiffusionTraining
from ldm.training.optim import constant
from ldm.weights.parts import first_stage, text_encoder

BATCH, SIDE, STEPS, SKIPPED, ROUNDS = 8, 32, 14, 4, 3
ARCHITECTURE = {"width": 64, "multipliers": (1, 2, 4), "blocks": 1, "depth": (1, 1, 1), "heads": 4, "groups": 32}
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-4, fused=True)
SAMPLING = {"sampler": "dpmpp_2m", "spacing": "trailing", "steps": 20, "guidance": 2.0}
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def by_hand(predict: Callable[..., Tensor], unet: nn.Module, module: DiffusionTraining, data: Latents) -> list[float]:
    """Returns the seconds of each step of a minimal loop; `predict` is (x, times, conditioning) → velocity."""
    unet.to(DEVICE)
    optimizer, times = OPTIMIZER(unet.parameters()), []
    for step in range(STEPS):
        began = now()
        batch = collate([data[index] for index in range(step * BATCH, (step + 1) * BATCH)])
        mean, log_variance = batch["moments"].to(DEVICE).float().chunk(2, dim=1)
        x0 = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        eps, t = torch.randn_like(x0), torch.rand(BATCH, device=DEVICE)
        x = x0.lerp(eps, t.view(-1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
        conditioning = module.conditioning(batch)
        loss = F.mse_loss(predict(x, 1000 * t, conditioning), eps - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        times.append(now() - began)
    return times


def peer(context_width: int) -> nn.Module:
    """Returns diffusers' UNet with the same architecture."""
    levels = len(ARCHITECTURE["multipliers"])  # type: ignore[arg-type]
    library: Any = diffusers  # its calls are untyped
    unet = library.UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=tuple(64 * multiplier for multiplier in ARCHITECTURE["multipliers"]),  # type: ignore[attr-defined]
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        attention_head_dim=4,
        cross_attention_dim=context_width,
        norm_num_groups=32,
    )
    network: nn.Module = unet.to(memory_format=torch.channels_last)
    return network


def noise_seconds() -> float:
    """Returns the seconds for the keyed random numbers of one step: posterior and noise."""
    ids, draw = torch.arange(BATCH, device=DEVICE), torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
    times = []
    for _ in range(20):
        began = now()
        for stream in ("posterior", "noise"):
            normal(0, stream, ids, draw, (4, SIDE, SIDE))
        times.append(now() - began)
    return median(times)


def measure() -> dict[str, Any]:
    """Returns median seconds per step over interleaved rounds, without their first steps."""
    torch.set_num_threads(1)
    data, schedule, text = Latents(BATCH * (STEPS + 1), SIDE), Flow(), text_encoder("assets:text_tower.safetensors")
    width = text.network.widths["text"]
    module = DiffusionTraining(
        UNet(**ARCHITECTURE, context_width=width),  # type: ignore[arg-type]
        first_stage("assets:vae.safetensors"),
        text,
        schedule,
        Prediction("flow"),
        uniform(),
        Uniform(schedule),
        OPTIMIZER,
        constant(),
        SAMPLING,
        (8 * SIDE, 8 * SIDE),
    )
    theirs = peer(width)
    found: dict[str, list[float]] = {"trainer": [], "loop": [], "diffusers": []}
    accelerator = "gpu" if ON_GPU else "cpu"
    for _ in range(ROUNDS):
        found["trainer"] += trainer_steps(module, data, BATCH, STEPS, now, accelerator=accelerator)[SKIPPED:]
        found["loop"] += by_hand(module.backbone, module.backbone, module, data)[SKIPPED:]
        found["diffusers"] += by_hand(lambda x, t, c: theirs(x, t, c.text).sample, theirs, module, data)[SKIPPED:]
    seconds = {name: median(times) for name, times in found.items()}
    for name, value in seconds.items():
        print(f"{name:<10} {1000 * value:9.1f} ms per step, {value / seconds['loop']:.3f} of the loop")
    return {
        "seconds_a_step": seconds,
        "trainer_over_loop": seconds["trainer"] / seconds["loop"],
        "diffusers_over_loop": seconds["diffusers"] / seconds["loop"],
        "keyed_noise_share": noise_seconds() / seconds["loop"],
        "parameters": sum(parameter.numel() for parameter in module.backbone.parameters()),
        "settings": {**ARCHITECTURE, "batch": BATCH, "latents": [4, SIDE, SIDE], "steps": ROUNDS * (STEPS - SKIPPED)},
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU, one thread, processor time",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }

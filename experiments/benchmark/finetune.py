"""Compares a training step of Stable Diffusion 1.5's UNet with that of diffusers' training script, on the CPU.

    ldm bench finetune --json FILE

A step trains all weights on one cached latent of 256x256 pixels and its caption in bf16-mixed, with gradient clipping,
AdamW and an EMA, which takes 20 GB of memory. The peer is the loop of diffusers' train_text_to_image.py with --use_ema:
its optimizer, which is not fused, and its `EMAModel`. ldm trains as train.py does, with the Trainer, progress, checks
of gradients, logging and the fused AdamW of `optimizer=adamw`. Each runs in a process of its own, one after the other,
because the two do not fit in memory together.
"""

import resource
import time
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from transformers import CLIPTextConfig, CLIPTextModel

from experiments.benchmark.trainer_steps import Latents, trainer_steps
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
ADAMW = {"lr": 1e-5, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}


def ours(width: int) -> list[float]:
    """Returns the seconds of each step."""
    schedule = scaled_linear()
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
    clock, data = time.perf_counter, Latents(STEPS + 1, PIXELS // 8)
    return trainer_steps(module, data, 1, STEPS, clock, accelerator="cpu", precision="bf16-mixed")


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

    data, seconds = Latents(STEPS, PIXELS // 8), []
    for index in range(STEPS):
        began = time.perf_counter()
        step(data[index])
        seconds.append(time.perf_counter() - began)
    return seconds


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

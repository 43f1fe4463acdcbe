"""Measures sampling from Stable Diffusion 1.5 at 512 px, guided: eager, compiled, as CUDA graphs, and by diffusers."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from experiments.benchmark.gpu import Line
from experiments.benchmark.gpu_stages.context import Context, filled
from experiments.benchmark.gpu_stages.training import captured
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser, Network
from ldm.diffusion.guidance import classifier_free
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from ldm.execution.compiling import compiled
from ldm.execution.offload import Offload
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.sampling.driver import get_solver, sample
from ldm.sampling.grid import Grid
from ldm.sampling.spacing import trailing

DTYPE = torch.bfloat16
TEXT_WIDTH = 768


def drawing(context: Context) -> Iterator[Line]:
    """Yields seconds of sampling with the eager UNet, of the same as a CUDA graph, and of the decoder."""
    unet = network(context)
    yield from sampled(context, unet, "eager")
    yield from decoded(context)


def drawing_compiled(context: Context) -> Iterator[Line]:
    """Yields seconds of sampling with the UNet compiled as `sample.py compile=true` does."""
    unet = network(context)
    context.gpu_only("torch.compile")
    began = time.perf_counter()
    fast = compiled(unet, Offload(context.device))
    latents(context, denoiser_of(fast), 1, context.size.drawing_steps[0])
    yield {"compile_seconds": time.perf_counter() - began}
    yield from sampled(context, fast, "compiled")


def network(context: Context) -> UNet:
    unet: UNet = filled(lambda: UNet(**context.size.unet), context.device).to(DTYPE)
    return unet.eval().requires_grad_(False)


def sampled(context: Context, unet: Network, name: str) -> Iterator[Line]:
    """Yields the seconds from noise to latents for every batch and number of steps, and the fastest of one image."""
    for batch in context.size.drawing_batches:
        for steps in context.size.drawing_steps:
            seconds = timed(context, unet, batch, steps)
            yield {f"{name}_batch_{batch}_steps_{steps}_seconds": seconds}
            if batch == 1:
                eager = seconds  # of the most steps, which come last
    with torch.no_grad():
        replayed = replaying(context, unet, 1)
    graph = timed(context, replayed, 1, steps)
    yield {f"{name}_graph_batch_1_steps_{steps}_seconds": graph, "fastest_seconds": min(eager, graph)}
    if context.on_gpu:
        yield {"peak_bytes": context.peak()}


def timed(context: Context, unet: Network, batch: int, steps: int) -> float:
    repeats, warmup = (2, 1) if context.on_gpu else (1, 0)
    denoiser = denoiser_of(unet)  # a pipeline keeps one, too
    return context.seconds(lambda: latents(context, denoiser, batch, steps), repeats, warmup)


def denoiser_of(unet: Network) -> Denoiser:
    return Denoiser(lambda x, t, text: unet(x.to(DTYPE), t, text), scaled_linear(), Prediction("eps"))


def latents(context: Context, denoiser: Denoiser, batch: int, steps: int) -> Tensor:
    """Samples latents (b, 4, h, w) by DPM-Solver++ 2M with guidance."""
    schedule = denoiser.schedule
    positive, negative = texts(context, 2 * batch).chunk(2)
    denoise = classifier_free(denoiser, Conditioning(text=positive), Conditioning(text=negative), 7.5)
    grid, side = Grid.to_final(schedule, trailing(schedule, steps), "zero"), context.size.side
    noise = torch.randn(batch, 4, side, side, device=context.device)
    x = grid.start(noise.contiguous(memory_format=torch.channels_last))
    return sample(get_solver("dpmpp_2m"), denoise, x, grid)


def texts(context: Context, count: int) -> Tensor:
    width = context.size.unet.get("context_width", TEXT_WIDTH)
    return torch.randn(count, 77, width, device=context.device, dtype=DTYPE)


def replaying(context: Context, unet: Network, batch: int) -> Network:
    """Returns the network as a CUDA graph for one batch size."""
    side = context.size.side
    x = torch.randn(batch, 4, side, side, device=context.device, dtype=DTYPE)
    x = x.contiguous(memory_format=torch.channels_last)
    time, text = torch.full((batch,), 500.0, device=context.device), texts(context, 2 * batch)
    outputs: list[Tensor] = []
    replay = captured(context, lambda: outputs.append(unet(x, time, Conditioning(text=text))))

    def run(new_x: Tensor, new_time: Tensor, conditioning: Conditioning) -> Tensor:
        x.copy_(new_x)
        time.copy_(new_time)
        text.copy_(conditioning.get("text"))
        replay()
        return outputs[-1].clone()

    return run


def decoded(context: Context) -> Iterator[Line]:
    vae: VAE = filled(lambda: VAE(**context.size.vae), context.device).eval().requires_grad_(False)
    for layers in vae.children():  # the scale keeps its precision, as in Pipeline.load
        layers.to(DTYPE)
    for batch in context.size.drawing_batches:
        z = torch.randn(batch, 4, context.size.side, context.size.side, device=context.device)
        with torch.no_grad():
            yield {f"decode_batch_{batch}_seconds": context.seconds(lambda: vae.decode(z), repeats=3)}  # noqa: B023


def peers(context: Context) -> Iterator[Line]:
    """Yields seconds of a guided call and of a training step without optimizer, by our UNet and diffusers'."""
    ours = network(context)
    theirs = diffusers_unet(context)
    for name, call in {"ldm": our_call(context, ours), "diffusers": their_call(context, theirs)}.items():
        for batch in context.size.drawing_batches:
            with torch.no_grad():
                seconds = context.mean_seconds(lambda: call(2 * batch), 10)  # noqa: B023
            yield {f"{name}_guided_batch_{batch}_seconds": seconds}
    ours.requires_grad_(True)
    theirs.requires_grad_(True)
    for name, call in {"ldm": our_call(context, ours), "diffusers": their_call(context, theirs)}.items():
        work = lambda: call(context.size.batch // 2).float().square().mean().backward()  # noqa: B023, E731
        yield {f"{name}_backward_batch_{context.size.batch // 2}_seconds": context.mean_seconds(work, 5)}


def our_call(context: Context, unet: UNet) -> Callable[[int], Tensor]:
    def call(batch: int) -> Tensor:
        x, time, text = inputs(context, batch)
        return unet(x, time, Conditioning(text=text))

    return call


def their_call(context: Context, unet: Any) -> Callable[[int], Tensor]:
    def call(batch: int) -> Tensor:
        x, time, text = inputs(context, batch)
        out: Tensor = unet(x, time, encoder_hidden_states=text, return_dict=False)[0]
        return out

    return call


def inputs(context: Context, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    side = context.size.side
    x = torch.randn(batch, 4, side, side, device=context.device, dtype=DTYPE)
    time = torch.full((batch,), 500.0, device=context.device)
    return x.contiguous(memory_format=torch.channels_last), time, texts(context, batch)


def diffusers_unet(context: Context) -> Any:
    """Returns diffusers' UNet with the architecture of ours."""
    import diffusers

    library: Any = diffusers  # its calls are untyped
    with torch.device("meta"):
        config = UNet(**context.size.unet).config
    attends = [bool(depth) for depth in config["depth"]]
    down = ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends]
    up = ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)]
    unet = filled(
        lambda: library.UNet2DConditionModel(
            sample_size=context.size.side,
            block_out_channels=[config["width"] * multiplier for multiplier in config["multipliers"]],
            layers_per_block=config["blocks"],
            down_block_types=down,
            up_block_types=up,
            cross_attention_dim=config["context_width"],
            attention_head_dim=config["heads"],
            norm_num_groups=config["groups"],
        ),
        context.device,
    )
    return unet.to(DTYPE).requires_grad_(False)

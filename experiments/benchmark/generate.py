"""Compares sampling from Stable Diffusion 1.5 at 512x512 with diffusers' eager pipeline, in one process.

    python -m experiments.benchmark.generate [--json FILE] [--steps N]      or: ldm bench generate --json FILE

Both use random weights, guidance, DPM-Solver++ 2M and the same steps, in float32 and bf16. A step is the UNet's work
for one guided step; a picture is the full pipeline, from two prompts to pixels. Networks are warm, rounds are
interleaved, and the fastest round counts. Wall time and processor time are reported; other work affects processor time
less.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.commands.bench.command import check_replaceable, save
from ldm.conditioning import Conditioning
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from ldm.execution.cpu_packing import can_pack, pack
from ldm.nn.clip import TextTower
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.settings import Settings

PEER: Any = diffusers  # its calls are untyped
PROMPT = "a photo of a cat"
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
SCHEDULER = {
    "steps_offset": 1,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
BLOCKS = 4  # levels of the UNet and of the autoencoder


def filled(make: Callable[[], nn.Module]) -> nn.Module:
    """Returns a network with weights copied from one block of random numbers, larger than any cache."""
    block = 0.02 * torch.randn(2**26)
    with torch.device("meta"):
        network = make().eval()
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = block[: parameter.numel()].view(parameter.shape).clone()
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    return network


def ours(dtype: torch.dtype, width: int) -> Pipeline:
    unet: Any = filled(lambda: UNet(width=width)).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    stage: Any = filled(lambda: VAE(widths=[width * m // 5 * 2 for m in (1, 2, 4, 4)]))
    for layers in stage.children():  # as Pipeline.load does
        layers.to(dtype)
    tower: Any = filled(TextTower).to(dtype)
    if can_pack(torch.device("cpu"), dtype):
        pack(unet)
    settings = Settings((512, 512), sampler="dpmpp_2m", guidance=7.5)
    parts = unet, stage.to(memory_format=torch.channels_last), TextEncoder([tower], [Tokenizer()])
    return Pipeline(*parts, scaled_linear(), Prediction("eps"), settings)


def theirs(dtype: torch.dtype, width: int) -> Any:
    down, up = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    widths = [width * m for m in (1, 2, 4, 4)]
    unet = filled(
        lambda: PEER.UNet2DConditionModel(
            sample_size=64, block_out_channels=widths, down_block_types=down, up_block_types=up,
            cross_attention_dim=768, attention_head_dim=8,
        )
    )  # fmt: skip
    stage = filled(
        lambda: PEER.AutoencoderKL(
            block_out_channels=[w // 5 * 2 for w in widths], layers_per_block=2, sample_size=512,
            down_block_types=["DownEncoderBlock2D"] * BLOCKS, up_block_types=["UpDecoderBlock2D"] * BLOCKS,
        )
    )  # fmt: skip
    pipe = PEER.StableDiffusionPipeline(
        vae=stage.to(dtype),
        text_encoder=None,
        tokenizer=None,
        unet=unet.to(dtype),
        scheduler=PEER.DPMSolverMultistepScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def race(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Returns the fastest of interleaved rounds by name."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began, used = time.perf_counter(), time.process_time()
            run()
            took[name].append((time.perf_counter() - began, time.process_time() - used))
    return {
        name: {"seconds": min(wall for wall, _ in times), "processor_seconds": min(cpu for _, cpu in times)}
        for name, times in took.items()
    }


@torch.no_grad()
def compared(dtype: torch.dtype, size: int, steps: int, rounds: int, width: int) -> dict[str, Any]:
    mine, peer = ours(dtype, width), theirs(dtype, width)
    x = torch.randn(1, 4, size // 8, size // 8).to(dtype, memory_format=torch.channels_last)
    context: Tensor = torch.randn(2, 77, 768).to(dtype)
    t, twice = torch.full((1,), 500.0), torch.cat([x.contiguous()] * 2)
    step = {
        "ldm": lambda: mine.backbone(x, t, Conditioning(text=context)),
        "diffusers": lambda: peer.unet(twice, 500, encoder_hidden_states=context, return_dict=False),
    }
    tower: Any = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    tower.to(dtype)
    tokens = mine.text_encoder.tokenize([PROMPT, ""])

    def their_picture() -> object:
        states = tower(input_ids=tokens)[0]
        given = {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:], "guidance_scale": 7.5}
        return peer(**given, num_inference_steps=steps, height=size, width=size)

    picture = {"ldm": lambda: mine(PROMPT, steps=steps, size=(size, size)), "diffusers": their_picture}
    mine(PROMPT, steps=1, size=(64, 64))
    peer(prompt_embeds=context[:1], negative_prompt_embeds=context[1:], num_inference_steps=1, height=64, width=64)
    return {"step": ratio(race(step, 2 * rounds)), "picture": ratio(race(picture, rounds))}


def ratio(raced: dict[str, dict[str, float]]) -> dict[str, Any]:
    keys = ("seconds", "processor_seconds")
    return raced | {"times_as_fast": {key: raced["diffusers"][key] / raced["ldm"][key] for key in keys}}


def measure(size: int = 512, steps: int = 3, rounds: int = 2, width: int = 320) -> dict[str, Any]:
    found = {name: compared(dtype, size, steps, rounds, width) for name, dtype in PRECISIONS.items()}
    default = found["float32"]["picture"]["diffusers"], found["bf16"]["picture"]["ldm"]
    return found | {
        "bf16_beside_their_float32": {key: default[0][key] / default[1][key] for key in default[0]},
        "size": size,
        "steps": steps,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the file for the results")
    parser.add_argument("--size", type=int, default=512, help="side of an image in pixels (512)")
    parser.add_argument("--steps", type=int, default=3, help="sampling steps per image (3)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="rounds for images, twice as many for steps; the fastest counts (2)",
    )
    parser.add_argument("--width", type=int, default=320, help="width of the UNet; smaller for trial runs only (320)")
    args = parser.parse_args()
    if args.json:
        check_replaceable(args.json, "generate")
    result = measure(args.size, args.steps, args.rounds, args.width)
    print(json.dumps(result, indent=2))
    if args.json:
        save(args.json, "generate", result)


if __name__ == "__main__":
    main()

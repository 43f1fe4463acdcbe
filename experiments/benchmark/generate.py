"""Compares Stable Diffusion 1.5 at 512x512 with diffusers at its best, on the CPU, in one process.

    python -m experiments.benchmark.generate [--json FILE] [--steps N]      or: ldm bench generate --json FILE

The peers are diffusers' pipeline as it is, with `channels_last`, and compiled by torch.compile, also with inductor's
freezing. The compiled ones, a batch of 4 and image to image are measured in bf16 only, because each takes minutes; the
time of compilation is reported separately. All use random weights, guidance, DPM-Solver++ 2M and the same steps.
Networks are warm, rounds are interleaved, and the fastest round of each counts. Wall time and processor time are
reported; other work affects processor time less.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from experiments.benchmark.shares import peak, shares
from ldm.commands.bench.command import check_replaceable, save
from ldm.conditioning import Conditioning
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from ldm.execution.cpu_packing import can_pack, fold, pack
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
EAGER, CHANNELS_LAST, COMPILED, FROZEN = (
    *("diffusers", "diffusers channels_last"),
    *("diffusers compiled", "diffusers compiled and frozen"),
)
STRENGTH = 0.5  # of image-to-image
SCHEDULER = {
    "steps_offset": 1,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
BLOCKS = 4  # levels of the UNet and of the autoencoder
Race = dict[str, Callable[[], object]]


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
    settings = Settings((512, 512), sampler="dpmpp_2m", guidance=7.5)
    stage = stage.to(memory_format=torch.channels_last)
    if can_pack(torch.device("cpu"), dtype):
        pack(unet)
        fold(stage)
    parts = unet, stage, TextEncoder([tower], [Tokenizer()])
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
    return pipeline(unet.to(dtype), stage.to(dtype))


def pipeline(unet: Any, stage: Any, kind: Any = PEER.StableDiffusionPipeline) -> Any:
    made = kind(
        vae=stage,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=PEER.DPMSolverMultistepScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def peers(dtype: torch.dtype, width: int) -> dict[str, Any]:
    """Returns diffusers' pipelines by name; all but the first have channels-last weights."""
    eager = theirs(dtype, width)
    made = {EAGER: eager}
    for name in (CHANNELS_LAST, COMPILED, FROZEN) if dtype == torch.bfloat16 else (CHANNELS_LAST,):
        unet, stage = (copy.deepcopy(each).to(memory_format=torch.channels_last) for each in (eager.unet, eager.vae))
        if name != CHANNELS_LAST:
            options: Any = {"freezing": name == FROZEN}  # or else the code of one might be used for the other
            unet.forward = torch.compile(unet.forward, dynamic=False, options=options)
            stage.decode = torch.compile(stage.decode, dynamic=False, options=options)
        made[name] = pipeline(unet, stage)
    return made


def race(runs: Race, rounds: int) -> dict[str, dict[str, float]]:
    """Returns the fastest of interleaved rounds by name, and how much slower the slowest was."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began, used = time.perf_counter(), time.process_time()
            run()
            took[name].append((time.perf_counter() - began, time.process_time() - used))
    return {
        name: {
            "seconds": min(wall for wall, _ in times),
            "processor_seconds": min(cpu for _, cpu in times),
            "slowest_over_fastest": max(wall for wall, _ in times) / min(wall for wall, _ in times),
        }
        for name, times in took.items()
    }


class Comparison:
    """What both sides compute, as one function per program."""

    def __init__(self, dtype: torch.dtype, width: int, size: int, steps: int) -> None:
        self.dtype, self.size, self.steps = dtype, size, steps
        self.mine, self.peers = ours(dtype, width), peers(dtype, width)
        config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        tower: Any = CLIPTextModel(config)
        self.tower = tower.to(dtype)
        self.tokens = self.mine.text_encoder.tokenize([PROMPT, ""])

    def text_encoder(self) -> Race:
        """The states of a prompt and of the empty one."""
        encoder = self.mine.text_encoder
        return {"ldm": lambda: encoder.encode([PROMPT, ""]), EAGER: lambda: self.tower(input_ids=self.tokens)}

    def unet(self, batch: int, names: tuple[str, ...]) -> Race:
        """A guided call of the UNet, for `batch` images."""
        x, text = self._noise(batch), torch.randn(2 * batch, 77, 768).to(self.dtype)
        t, conditioning = torch.full((batch,), 500.0), Conditioning(text=text)
        runs: Race = {"ldm": lambda: self.mine.backbone(x, t, conditioning)}
        for name in names:
            peer, twice = self.peers[name], torch.cat([x] * 2).contiguous(memory_format=self._format(name))
            runs[name] = partial(peer.unet, twice, 500, encoder_hidden_states=text, return_dict=False)
        return runs

    def decoder(self) -> Race:
        z, runs = self._noise(1), {}
        for name, peer in self.peers.items():
            theirs = z.contiguous(memory_format=self._format(name))
            runs[name] = partial(peer.vae.decode, theirs, return_dict=False)
        return {"ldm": lambda: self.mine.first_stage.decode(z), **runs}

    def picture(self) -> Race:
        """A full image, from two prompts to pixels."""
        given = {"height": self.size, "width": self.size, "num_inference_steps": self.steps}
        own = partial(self.mine, PROMPT, steps=self.steps, size=(self.size, self.size))
        names = EAGER, CHANNELS_LAST  # a picture would compile the networks again, for its types of arguments
        return {"ldm": own, **{name: partial(self._picture, self.peers[name], **given) for name in names}}

    def image_to_image(self) -> Race:
        image = PEER.utils.pt_to_pil(torch.rand(1, 3, self.size, self.size) * 2 - 1)[0]
        given = {"image": image, "strength": STRENGTH}
        own = partial(self.mine, PROMPT, steps=2 * self.steps, size=(self.size, self.size), **given)
        runs: Race = {"ldm": own}
        for name in (EAGER, CHANNELS_LAST):  # the encoder is not compiled
            peer = pipeline(self.peers[name].unet, self.peers[name].vae, PEER.StableDiffusionImg2ImgPipeline)
            runs[name] = partial(self._picture, peer, num_inference_steps=2 * self.steps, **given)
        return runs

    def _picture(self, peer: Any, **given: Any) -> object:
        states = self.tower(input_ids=self.tokens)[0]
        return peer(prompt_embeds=states[:1], negative_prompt_embeds=states[1:], guidance_scale=7.5, **given)

    def _noise(self, batch: int) -> Tensor:
        x = torch.randn(batch, 4, self.size // 8, self.size // 8).to(self.dtype)
        return x.to(memory_format=torch.channels_last)

    def _format(self, name: str) -> torch.memory_format:
        return torch.contiguous_format if name == EAGER else torch.channels_last


@torch.no_grad()
def compared(dtype: torch.dtype, size: int, steps: int, rounds: int, width: int) -> dict[str, Any]:
    rate = peak(dtype)
    comparison = Comparison(dtype, width, size, steps)
    races = {
        "text_encoder": (comparison.text_encoder(), 10 * rounds),
        "unet": (unet := comparison.unet(1, tuple(comparison.peers)), 2 * rounds),
        "decoder": (decoder := comparison.decoder(), 2 * rounds),
        "picture": (comparison.picture(), rounds),
    }
    if dtype == torch.bfloat16:
        races["unet_batch_4"] = comparison.unet(4, (EAGER, CHANNELS_LAST)), rounds
        races["image_to_image"] = comparison.image_to_image(), rounds
    compilation = {}
    for name in (COMPILED, FROZEN):
        if name in comparison.peers:
            began = time.perf_counter()
            with inductor.patch(freezing=name == FROZEN):  # dynamo reads it here, when the first call compiles
                unet[name](), decoder[name]()
            compilation[name] = time.perf_counter() - began
    found: dict[str, Any] = {}
    for name, (runs, count) in races.items():
        if name not in ("picture", "image_to_image"):  # these consist of warm parts
            race(runs, 1)
        found[name] = ratios(race(runs, count))
    return found | {
        "compilation_seconds": compilation,
        "matrix_product_flops_per_second": rate,
        "share_of_matrix_product": {
            "unet": shares(comparison.mine.backbone, unet["ldm"], rate),
            "decoder": shares(comparison.mine.first_stage.decoder, decoder["ldm"], rate),
        },
    }


def ratios(raced: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Adds how many times as fast as each peer ldm is."""
    keys = ("seconds", "processor_seconds")
    return raced | {
        "times_as_fast_as": {
            name: {key: took[key] / raced["ldm"][key] for key in keys} for name, took in raced.items() if name != "ldm"
        }
    }


def processor() -> dict[str, Any]:
    """Returns the processor's name, and the instruction sets that matter for matrix products."""
    about = torch.cpu.get_capabilities()
    sets = [name for name, has in about.items() if has is True and name.startswith(("avx", "amx", "fma"))]
    return {"name": about.get("cpu_name", "unknown"), "instruction_sets": sorted(sets)}


def measure(
    size: int = 512, steps: int = 3, rounds: int = 2, width: int = 320, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Measures the precisions that are not among the `earlier` results."""
    found = {
        name: (earlier or {}).get(name) or compared(dtype, size, steps, rounds, width)
        for name, dtype in PRECISIONS.items()
    }
    default = found["float32"]["picture"][EAGER], found["bf16"]["picture"]["ldm"]
    return found | {
        "bf16_beside_their_float32": {
            key: default[0][key] / default[1][key] for key in ("seconds", "processor_seconds")
        },
        "size": size,
        "steps": steps,
        "rounds": rounds,
        "width": width,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "processor": processor(),
    }


def kept(file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the other precision's results of a file. Raises ValueError unless they have the same settings."""
    found = json.loads(file.read_text())
    settings = {name: getattr(args, name) for name in ("size", "steps", "rounds", "width")}
    if (held := {name: found.get(name) for name in settings}) != settings:
        raise ValueError(f"{file} has results with {held}, which cannot be kept beside new ones with {settings}")
    return {name: found[name] for name in PRECISIONS if name != args.only}


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
    parser.add_argument(
        "--only", choices=PRECISIONS, help="measure this precision again, and keep the other one of the JSON file"
    )
    args = parser.parse_args()
    if args.only and not args.json:
        parser.error("--only needs the --json that has the other precision")
    if args.json:
        check_replaceable(args.json, "generate")
    earlier = kept(args.json, args) if args.only else None
    result = measure(args.size, args.steps, args.rounds, args.width, earlier)
    print(json.dumps(result, indent=2))
    if args.json:
        save(args.json, "generate", result)


if __name__ == "__main__":
    main()

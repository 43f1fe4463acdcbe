"""Defines the arguments of `ldm evaluate`."""

import argparse
from pathlib import Path

from ldm.commands.device_arguments import add_device_arguments
from ldm.weights.recognise import READABLE

TOWERS = "assets:image_tower.safetensors", "assets:text_tower.safetensors"
SWEPT = {  # several values, separated by commas, make a sweep
    "steps": "sampling steps (the model's own)",
    "guidance": "guidance scale; 1 is no guidance (the model's own)",
    "sampler": "such as ddim, dpmpp_2m or DPM++ 2M Karras (the model's own)",
    "spacing": "time step spacing, such as trailing or karras (the model's own)",
    "ema-length": "length of the average of a run's weights; needs ema=power, see `ldm ema`",
    "seed": "prompt i of n is sampled with the noise of seed · n + i (0)",
}
NUMBERS = (
    ("prompts", 512, 1, "images to sample, at most one per caption"),
    ("count", 2048, 1, "real images to compare with, limited by the data"),
    ("batch", 64, 1, "images per batch"),
    ("validation", 128, 0, "real images for the error by noise level; 0 to skip it"),
    ("held-out", 0, 0, "use only data held out by training with data.held_out_every=N; 0 uses all"),
    ("resamples", 0, 0, "bootstrap resamples for fid_error and kid_error; 0 to skip them"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sample images from a model and compute the metrics of a run: FID, KID, precision, recall, CLIP score, error "
        "by noise level, and for shapes whether each image matches its prompt. The same command resumes a stopped "
        "evaluation; `torchrun --nproc-per-node N -m ldm evaluate …` splits it over processes, with the same results. "
        "Several values separated by commas (--steps 5,10,20 --guidance 1,2) make a sweep: a table, JSON that "
        "`ldm compare` reads, and plots of quality against seconds and network calls."
    )
    parser.add_argument("model", metavar="MODEL", help=READABLE)
    parser.add_argument("--data", required=True, metavar="D", help="shapes, a folder of images, shards, or a cache")
    parser.add_argument("--out", required=True, type=Path, metavar="F", help="the JSON file to write")
    for name, text in SWEPT.items():
        parser.add_argument(f"--{name}", metavar=name[0].upper(), help=text)
    for name, default, _, text in NUMBERS:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--infinity", action="store_true", help="also extrapolate FID to infinitely many images")
    parser.add_argument(
        "--features", default=TOWERS[0], metavar="W", help="a CLIP, or a .pth of Inception-v3 (the built-in tower)"
    )
    parser.add_argument("--clip", metavar="W", help="a complete CLIP for the CLIP score (the built-in towers)")
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="file in which to keep the features of the real images for reuse"
    )
    add_device_arguments(parser, precision="32")

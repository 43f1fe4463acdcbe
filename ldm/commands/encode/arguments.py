"""Defines the arguments of `ldm encode`."""

import argparse
import os
from pathlib import Path

from ldm.commands.captions_argument import PLACES, add_captions_argument

NUMBERS = (
    ("size", 64, 1, "pixels per side; the short side is scaled to it and the long side is cropped around the centre"),
    ("buckets", 0, 0, "step in pixels of the sides of aspect-ratio buckets, such as 64; 0 crops all images to squares"),
    ("batch", 32, 1, "images per batch"),
    ("workers", min(4, os.cpu_count() or 1), 0, "processes that decode images; 0 decodes in the main process"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Encode the images of shards into latents for training with data=latents data.cache=DIR. An interrupted "
        "command resumes when it is run again: it verifies the checksums of the encoded shards, and encodes the "
        "missing and the damaged ones; under torchrun or SLURM the ranks split the shards. Latents are of the "
        "unaugmented images, so training has no flips or random crops."
    )
    parser.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="tars, patterns such as 'x-{000..099}.tar', or folders"
    )
    parser.add_argument(
        "--first-stage",
        default="assets:vae.safetensors",
        metavar="FILE",
        help="the autoencoder: a file, a diffusers folder or a complete model (default: the small one that ships)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the cache")
    add_captions_argument(parser, f"{PLACES} (a string or a list) (default: txt, or else the caption in json)")
    parser.add_argument(
        "--text-encoder",
        metavar="FILE",
        help="also store the text encoder's states of all captions, for data=latents_and_text; for Stable Diffusion "
        "1.x 118 kB per caption, in addition to 66 kB of latents per image (default: none, training runs the encoder)",
    )
    parser.add_argument(
        "--text-dtype",
        choices=("float16", "float32"),
        help="type of the stored states (default: float16, with 3 significant digits)",
    )
    for name, default, _, unit in NUMBERS:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{unit} (default: %(default)s)")

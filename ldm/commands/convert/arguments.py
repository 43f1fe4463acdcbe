"""Defines the arguments of `ldm convert`."""

import argparse
from pathlib import Path

from ldm.weights.adapters.layouts import KOHYA
from ldm.weights.formats import FORMATS
from ldm.weights.kinds import KINDS
from ldm.weights.recognise import READABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Convert weights between single files of Stable Diffusion (.safetensors, .ckpt), diffusers folders and ldm's "
        "own format, and adapters and textual inversions between the layouts of kohya (read by A1111 and ComfyUI) and "
        "of diffusers. If any tensor is missing, unexpected or of the wrong shape, all such tensors are listed and "
        "nothing is written."
    )
    parser.add_argument("source", help=f"{READABLE}; also a standalone autoencoder, denoising network or CLIP")
    parser.add_argument("destination", type=Path, help="a .safetensors or .ckpt; without an extension, a folder")
    parser.add_argument(
        "--to",
        choices=(*FORMATS, KOHYA),
        help="the format; by default single, of adapters kohya, for a file, diffusers for a folder",
    )
    parser.add_argument("--part", choices=list(KINDS), help="convert only this network of a complete model")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: that of the source")
    parser.add_argument(
        "--shard", metavar="SIZE", help="split a folder's weights into files of at most SIZE, such as 2GB"
    )
    parser.add_argument("--raw", action="store_true", help="the raw weights, even if their moving average is stored")
    parser.add_argument("--prediction", choices=["eps", "v"], help="what the model in a single file of SD 2.x predicts")
    parser.add_argument("--variant", help="of a diffusers folder, such as fp16; default: the files without one")
    parser.add_argument("--overwrite", action="store_true", help="replace the destination if a conversion wrote it")

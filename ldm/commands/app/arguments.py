"""Defines the arguments of `ldm app`."""

import argparse

from ldm.commands.device_arguments import add_device_arguments
from ldm.execution.offload_modes import MODES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Serve a page that generates images from prompts or source images, and replaces painted areas of an image.\n"
        "Needs Gradio: pip install -e '.[app]'. Ctrl-C stops the server."
    )
    parser.epilog = (
        "examples:\n"
        "  ldm app                        the built-in model; open the printed address\n"
        "  ldm app --models runs          also every run, .safetensors, .ckpt and diffusers folder inside runs\n"
        "  ldm app --lora-dir loras       also every LoRA and textual inversion inside loras\n"
        "  ldm app --host 0.0.0.0         reachable from the network; anyone who opens it can generate images\n\n"
        "Images are saved in the format of sample.py: `python sample.py from=IMAGE.png` reproduces one, and dropping\n"
        "one on the page restores its settings. Uploads are limited to 32 MiB and 16.8 million pixels."
    )
    parser.add_argument("--models", metavar="DIR", help="also offer the models inside this folder")
    parser.add_argument(
        "--lora-dir", metavar="DIR", help="offer the LoRA files and textual inversions inside this folder"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="samples",
        help="parent of the folder for images, which is named after the time (%(default)s)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to serve on (%(default)s)")
    add_device_arguments(parser, precision="auto")
    parser.add_argument(
        "--offload",
        choices=MODES,
        default="none",
        help="what to keep off the GPU: nothing, idle networks, or all layers (%(default)s)",
    )

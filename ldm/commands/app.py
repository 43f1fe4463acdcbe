"""Implements `ldm app`: a page for sampling images in a browser."""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from threading import Event

from ldm.app.models import find_models
from ldm.commands.device_arguments import add_device_arguments
from ldm.device import choose_device
from ldm.errors import UsageError
from ldm.execution.offload import MODES
from ldm.files import check_writable


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


def run(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C."""
    if find_spec("gradio") is None:
        raise UsageError(
            "the page needs Gradio: pip install 'gradio>=6,<7', or pip install -e '.[app]' in the checkout"
        )
    if not 0 < args.port < 2**16:
        raise UsageError(f"--port {args.port}: expected 1 to 65535")
    choose_device(args.device)  # raises for an unknown device before the page is served
    from ldm.app.server import serve  # imported here because it needs Gradio
    from ldm.app.service import Service

    models, skipped = find_models(args.models)
    for reason in skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    out = Path(args.out).expanduser() / time.strftime("%Y-%m-%d_%H-%M-%S")
    check_writable(out)
    service = Service(models, out, args.device, args.precision, args.offload, args.lora_dir)
    blocks = serve(service, args.host, args.port)
    print(f"{blocks.local_url}  ({len(models)} models; images are saved in {out}; Ctrl-C stops the server)", flush=True)
    try:
        Event().wait()
    finally:
        blocks.close(verbose=False)

"""`ldm app`: draw in a browser."""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from threading import Event

from ldm.app.models import offered
from ldm.commands.device_arguments import add_device_arguments
from ldm.device import choose_device
from ldm.errors import UsageError
from ldm.execution.offload import MODES
from ldm.files import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Serve a page that draws: from prompts, from pictures, or what you paint over in one.\n"
        "Needs Gradio: pip install -e '.[app]'. Ctrl-C ends it."
    )
    parser.epilog = (
        "examples:\n"
        "  ldm app                        the model that ships; open the address that is printed\n"
        "  ldm app --models runs          every run, .safetensors, .ckpt and diffusers folder inside runs, too\n"
        "  ldm app --host 0.0.0.0         for everyone in the network: who can open it can draw\n\n"
        "Pictures are saved as sample.py saves them, so `python sample.py from=PICTURE.png` draws one again, and\n"
        "dropped on the page it restores its settings. Uploads: at most 32 MiB and 16.8 million pixels."
    )
    parser.add_argument("--models", metavar="DIR", help="offer the models inside this folder, and none outside of it")
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="samples",
        help="where pictures go, into a folder named by the time (%(default)s)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve (%(default)s: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="port to serve (%(default)s)")
    add_device_arguments(parser, precision="auto")
    parser.add_argument("--offload", choices=MODES, default="none", help="what waits beside the GPU (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Serves until Ctrl-C."""
    if find_spec("gradio") is None:
        raise UsageError(
            "the page needs Gradio: pip install 'gradio>=6,<7', or pip install -e '.[app]' in the checkout"
        )
    if not 0 < args.port < 2**16:
        raise UsageError(f"--port {args.port}: expected 1 to 65535")
    choose_device(args.device)  # for its refusal, before a picture is asked for
    from ldm.app.server import serve  # not before it is known that Gradio is there
    from ldm.app.service import Service

    models, refusals = offered(args.models)
    for refusal in refusals:
        print(f"not offered: {refusal}", file=sys.stderr)
    out = Path(args.out).expanduser() / time.strftime("%Y-%m-%d_%H-%M-%S")
    check_writable(out)
    blocks = serve(Service(models, out, args.device, args.precision, args.offload), args.host, args.port)
    print(f"{blocks.local_url}  ({len(models)} models; pictures go to {out}; Ctrl-C ends it)", flush=True)
    try:
        Event().wait()
    finally:
        blocks.close(verbose=False)

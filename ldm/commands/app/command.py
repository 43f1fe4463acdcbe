"""Implements `ldm app`: a page for sampling images in a browser."""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from threading import Event

from ldm.app.models import find_models
from ldm.device import choose_device
from ldm.errors import UsageError
from ldm.files import check_writable


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

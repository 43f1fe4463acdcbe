"""The `ldm` command, which parses a subcommand's arguments before it imports what runs it, which can take seconds.

Each subcommand is a package of ldm/commands: arguments.py has `add_arguments` and does not import torch, command.py has
`run`.
"""

import argparse
import re
import sys
from difflib import get_close_matches
from importlib import import_module

from ldm import errors

COMMANDS = {
    "app": "generate images in a web browser",
    "bench": "run a benchmark against its peers, from the checkout",
    "compare": "compare runs in a report with error bars, curves and images",
    "download": "download the images of filtered metadata into shards, with img2dataset",
    "encode": "encode the images of shards into a cache of latents for training",
    "ema": "compute averages of a run's weights, of any length, from its snapshots",
    "emoji": "build the emoji data set from its npm package",
    "convert": "convert weights between formats",
    "evaluate": "evaluate a model on data, at one setting or in a sweep over many",
    "extract": "write the difference of two models as a LoRA",
    "filter": "keep the rows of metadata that are worth downloading, and count the rejected ones by reason",
    "info": "describe a model, a checkpoint, a run or a cache of latents",
    "merge": "merge adapters into a model, and write it",
    "shards": "write a folder of images with captions to shards",
    "status": "show the steps, speed, remaining time and latest metrics of runs, live",
    "verify": "check a cache of latents or shards of images",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code."""
    if argv is None:
        errors.end_quietly_on_closed_pipes()
        argv = sys.argv[1:]
    listing = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    top = argparse.ArgumentParser(
        prog="ldm",
        usage="ldm COMMAND …",
        description=f"Tools for latent diffusion models.\n\ncommands:\n{listing}",
        epilog="`ldm COMMAND --help` describes a command and its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    name = top.parse_args(argv[:1]).command
    parser = argparse.ArgumentParser(prog=f"ldm {name}", allow_abbrev=False)
    try:
        import_module(f"ldm.commands.{name}.arguments").add_arguments(parser)
    except KeyboardInterrupt:
        return 130
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, unknown = parser.parse_known_args(argv[1:])
    if unknown:
        near = get_close_matches(unknown[0].partition("=")[0], re.findall(r"--[\w-]+", parser.format_usage()), n=1)
        parser.error(f"unrecognized argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    return errors.run(lambda: import_module(f"ldm.commands.{name}.command").run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())

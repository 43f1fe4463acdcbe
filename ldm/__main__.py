"""The `ldm` command, which parses a subcommand's arguments before it imports what runs it, which can take seconds.

Each subcommand is a package of ldm/commands: arguments.py has `add_arguments` and does not import torch, command.py has
`run`.
"""

import argparse
import re
import sys
from collections.abc import Iterable
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
    top.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    if not argv:
        top.error("no command was given; `ldm --help` lists them")
    name = top.parse_args(argv[:1]).command
    if name not in COMMANDS:
        top.error(f"there is no command {name}; {_nearest(name, COMMANDS) or '`ldm --help` lists them'}")
    parser = argparse.ArgumentParser(prog=f"ldm {name}", allow_abbrev=False)
    try:
        import_module(f"ldm.commands.{name}.arguments").add_arguments(parser)
    except KeyboardInterrupt:
        return 130
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, unknown = parser.parse_known_args(argv[1:])
    if unknown:
        hint = _nearest(_in_our_words(unknown[0].partition("=")[0]), re.findall(r"--[\w-]+", parser.format_usage()))
        parser.error(f"unrecognized argument {unknown[0]}" + (f"; {hint}" if hint else ""))
    return errors.run(lambda: import_module(f"ldm.commands.{name}.command").run(args), args.debug)


def _in_our_words(option: str) -> str:
    """Returns the option of the same meaning as one of diffusers or A1111, such as --num_inference_steps."""
    from ldm.synonyms.table import SAMPLING, Same

    found = SAMPLING.get(option.lstrip("-").replace("-", "_"))
    return f"--{found.ours}" if isinstance(found, Same) else option


def _nearest(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, list(names), n=1)
    return f"did you mean {close[0]}?" if close else ""


if __name__ == "__main__":
    sys.exit(main())

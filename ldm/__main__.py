"""The `ldm` command: one module of ldm/commands a subcommand, imported only when it is asked for."""

import argparse
import re
import sys
from difflib import get_close_matches
from importlib import import_module

from ldm import errors

COMMANDS = {
    "app": "draw in a browser",
    "bench": "measure something next to its peers, from the checkout",
    "compare": "compare runs: a report with error bars, curves and pictures",
    "download": "fetch the pictures of filtered metadata into shards, with img2dataset",
    "encode": "the pictures of shards as latents, once, for training",
    "ema": "averages of a run's weights of any length, from its snapshots",
    "emoji": "make the emoji data set from its npm package",
    "convert": "weights from any format to any other",
    "extract": "a LoRA from the difference of two models",
    "evaluate": "a model on data: pictures drawn and measured, for one setting or a sweep of many",
    "filter": "keep the rows of metadata that are worth downloading, and say why the others went",
    "info": "say what a model, a checkpoint, a run or a cache is",
    "merge": "adapters into a model, as a model of its own",
    "status": "what runs are doing: steps, rate, time left, latest numbers, live",
    "verify": "check a cache of latents or shards of pictures",
}
PACKAGES = ("evaluate", "filter", "info")  # commands of several modules


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    listing = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    top = argparse.ArgumentParser(
        prog="ldm",
        usage="ldm COMMAND …",
        description=f"Tools around latent diffusion models.\n\ncommands:\n{listing}",
        epilog="`ldm COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    name = top.parse_args(argv[:1]).command
    try:
        command = import_module(f"ldm.commands.{name}.command" if name in PACKAGES else f"ldm.commands.{name}")
    except KeyboardInterrupt:  # which takes seconds
        return 130
    parser = argparse.ArgumentParser(prog=f"ldm {name}", description=command.__doc__, allow_abbrev=False)
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, unknown = parser.parse_known_args(argv[1:])
    if unknown:
        near = get_close_matches(unknown[0].partition("=")[0], re.findall(r"--[\w-]+", parser.format_usage()), n=1)
        parser.error(f"unrecognized argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    return errors.run(lambda: command.run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())

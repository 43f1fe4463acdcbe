"""Implements `ldm bench`, which runs a benchmark from the checkout, where experiments/ is."""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ldm.commands.bench.arguments import BENCHES
from ldm.errors import UsageError
from ldm.files import check_writable, write_json
from ldm.ownership import refuse

CHECKOUT = Path(__file__).parents[3]


def run(args: argparse.Namespace) -> None:
    module, _ = BENCHES[args.name]
    if not (CHECKOUT / "experiments").is_dir():
        raise FileNotFoundError(
            f"ldm bench needs the folder experiments/, which {CHECKOUT} does not contain: run it from a checkout"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    if args.kills is not None and (args.name != "faults" or args.kills < 1):
        raise UsageError(
            f"--kills {args.kills} was given for {args.name}, but is only for `ldm bench faults`, and at least 1"
        )
    if args.json is not None:
        check_replaceable(args.json, args.name)
    numbers = import_module(module).measure(*([] if args.kills is None else [args.kills]))
    if args.json is None:
        return print(json.dumps(numbers, indent=2))
    save(args.json, args.name, numbers)
    print(args.json)


def check_replaceable(path: Path, name: str) -> None:
    """Raises FileExistsError if the file is not a result of this benchmark, OSError if it cannot be written."""
    check_writable(path.parent)
    if path.exists() and not _holds_benchmark(path, name):
        refuse([path], f"ldm bench {name}", "move it away, or give another --json")


def _holds_benchmark(path: Path, name: str) -> bool:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and held.get("bench") == name


def save(path: Path, name: str, numbers: dict[str, Any]) -> None:
    """Writes the numbers with the benchmark's name, so that the same command may replace them."""
    write_json(path, {"bench": name} | numbers)

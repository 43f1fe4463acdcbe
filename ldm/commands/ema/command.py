"""Implements `ldm ema`, which reconstructs averages of a run's weights from the snapshots of ema=power."""

import argparse
from pathlib import Path

from ldm.drawing.keys import number
from ldm.ema.profiles import exponent
from ldm.ema.reconstruction import last_step, read_snapshots, reconstruct
from ldm.errors import UsageError
from ldm.ownership import refuse
from ldm.weights.native import read_about, save_network

MAX_ERROR = 0.05  # fraction of a profile's norm above which the approximation is poor


def run(args: argparse.Namespace) -> None:
    lengths = _parse_lengths(args.length)
    snapshots = read_snapshots(args.run)
    first, last = min(about["ema"]["step"] for about in snapshots.values()), last_step(snapshots)
    step = last if args.step is None else args.step
    if not first <= step <= last:
        raise UsageError(
            f"--step {step} has no average: give a step from {first} to {last}, where {args.run} has snapshots"
        )
    snapshots = {file: about for file, about in snapshots.items() if about["ema"]["step"] <= step}
    names = {length: (args.out or args.run) / f"ema_{length:.3f}.safetensors" for length in lengths}
    foreign = [name for name in names.values() if name.exists() and not _is_average(name)]
    refuse(foreign, "ldm ema", "move it away, or give another --out")
    for length, name in names.items():
        state, error = reconstruct(snapshots, step, length)
        about = next(iter(snapshots.values())) | {"ema": {"length": length, "step": step}}
        save_network(name, state=state, **about)
        print(f"{name}: error of the average's profile {error:.2%}{_advice(error)}")


def _is_average(file: Path) -> bool:
    try:
        return "length" in read_about(file).get("ema", {})
    except (OSError, ValueError, TypeError):
        return False


def _parse_lengths(text: str) -> list[float]:
    try:
        lengths = [number(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--length {text}: expected {error}, or several separated by commas, such as 0.05,0.1"
        ) from error
    check_lengths(lengths)
    return lengths


def check_lengths(lengths: list[float]) -> None:
    """Raises UsageError for a length that no average has."""
    try:
        [exponent(length) for length in lengths]
    except ValueError as error:
        raise UsageError(str(error)) from error


def _advice(error: float) -> str:
    return (
        ""
        if error <= MAX_ERROR
        else " (poor): choose a length closer to the tracked ones, or write snapshots more often"
    )

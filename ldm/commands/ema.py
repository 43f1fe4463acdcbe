"""`ldm ema`: averages of a run's weights over any share of its training, from the snapshots of ema=power."""

import argparse
from pathlib import Path

from ldm.drawing.keys import number
from ldm.ema.profiles import exponent
from ldm.ema.reconstruction import last_step, read_snapshots, reconstruct
from ldm.errors import UsageError
from ldm.ownership import refuse
from ldm.weights.native import read_about, save_network

OFF = 0.05  # of a profile's norm, beyond which the result is no good approximation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make averages of a run's weights over any share of its training, as if they had been tracked, from the "
        "snapshots that ema=power wrote. Each is a model: python sample.py model=RUN/ema_0.070.safetensors"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run that was trained with ema=power")
    parser.add_argument(
        "--length",
        required=True,
        metavar="L,L,…",
        help="standard deviations of the averages, as shares of the training; above 0 and below 0.288",
    )
    parser.add_argument("--step", type=int, metavar="N", help="where the averages end (default: the last snapshot)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the models go (default: RUN)")


def run(args: argparse.Namespace) -> None:
    lengths = _lengths(args.length)
    snapshots = read_snapshots(args.run)
    last = last_step(snapshots)
    step = last if args.step is None else args.step
    snapshots = {file: about for file, about in snapshots.items() if about["ema"]["step"] <= step}
    if not 0 < step <= last or not snapshots:
        raise ValueError(f"the snapshots of {args.run} end at step {last}: none makes an average of step {step}")
    names = {length: (args.out or args.run) / f"ema_{length:.3f}.safetensors" for length in lengths}
    foreign = [name for name in names.values() if name.exists() and not _is_average(name)]
    refuse(foreign, "ldm ema", "move it away, or give another --out")
    for length, name in names.items():
        state, off = reconstruct(snapshots, step, length)
        about = next(iter(snapshots.values())) | {"ema": {"length": length, "step": step}}
        save_network(name, state=state, **about)
        print(f"{name}: the average's profile is off by {off:.2%}{_advice(off)}")


def _is_average(file: Path) -> bool:
    try:
        return "length" in read_about(file).get("ema", {})
    except (OSError, ValueError, TypeError):
        return False


def _lengths(text: str) -> list[float]:
    try:
        lengths = [number(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--length {text}: expected {error}, or several between commas, such as 0.05,0.1") from error
    check_lengths(lengths)
    return lengths


def check_lengths(lengths: list[float]) -> None:
    """Raises UsageError for one that no average has."""
    try:
        [exponent(length) for length in lengths]
    except ValueError as error:
        raise UsageError(str(error)) from error


def _advice(off: float) -> str:
    return "" if off <= OFF else ", too much: choose a length nearer to those tracked, or write snapshots more often"

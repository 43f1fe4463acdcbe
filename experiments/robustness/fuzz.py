"""Gives ldm files that were changed at random, and counts what it refuses, accepts, and does wrong.

python -m experiments.robustness.fuzz --seconds 600 --json experiments/robustness/fuzz.json
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

from experiments.robustness.targets import TARGETS, Target, prepare

REFUSALS = (ValueError, FileNotFoundError, NotADirectoryError, FloatingPointError)
MOST_SECONDS = 20.0  # upper limit for one file


def attempt(target: Target, random: Random, folder: Path) -> str:
    """Returns "accepted", "refused", or a description of the defect: an unexpected error, no message, or a timeout."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target(random, folder)
        outcome = "accepted"
    except REFUSALS as error:
        outcome = "refused" if len(str(error)) > 10 and not isinstance(error, UnicodeError) else traceback.format_exc()
    except Exception:  # a defect: any error other than a refusal
        outcome = traceback.format_exc()
    seconds = time.monotonic() - start
    return outcome if seconds < MOST_SECONDS else f"took {seconds:.0f} s"


def campaign(seconds: float, seed: int) -> dict[str, Any]:
    """Runs the targets in turn for `seconds`; returns the counts per target and the seeds of the failures."""
    counts: dict[str, dict[str, int]] = {
        name: {"tried": 0, "refused": 0, "accepted": 0, "wrong": 0} for name in TARGETS
    }
    wrong: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        number = 0
        while time.monotonic() < end:
            for name, target in TARGETS.items():
                outcome = attempt(target, Random(f"{seed} {number} {name}"), Path(folder))
                counts[name]["tried"] += 1
                kind = outcome if outcome in ("accepted", "refused") else "wrong"
                counts[name][kind] += 1
                if kind == "wrong":
                    wrong.append({"target": name, "seed": f"{seed} {number} {name}", "outcome": outcome})
                    print(f"{name}, seed {seed} {number}:\n{outcome}", file=sys.stderr)
            number += 1
    total = {key: sum(count[key] for count in counts.values()) for key in ("tried", "refused", "accepted", "wrong")}
    return {"seconds": seconds, "seed": seed, "total": total, "targets": counts, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the counts")
    args = parser.parse_args()
    found = campaign(args.seconds, args.seed)
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

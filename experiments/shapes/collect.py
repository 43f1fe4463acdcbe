"""Collects finished runs of experiment=shapes in results.json and accuracy.png.

    python experiments/shapes/collect.py [--speed N] RUN…

With --speed, minutes are computed for N images/s, the speed of an idle machine, for runs that shared theirs.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
BATCH = 64  # batch size of experiment=shapes


def read(run: Path, speed: float | None) -> dict[str, Any]:
    """Returns a run's steps, seed, minutes of training and metrics."""
    report = json.loads((run / "metrics.json").read_text())
    metrics, provenance = report["metrics"], report["provenance"]
    return {
        "steps": provenance["steps"],
        "seed": provenance["seed"],
        "commit": provenance["commit"],
        "minutes": (BATCH * provenance["steps"] / speed if speed else metrics["training_seconds"]) / 60,
        **metrics,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values)} | ({"std": statistics.stdev(values)} if len(values) > 1 else {})


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Plots the accuracy of every run against its minutes of training."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    lines = {"accuracy": "all right", "accuracy_shape": "shape right", "accuracy_color": "colour right"}
    by_steps = defaultdict(list)
    for run in runs:
        by_steps[run["steps"]].append(run)
    for name, label in lines.items():
        minutes = [statistics.mean(run["minutes"] for run in group) for _, group in sorted(by_steps.items())]
        shares = [statistics.mean(run[name] for run in group) for _, group in sorted(by_steps.items())]
        (line,) = axes.plot(minutes, [100 * share for share in shares], label=label)
        axes.scatter([r["minutes"] for r in runs], [100 * r[name] for r in runs], color=line.get_color(), s=14)
    axes.set(xlabel="minutes of training, two CPU cores", ylabel="held-out prompts, %", ylim=(0, 101), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--speed", type=float, metavar="N", help="compute minutes for N images/s")
    args = parser.parse_args()
    runs = sorted((read(path, args.speed) for path in args.runs), key=lambda run: (run["steps"], run["seed"]))
    numbers = [name for name, value in runs[0].items() if isinstance(value, float)]
    lengths = {run["steps"]: [other for other in runs if other["steps"] == run["steps"]] for run in runs}
    summary = {
        steps: {name: spread([run[name] for run in alike]) for name in numbers} for steps, alike in lengths.items()
    }
    (HERE / "results.json").write_text(json.dumps({"summary": summary, "runs": runs}, indent=2) + "\n")
    plot(runs, HERE / "accuracy.png")
    for steps, values in summary.items():
        print(f"{steps} steps, {len(lengths[steps])} seeds")
        for name, value in values.items():
            print(f"  {name:22} {value['mean']:.4g}" + (f" ± {value['std']:.2g}" if "std" in value else ""))


if __name__ == "__main__":
    main()

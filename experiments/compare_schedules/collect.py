"""Collects finished runs of the study in results.json, and prints the README's tables of schedules × predictions.

    python experiments/compare_schedules/collect.py runs/compare_schedules/*/

Run it from the checkout. A cell is the mean over seeds with its 95 % interval, or `refused` if train.py refuses it.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra import compose, initialize_config_dir

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
sys.path.insert(0, str(CHECKOUT))

from ldm.commands.train.checks import check  # noqa: E402 - found by the line before
from ldm.commands.train.messages import sentence  # noqa: E402
from ldm.files import write_json  # noqa: E402
from ldm.report.comparison import compare, plain  # noqa: E402
from ldm.report.metric import KNOWN, Metric  # noqa: E402
from ldm.report.runs import Run, read_run  # noqa: E402
from ldm.report.statistics import Mean, mean  # noqa: E402
from ldm.report.sweep import aligned  # noqa: E402

SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid", "flow")
PREDICTIONS = ("eps", "v", "x0", "flow")
CROSSED = ("v", "x0", "flow")  # predictions that are valid with every schedule
SHOWN = ("fid", "clip_score", "noise_loss")


def refusal(schedule: str, prediction: str) -> str | None:
    """Returns the message with which train.py refuses the combination, or None."""
    with initialize_config_dir(str(CHECKOUT / "conf"), version_base="1.3"):
        config = compose("train", [f"schedule={schedule}", f"prediction={prediction}", "name=_", "run_dir=_"])
    try:
        check(config)
    except ValueError as error:
        return sentence(error)
    return None


def cell_of(run: Run) -> tuple[str, str]:
    schedule, prediction = str(run.config["schedule._target_"]), str(run.config["prediction.name"])
    return schedule.rpartition(".")[2].lower(), prediction


def table(metric: Metric, runs: list[Run], refused: dict[tuple[str, str], str]) -> str:
    def text(cell: tuple[str, str]) -> str:
        values = [run.metrics[metric.key] for run in runs if cell_of(run) == cell and metric.key in run.metrics]
        found = mean(values) if values else None
        return metric.write(found.value, found.half) if found else "refused" if cell in refused else "not run"

    rows = [[schedule, *(text((schedule, prediction)) for prediction in PREDICTIONS)] for schedule in SCHEDULES]
    return aligned([metric.title, *PREDICTIONS], rows)


def effects(metric: Metric, runs: list[Run]) -> dict[str, Mean]:
    """Returns the effects of each schedule relative to flow, and of each prediction relative to v.

    The effect of a schedule is averaged over the predictions that all schedules allow, and vice versa, and paired by
    seed, so that each value is based on many runs.
    """
    values = {(*cell_of(run), run.seed): run.metrics[metric.key] for run in runs if cell_of(run)[1] in CROSSED}
    seeds = sorted({seed for *_, seed in values}, key=str)

    def average(axis: int, level: str, seed: int | None) -> float:
        return fmean(value for key, value in values.items() if key[axis] == level and key[2] == seed)

    contrasts = [(0, name, "flow") for name in SCHEDULES[:-1]] + [(1, name, "v") for name in CROSSED if name != "v"]
    return {
        f"{('schedule', 'prediction')[axis]}={name} minus {against}": mean(
            [average(axis, name, seed) - average(axis, against, seed) for seed in seeds]
        )
        for axis, name, against in contrasts
    }


def main(folders: list[str]) -> None:
    runs = [read_run(folder) for folder in folders]
    refused = {(s, p): why for s in SCHEDULES for p in PREDICTIONS if (why := refusal(s, p))}
    measured = [run for run in runs if run.metrics]
    report: dict[str, Any] = plain(compare(measured)) if measured else {}
    report["pairs"] = [pair for pair in report.get("pairs", []) if pair["metric"] in SHOWN]
    report["refused"] = [{"schedule": s, "prediction": p, "reason": why} for (s, p), why in refused.items()]
    found = {metric.key: effects(metric, measured) for metric in KNOWN if metric.key in SHOWN}
    report["effects"] = {key: {name: asdict(effect) for name, effect in rows.items()} for key, rows in found.items()}
    write_json(HERE / "results.json", report)
    for metric in (metric for metric in KNOWN if metric.key in SHOWN):
        print(table(metric, measured, refused), end="\n\n")
        effect_rows = ([name, metric.write(effect.value, effect.half)] for name, effect in found[metric.key].items())
        print(aligned([metric.title, "difference"], list(effect_rows)), end="\n\n")
    for (schedule, prediction), why in refused.items():
        print(f"- `{schedule}` with `{prediction}`: {why}")


if __name__ == "__main__":
    main(sys.argv[1:])

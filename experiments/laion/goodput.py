"""Simulates training on 8 to 1,024 GPUs that fail: which checkpoint interval, and how much goodput.

Writes goodput.json and goodput.png beside this file and prints the tables of README.md, in 40 seconds:

    python -m experiments.laion.goodput
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt

from experiments.laion.plan import TRAINED
from experiments.laion.simulation import Setting, Times, exact_goodput, simulate, young
from ldm.callbacks.monitoring.watchdog import GRACE, PAUSE, SILENCE
from ldm.files import write_json

HERE = Path(__file__).parent
HOUR, DAY = 3600.0, 86400.0
GPUS, PER_HOST = (8, 16, 32, 64, 128, 256, 512, 1024), 8
LENGTH, RUNS = 60 * DAY, 40  # simulated runs of one setting, with the same failures at every interval
INTERVALS = tuple(60.0 * 2 ** (i / 2) for i in range(19))  # one minute to nine hours
DEFAULT = 500  # steps: callbacks.checkpoint.every_n_train_steps
TOLERANCE = 0.001  # of goodput, within which intervals count as equally good

# GPU hours per interruption, from published counts of interruptions.
MTBF = {
    "Llama 3": 16384 * 54 * 24 / 419,
    "RSC-2": PER_HOST * 24 * 1000 / 2.34,
    "RSC-1": PER_HOST * 24 * 1000 / 6.50,
    "OPT": 1024 * 24 / 2,
}
PARAMETERS, BYTES = 859_520_964, 16  # of SD 1.5's UNet: float32 weights, their average, and AdamW's two moments
STEP = 512 / TRAINED  # seconds for 64 images on each GPU; the global batch grows with the GPUs
WATCHDOG = 1800.0  # callbacks.watchdog.seconds

SOURCES = {
    "Llama 3": "The Llama 3 Herd of Models (arXiv 2407.21783), section 3.3.4: 419 unexpected interruptions in 54 days "
    "on 16,384 H100",
    "RSC-1": "Kokolis et al., HPCA 2025 (arXiv 2410.21680): 6.50 failures per 1,000 node-days, nodes of 8 A100",
    "RSC-2": "the same: 2.34 failures per 1,000 node-days",
    "OPT": "OPT-175B's chronicles (facebookresearch/metaseq, projects/OPT/chronicles/final_update.md): about two "
    "machines a day of 1,024 A100",
    "copy": "`ldm bench checkpoint`: bytes per second at which the state is copied while training stands still",
    "write": "`ldm bench checkpoint`: bytes per second at which a file is written in the background, by one process",
    "crash": "the Watchdog's constants: silence of a dead rank's host, two looks and the grace of the other ranks",
    "hang": "callbacks.watchdog.seconds = 1800, and half of it again to find the slowest rank",
    "hanging": "ByteRobust (arXiv 2509.16293), table 1: 9.9 % of incidents are job hangs",
    "restart": "Operational Analysis with 504 GPUs (arXiv 2605.09370): median interval of retries 11 minutes",
    "replaced": "OPT paper (arXiv 2205.01068), section 2.5: over 100 hosts cycled in 105 restarts; here all",
    "repair": "a guess: a day",
    "slow_every": "a guess: each host or its links once in 30 days",
    "slow_for": "Wu et al., Greyhound, USENIX ATC 2025: 72 minutes, mean of fail-slows of jobs of 512 GPUs or more",
    "slowdown": "the same: jobs that were slowed took 1.3459 times as long, taken for the time when they are slow",
}


def setting(gpus: int, interval: float, checkpoint: dict[str, Any], failures: str = "Llama 3") -> Setting:
    """Returns the assumptions for a number of GPUs, from measurements of `ldm bench checkpoint`."""
    size, measured = PARAMETERS * BYTES, checkpoint["mebibytes"] * 2**20
    return Setting(
        hosts=gpus // PER_HOST,
        mtbf=MTBF[failures] / PER_HOST * HOUR,
        interval=interval,
        copy=size / measured * checkpoint["standing_still_seconds"],
        write=size / measured * checkpoint["writing_seconds"],
        crash=SILENCE + 2 * PAUSE + GRACE,
        hang=1.5 * WATCHDOG,
        hanging=0.099,
        restart=660.0,
        replaced=1.0,
        spares=max(1, gpus // 256),
        repair=DAY,
        slow_every=30 * DAY,
        slow_for=72 * 60.0,
        slowdown=1.3459,
    )


def without_background(given: Setting) -> Setting:
    """Returns the setting of a trainer that stands still until the file is written."""
    return replace(given, copy=given.copy + given.write, write=0.0)


def run(given: Setting, length: float = LENGTH, runs: int = RUNS) -> list[Times]:
    return [simulate(given, length, seed) for seed in range(runs)]


def goodput(times: Iterable[Times]) -> float:
    return mean(each.goodput for each in times)


def best_interval(given: Setting, intervals: Iterable[float], length: float, runs: int) -> dict[str, Any]:
    """Returns the interval with the highest goodput, its goodput, and the intervals that are about as good."""
    found = {every: goodput(run(replace(given, interval=every), length, runs)) for every in intervals}
    best = max(found, key=lambda every: found[every])
    good = [every for every in found if found[every] >= found[best] - TOLERANCE]
    return {"seconds": best, "goodput": found[best], "as_good": [min(good), max(good)], "all": found}


def scale(gpus: int, checkpoint: dict[str, Any], failures: str) -> dict[str, Any]:
    """Returns the intervals and goodputs of a number of GPUs."""
    given = setting(gpus, DEFAULT * STEP, checkpoint, failures)
    times = run(given)
    shares = [{name: seconds / each.total for name, seconds in asdict(each).items()} for each in times]
    waiting = without_background(given)
    return {
        "gpus": gpus,
        "failures": failures,
        "job_mtbf_hours": given.job_mtbf / HOUR,
        "young_seconds": young(given.copy, given.job_mtbf),
        "best": best_interval(given, INTERVALS, LENGTH, RUNS),
        "default_seconds": given.interval,
        "default_shares": {name: mean(share[name] for share in shares) for name in shares[0]},
        "default_goodput_sd": stdev(each.goodput for each in times),
        "without_background_writes": best_interval(waiting, INTERVALS, LENGTH, RUNS),
        "young_seconds_without_background_writes": young(waiting.copy, given.job_mtbf),
    }


def variants(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the goodput of 1,024 GPUs at the default interval, with one assumption changed at a time."""
    given = setting(GPUS[-1], DEFAULT * STEP, checkpoint)
    changed: list[tuple[str, Setting]] = [
        ("as assumed", given),
        *((f"{count} spare hosts", replace(given, spares=count)) for count in (0, 1, 2, 8)),
        ("watchdog.seconds=300", replace(given, hang=450.0)),
        ("watchdog.seconds=300, 8 spare hosts", replace(given, hang=450.0, spares=8)),
        ("half of the hosts return after a reboot", replace(given, replaced=0.5)),
        ("requeued for an hour", replace(given, restart=HOUR)),
        ("no slow hosts", replace(given, slow_for=1.0)),
        ("a checkpoint every hour", replace(given, interval=HOUR)),
        ("training waits for each write", without_background(given)),
        ("OPT's failures", setting(GPUS[-1], given.interval, checkpoint, "OPT")),
        ("OPT's failures, 16 spare hosts", replace(setting(1024, given.interval, checkpoint, "OPT"), spares=16)),
    ]
    return [{"what": what, "goodput": goodput(run(each))} for what, each in changed]


def check(checkpoint: dict[str, Any], runs: int = 10 * RUNS) -> list[dict[str, float]]:
    """Returns simulated goodputs beside the closed form, without what the closed form leaves out."""
    rows = []
    for gpus in GPUS:
        given = setting(gpus, 0.0, checkpoint, "OPT")
        given = without_background(replace(given, replaced=0.0, slowdown=1.0))
        given = replace(given, interval=young(given.copy, given.job_mtbf))
        found = [simulate(given, LENGTH, gpus * runs + number).goodput for number in range(runs)]
        error = stdev(found) / runs**0.5
        exact = exact_goodput(given)
        rows.append({"gpus": gpus, "simulated": mean(found), "standard_error": error, "exact": exact})
    return rows


def llama(checkpoint: dict[str, Any]) -> float:
    """Returns the goodput of 16,384 GPUs without slow hosts, of which Llama 3's paper reports more than 90 %."""
    given = setting(16384, 0.0, checkpoint)
    return goodput(run(replace(given, interval=young(given.copy, given.job_mtbf), slowdown=1.0)))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots goodput by interval, and what a run's time is spent on at the default interval."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = [row for row in rows if row["failures"] == "Llama 3"]
    for color, row in zip(("C0", "C1", "C2", "C3"), rows[1::2], strict=True):
        for name, style in (("best", "-"), ("without_background_writes", "--")):
            curve = row[name]["all"]
            minutes = [every / 60 for every in curve]
            label = f"{row['gpus']:,} GPUs" if style == "-" else None
            left.semilogx(minutes, list(curve.values()), style, color=color, label=label)
            left.plot(row[name]["seconds"] / 60, row[name]["goodput"], "o", color=color)
    left.axvline(rows[0]["default_seconds"] / 60, color="gray", linewidth=0.8, linestyle=":")
    left.set(xlabel="minutes of training between checkpoints", ylabel="goodput", ylim=(0.7, 1.0))
    left.set_xticks([1, 4, 15, 60, 240], ["1", "4", "15", "60", "240"])
    left.set_title("solid: written in the background; dashed: training waits", fontsize=9)
    left.legend(fontsize=8)
    bottom = [0.0] * len(rows)
    for name in list(rows[0]["default_shares"])[1:]:
        heights = [100 * row["default_shares"][name] for row in rows]
        right.bar([f"{row['gpus']:,}" for row in rows], heights, bottom=bottom, label=name)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    right.set(xlabel="GPUs", ylabel="% of the time")
    right.set_title(f"lost with a checkpoint every {DEFAULT} steps", fontsize=9)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    checkpoint = json.loads((HERE.parent / "benchmark" / "checkpoint.json").read_text())
    rows = [scale(gpus, checkpoint, failures) for failures in ("Llama 3", "OPT") for gpus in GPUS]
    plot(rows, HERE / "goodput.png")
    for row in rows:
        for name in ("best", "without_background_writes"):
            row[name]["all"] = {f"{every:.0f}": value for every, value in row[name]["all"].items()}
    assumptions = {
        "gpu_hours_per_interruption": MTBF,
        "checkpoint_bytes": PARAMETERS * BYTES,
        "step_seconds": STEP,
        "1,024 GPUs": asdict(setting(GPUS[-1], DEFAULT * STEP, checkpoint)),
        "sources": SOURCES,
    }
    tables: dict[str, Any] = {"scale": rows, "variants": variants(checkpoint), "check": check(checkpoint)}
    tables["16,384 GPUs"] = llama(checkpoint)
    write_json(HERE / "goodput.json", {"assumptions": assumptions, "runs": RUNS, "days": LENGTH / DAY} | tables)
    print("| GPUs | failure every | Young | best, simulated | as good | goodput | every 500 steps | training waits |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = (f"{seconds / 60:.0f}" for seconds in row["best"]["as_good"])
        waits = row["without_background_writes"]
        print(
            f"| {row['gpus']:,} ({row['failures']}) | {row['job_mtbf_hours']:,.0f} h | {row['young_seconds'] / 60:.0f} "
            f"min | {row['best']['seconds'] / 60:.0f} min | {low} to {high} min | {row['best']['goodput']:.1%} | "
            f"{row['default_shares']['useful']:.1%} | {waits['goodput']:.1%} at {waits['seconds'] / 60:.0f} min |"
        )
    for variant in tables["variants"]:
        print(f"| {variant['what']} | {variant['goodput']:.1%} |")
    for each in tables["check"]:
        print(f"| {each['gpus']:,} | {each['simulated']:.3%} ± {each['standard_error']:.3%} | {each['exact']:.3%} |")
    print(f"16,384 GPUs: {tables['16,384 GPUs']:.1%}")


if __name__ == "__main__":
    main()

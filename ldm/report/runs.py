"""Reads a run's folder: its settings, state, metrics and curves."""

import csv
import json
import math
import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import yaml

from ldm.errors import sentence
from ldm.files import LOCK, is_locked

WAITING = ".waiting"  # folder beside the runs of a sweep, with an empty file for each run that has not started
OUTCOME, LOG = "state.json", "log.txt"
SILENCE = 600  # seconds without a batch, or in older runs without a lock and a write, after which a run is not alive
SPEED = "train/images_per_second"
SEEN = "train/images_seen"


STATES = (
    *("in progress", "starting", "waiting", "stalled", "unknown", "failed", "stopped", "damaged", "empty", "finished"),
)
RECORDED = ("starting", "running", "finishing", "finished", "stopped", "failed")  # the states in OUTCOME
FIELDS: dict[str, Any] = {"state": str, "step": int, "reason": str | None, "host": str, "process": int}  # of OUTCOME


@dataclass(frozen=True)
class Curve:
    """The values of a scalar by optimizer step."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """`state` is one of STATES; `note` is a human-readable explanation; `host` is set if it runs on another one."""

    path: Path
    state: str
    note: str = ""
    config: dict[str, Any] = field(default_factory=dict)  # by dotted key
    metrics: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    by_noise: dict[str, list[float]] = field(default_factory=dict)  # log_snr, mean, standard_error
    scalars: dict[str, Curve] = field(default_factory=dict)
    host: str | None = None

    @property
    def seed(self) -> int | None:
        """The seed of training; None if unknown."""
        seed = self.config.get("seed", self.provenance.get("seed"))
        return seed if isinstance(seed, int) else None

    @property
    def noise(self) -> int | None:
        """The number of evaluations before this one, whose images used up the lower noise seeds; None if unknown."""
        prompts = self.provenance.get("prompts") or {}
        if not prompts.get("seeds") or not prompts.get("count"):
            return None
        return int(prompts["seeds"][0]) // int(prompts["count"])

    @property
    def batch(self) -> int:
        """Images per optimizer step over all ranks; 1 if unknown.

        It is read from the logs if possible, because settings such as devices=auto do not give the number of ranks.
        """
        if seen := self.scalars.get(SEEN):
            return round(seen.values[-1] / (seen.steps[-1] + 1))
        if total := _count(self.config.get("data.global_batch")):
            return total
        ranks = _count(self.provenance.get("ranks")) or _count(self.config.get("trainer.devices")) or 1
        return (_count(self.config.get("data.batch_size")) or 1) * ranks

    def minutes(self, steps: Iterable[int]) -> list[float] | None:
        """Returns the training time at each step from the logged speeds, which excludes the time between restarts."""
        speed = self.scalars.get(SPEED)
        if speed is None or not all(value > 0 for value in speed.values):
            return None
        ends = [(0, 0.0)]
        for step, rate in zip(speed.steps, speed.values, strict=True):
            ends.append((step + 1, ends[-1][1] + (step + 1 - ends[-1][0]) * self.batch / rate / 60))
        return [_between(ends, step + 1) for step in steps]


def read_runs(path: str | Path) -> list[Run]:
    """Reads the run at a path, or all evaluations of a sweep of `ldm evaluate`."""
    file = Path(path)
    reports = _sweep(file) if file.is_file() else []
    runs = [_evaluation(file.with_name(f"{file.name}[{i}]"), report) for i, report in enumerate(reports)]
    return runs or [read_run(path)]


def _sweep(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):  # `read_run` reports them
        return []
    reports = content.get("evaluations") if isinstance(content, dict) else None
    return reports if isinstance(reports, list) else []


def read_run(path: str | Path) -> Run:
    """Reads a run's folder, or a JSON file of metrics with their provenance. Raises FileNotFoundError."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"run {path} not found; give the folder of a run, as train.py printed it, or a file of ldm evaluate"
        )
    if path.is_file():
        return _evaluation(path)
    config_file, metrics_file = path / "config.yaml", path / "metrics.json"
    if not any(file.is_file() for file in (config_file, metrics_file, path / OUTCOME)):
        return Run(path, "empty", "the folder contains no config.yaml and no metrics.json")
    try:
        config = _config(config_file)
        report = _report(metrics_file)
        numbers = _numbers(report)
        scalars = read_scalars(path)
    except (OSError, ValueError) as error:
        return Run(path, "damaged", sentence(error))
    try:
        record = read_outcome(path)
    except ValueError as error:
        return Run(path, "damaged", str(error), config=config, scalars=scalars, **numbers)
    state, note = _state(path, config, report, scalars, record)
    host = record.get("host")
    elsewhere = host if state in ("in progress", "unknown") and host != platform.node() else None
    return Run(path, state, note, config, scalars=scalars, host=elsewhere, **numbers)


def _evaluation(path: Path, report: Any = None) -> Run:
    """Makes a run of a file with a report of metrics, or of one of the reports in it."""
    try:
        return _from_report(path, _report(path) if report is None else _with_parts(report, path.name))
    except ValueError as error:
        return Run(path, "damaged", str(error))


def _from_report(path: Path, report: dict[str, Any]) -> Run:
    """Makes a run of a report of metrics.

    Its settings are those of sampling, and those that the model was trained with or, if they are not recorded, the
    model itself, so that models which differ only in their seed are recognised.
    """
    numbers = _numbers(report)
    about = numbers["provenance"]
    model = about.get("model") or {}
    trained = model.get("settings")
    kept = {key: about.get(key) for key in ("sampling", "ema", "seed")}
    kept |= {"model": model} if trained is None else {"trained": {"steps": about.get("steps")}}
    config = flatten(trained or {}) | flatten({k: v for k, v in kept.items() if v is not None})
    return Run(path, "finished", config=config, **numbers)


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file.name} contains no settings")
    return flatten(config)


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts into one with dotted keys; lists become JSON text."""
    if not isinstance(node, dict):
        return {prefix: node if isinstance(node, str | int | float | bool | None) else json.dumps(node, default=str)}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _report(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        report = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from error
    return _with_parts(report, file.name)


def _with_parts(report: Any, name: str) -> dict[str, Any]:
    """Checks the parts of a report. Raises ValueError if one is missing or has the wrong type."""
    parts = [report.get(part) for part in ("metrics", "provenance")] if isinstance(report, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{name} contains no metrics with their provenance")
    about = report["provenance"]
    dicts = [about.get(part) for part in ("prompts", "reference", "sampling", "model", "validation", "sets")]
    prompts = about.get("prompts") if isinstance(about.get("prompts"), dict) else {}
    seeds = prompts.get("seeds") or []
    numbers = [number for number in (about.get("seed"), prompts.get("count")) if number is not None]
    numbers += seeds if isinstance(seeds, list) else [seeds]
    if not all(isinstance(part, dict | None) for part in dicts) or not all(map(is_number, numbers)):
        raise ValueError(f"{name} contains metrics with an invalid provenance")
    return dict(report)


def _numbers(report: dict[str, Any]) -> dict[str, Any]:
    """Extracts the finite metrics, their provenance and the loss by noise level; other values count as not measured."""
    metrics = report.get("metrics", {})
    curves = report.get("curves") or {}
    curve = (curves.get("noise_loss") or {}) if isinstance(curves, dict) else curves
    if curve and len({len(_values(curve, name)) for name in ("log_snr", "mean")}) != 1:
        raise ValueError("the loss by noise level has different numbers of levels and values")
    return {
        "metrics": {name: float(value) for name, value in metrics.items() if is_number(value)},
        "provenance": report.get("provenance", {}),
        "by_noise": curve,
    }


def _values(curve: Any, name: str) -> list[Any]:
    values = curve.get(name) if isinstance(curve, dict) else None
    if not isinstance(values, list):
        raise ValueError(f"the loss by noise level has no list {name}")
    return values


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> int | None:
    """Returns a positive number of something; None for any other value, which a setting may have."""
    return value if isinstance(value, int) and value > 0 else None


def is_finished(folder: Path) -> bool:
    """Whether a run has finished: it exports its weights last."""
    return any(folder.glob("*.safetensors"))


def _state(
    path: Path, config: dict[str, Any], report: dict[str, Any], scalars: dict[str, Curve], record: dict[str, Any]
) -> tuple[str, str]:
    steps, last = config.get("trainer.max_steps"), trained(scalars)
    measured = report["provenance"].get("steps") if report else None
    longer = isinstance(measured, int) and last > measured  # a finished run that was resumed to train further
    recorded = record.get("state") == "finished"
    ended = (recorded or not record) and not is_locked(path)
    if ended and report and (recorded or not longer):
        broken = [name for name, value in report["metrics"].items() if not is_number(value)]
        notes = [f"not numbers: {', '.join(broken)}"] if broken else []
        validated = report["provenance"].get("validated")
        if is_number(measured) and is_number(validated) and validated < measured:
            notes.append(f"last validated at step {validated} of {measured}")
        return "finished", "; ".join([*filter(None, [record.get("reason")]), *notes])
    if ended and not report and (recorded or is_finished(path)):
        return "finished", record.get("reason") or "no metrics were measured"
    last = max(last, record.get("step", 0)) if record.get("state") in ("stopped", "failed") else last
    where = f"step {last}" if last else "before its first logged step"
    where += f" of {steps}" if steps else ""
    where += f" (metrics of step {measured})" if longer else ""
    return _unfinished(path, record, where)


def _unfinished(path: Path, record: dict[str, Any], where: str) -> tuple[str, str]:
    """Returns the state of a run that has not finished; runs of older versions have no record."""
    age = max(0.0, time.time() - _last_write(path))
    wrote, resume = f"last wrote {_ago(age)} ago", "continue with resume=auto"
    if is_locked(path) if record or (path / LOCK).is_file() else age < SILENCE:
        if record.get("state") == "running" and (silent := time.time() - record["modified"]) > SILENCE:
            return "stalled", f"{where}, no batch for {_ago(silent)}; {LOG} and callbacks.watchdog may say why"
        return "in progress", f"{where}, {wrote}"
    if record.get("state") == "failed":
        reason = str(record.get("reason"))
        more = [f"see {LOG}" if (path / LOG).is_file() else "", "" if "resume=auto" in reason else resume]
        return "failed", "; ".join(filter(None, [f"{where}: {reason}", ", ".join(filter(None, more))]))
    if record.get("state") == "stopped":
        return "stopped", f"{where}, {record.get('reason')}; {resume}"
    if record and record["host"] != platform.node():
        return _elsewhere(record, where, age)
    if record:
        cause = f"its process on {record['host']} ended without a message (killed, out of memory or power)"
        return "failed", f"{where}, {wrote}: {cause}; {resume}"
    return "stopped", f"{where}, {wrote}; {resume}"


def _elsewhere(record: dict[str, Any], where: str, age: float) -> tuple[str, str]:
    """Returns the state of a run on another host, whose lock may be invisible here, by its last write."""
    host = record["host"]
    known = f"{where}, running on {host} as of {_ago(age)} ago"
    if age < SILENCE:
        return "in progress", known
    remedy = f"whether process {record['process']} still runs cannot be seen from here: run ldm status on {host}"
    return "unknown", f"{known}; {remedy}, and see {LOG}"


def _last_write(folder: Path) -> float:
    """Returns when a file below the folder was last written; those that the run is renaming or deleting are ignored."""
    times = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                times.append(os.stat(os.path.join(parent, name)).st_mtime)
    return max(times, default=0.0)


def read_outcome(folder: Path) -> dict[str, Any]:
    """Returns a run's record of its state, with the time of the last batch as "modified"; {} if it has none.

    Raises ValueError if it is corrupt.
    """
    file = folder / OUTCOME
    remedy = "resume=auto writes it again"
    try:
        record, modified = json.loads(file.read_text()), file.stat().st_mtime
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{OUTCOME} cannot be read ({sentence(error)}); {remedy}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{OUTCOME} contains no record of a run; {remedy}")
    for key, kind in FIELDS.items():
        if not isinstance(record.get(key), kind) or (key == "state" and record[key] not in RECORDED):
            raise ValueError(f"{OUTCOME} is corrupt ({key} is {record.get(key)!r}); {remedy}")
    return {**record, "modified": modified}


def trained(scalars: dict[str, Curve]) -> int:
    """Returns the number of optimizer steps by the logs, which count steps from 0.

    Only training and validation scalars count, because older runs logged their final metrics one step too late.
    """
    curves = (curve for name, curve in scalars.items() if name.startswith(("train/", "val/")))
    return max((curve.steps[-1] + 1 for curve in curves), default=0)


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Reads all scalars from metrics.csv, or else from TensorBoard's logs; the last value of a repeated step counts.

    Older runs logged to csv/version_N/metrics.csv, where N counts how often the run was resumed.
    """
    points: dict[str, dict[int, float]] = {}
    older = [*folder.glob("csv/metrics.csv"), *sorted(folder.glob("csv/version_*/metrics.csv"), key=_version)]
    logs = [*older, *folder.glob("metrics.csv")]
    logged = chain.from_iterable(map(_csv, logs)) if logs else _events(folder / "tensorboard")
    for name, step, value in logged:
        if math.isfinite(value):
            points.setdefault(name, {})[step] = value
    ordered = {name: sorted(curve.items()) for name, curve in points.items()}
    return {name: Curve([s for s, _ in curve], [v for _, v in curve]) for name, curve in ordered.items()}


def _version(file: Path) -> int:
    """Returns the number of a log's folder; each resumption logged to the next one."""
    return int(file.parent.name.rpartition("_")[2])


def _csv(file: Path) -> Iterable[tuple[str, int, float]]:
    """Yields the scalars of complete rows: the last one may be cut off, or be followed by the end of an earlier one.

    Rows that contain something else than numbers, as a loss of power can leave them, are skipped.
    """
    columns: list[str] = []
    for line in file.read_text(errors="replace").split("\n")[:-1]:
        with suppress(ValueError, KeyError, OverflowError, csv.Error):
            cells = next(csv.reader([line]))  # line by line, because a damaged one may contain a quote
            columns = columns or (cells if "step" in cells else [])
            row = dict(zip(columns, cells, strict=True))
            step = int(float(row["step"] or "nan"))
            yield from [(name, step, float(row[name])) for name in row if row[name] and name not in ("step", "time")]


def _events(folder: Path) -> Iterable[tuple[str, int, float]]:
    """Yields the scalars of TensorBoard's files; a file that a crash truncated is read up to that point."""
    if not any(folder.glob("events.out.tfevents.*")):
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1})
    log.Reload()
    for name in log.Tags()["scalars"]:
        for event in log.Scalars(name):
            yield name, event.step, event.value


def _between(ends: list[tuple[int, float]], step: int) -> float:
    """Interpolates the time linearly between the (step, time) ends, and extrapolates beyond the last."""
    for (s0, t0), (s1, t1) in pairwise(ends):
        if step <= s1 or (s1, t1) == ends[-1]:
            return t0 + (t1 - t0) * (step - s0) / max(1, s1 - s0)
    return ends[-1][1]

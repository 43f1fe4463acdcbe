"""Which runs are repetitions of one another, and in which settings the others differ."""

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from ldm.report.runs import Run

# Where results lie and what is shown on the way decides no result.
NEUTRAL = (
    *("run_dir", "resume", "accept_changes", "plan", "name", "callbacks.", "logger", "evaluation.cache"),
    *("data.workers", "data.module.workers", "data.tokenize", "data.module.tokenize", "trainer.log_every_n_steps"),
)
ABSENT = "–"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    letter: str
    label: str  # its settings among those that differ, or the folder of its only run
    runs: list[Run]

    @property
    def name(self) -> str:
        return f"{self.letter}: {self.label}" if self.letter else self.label

    def values(self, metric: str) -> dict[int | None, float]:
        """By seed; of two runs with one seed, the first."""
        found: dict[int | None, float] = {}
        for run in self.runs:
            if metric in run.metrics:
                found.setdefault(run.seed, run.metrics[metric])
        return found


@dataclass(frozen=True)
class Difference:
    """A setting with its value in each group; `also` are longer keys that repeat it."""

    key: str
    values: list[str]
    also: list[str]


def group_runs(runs: list[Run]) -> tuple[list[Group], list[Difference]]:
    """Runs with settings or metrics in groups, in the order given, and how the groups' settings differ."""
    runs = [run for run in runs if run.config or run.metrics]
    settings = _decisive(runs)
    members: dict[str, list[int]] = defaultdict(list)
    for index, decisive in enumerate(settings):
        members[json.dumps(decisive, sort_keys=True, default=str)].append(index)
    differences = _differences([settings[indices[0]] for indices in members.values()])
    groups = []
    for position, indices in enumerate(members.values()):
        chosen = sorted((runs[i] for i in indices), key=lambda run: (run.seed is None, run.seed))
        label = label_of(differences, position) or chosen[0].path.name
        if not differences and len(chosen) > 1:
            label += f" and {len(chosen) - 1} more"
        groups.append(Group(_letters(position) if len(members) > 1 else "", label, chosen))
    return groups, differences


def decisive(config: dict[str, Any], folder: str = "RUN") -> dict[str, Any]:
    """A run's settings, by dotted key, without its folder and what is neutral."""
    return {
        key: value.replace(folder, "RUN") if isinstance(value, str) else value
        for key, value in config.items()
        if not key.startswith(NEUTRAL)
    }


def _decisive(runs: list[Run]) -> list[dict[str, Any]]:
    """Each run's without its seed."""
    follows = _seed_keys(runs)
    kept = [decisive(run.config, str(run.config.get("run_dir", run.path))) for run in runs]
    return [{key: value for key, value in one.items() if key not in follows} for one in kept]


def _seed_keys(runs: list[Run]) -> set[str]:
    """Settings that are the run's seed by another name: equal to it in every run."""
    keys = {key for run in runs for key in run.config if key.rpartition(".")[2] == "seed"}
    return {key for key in keys if all(run.config.get(key, run.seed) == run.seed for run in runs)}


def _differences(settings: list[dict[str, Any]]) -> list[Difference]:
    """A setting that stands in several places of a config is told once, at its shortest key."""
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in dict.fromkeys(key for one in settings for key in one):
        values = tuple(_text(one[key]) if key in one else ABSENT for one in settings)
        if len(set(values)) > 1:
            rows[(key.rpartition(".")[2], *values)].append(key)
    found = []
    for (_, *told), keys in rows.items():
        first, *rest = sorted(keys, key=lambda key: (key.count("."), len(key)))
        found.append(Difference(_short(first), told, rest))
    return sorted(found, key=lambda difference: difference.key.count("."))


def _short(key: str) -> str:
    """schedule._target_ and prediction.name are the schedule and the prediction."""
    head, _, leaf = key.rpartition(".")
    return head if head and leaf in ("_target_", "name") else key


def _text(value: Any) -> str:
    text = str(value)
    return text.rpartition(".")[2] if text.startswith(("ldm.", "torch.")) else text


def label_of(differences: list[Difference], position: int, most: int = 60) -> str:
    """The settings of a group among those that differ; what belongs to another of these only where it must."""
    differences = _telling(differences)
    leaves = [d.key.rpartition(".")[2] for d in differences]
    names = [d.key if leaves.count(leaf) > 1 else leaf for d, leaf in zip(differences, leaves, strict=True)]
    values = [d.values[position] for d in differences]
    words = [f"{name}={value}" for name, value in zip(names, values, strict=True) if value != ABSENT]
    label = ""
    for word in words:
        if label and len(label) + len(word) > most:
            return f"{label}, …"
        label += f"{', ' if label else ''}{word}"
    return label


def _telling(differences: list[Difference]) -> list[Difference]:
    """Without the numbers of a schedule where the schedule itself differs, if that still tells all groups apart."""
    keys = {difference.key for difference in differences}
    own = [d for d in differences if not any(d.key.startswith(f"{key}.") for key in keys)]
    enough = len(set(zip(*(d.values for d in own), strict=True))) == len(
        set(zip(*(d.values for d in differences), strict=True))
    )
    return own if enough else differences


def _letters(index: int) -> str:
    """A … Z, AA, AB …"""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)

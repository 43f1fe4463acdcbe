"""Groups runs that differ only in their seeds, and finds the settings in which the groups differ."""

import json
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from math import inf
from statistics import fmean
from typing import Any

from ldm.metrics.provenance import depends_on_noise, measured_alike
from ldm.report.runs import Run

# Settings that do not affect the results: where they are stored, and what is shown during the run.
NEUTRAL = (
    *("run_dir", "resume", "accept_changes", "plan", "rehearsal", "name", "callbacks.", "logger", "evaluation.cache"),
    *("data.workers", "data.module.workers", "data.tokenize", "data.module.tokenize", "trainer.log_every_n_steps"),
    *("data.latent_store", "data.module.train.store"),
)
# What a run samples with, unless an evaluation says otherwise.
SAMPLING = "sampler.", "guidance.", "training.sampling."
EVALUATION = "evaluation."  # settings of the evaluation; the provenance records what they change
ABSENT = "–"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed of training, or in that of the noise of their evaluation."""

    letter: str
    label: str  # the values of the settings that differ, or the folder of the only run
    runs: list[Run]

    @property
    def name(self) -> str:
        return f"{self.letter}: {self.label}" if self.letter else self.label

    @property
    def short(self) -> str:
        """The letter, or the label of the only group."""
        return self.letter or self.label

    def values(self, metric: str) -> dict[Hashable, float]:
        """Returns the metric by the seed of training or, if all runs have the same, by the noise of the evaluation.

        Values of one seed are averaged. A metric that does not depend on the noise is no repetition of itself.
        """
        measured = [run for run in self.runs if metric in run.metrics]
        same = len({run.seed for run in measured}) == 1 and any(run.noise is not None for run in measured)
        by_seed: dict[Hashable, list[float]] = defaultdict(list)
        for run in measured:
            seed = ("noise", run.noise) if same and depends_on_noise(metric) else run.seed
            by_seed[seed].append(run.metrics[metric])
        return {seed: fmean(values) for seed, values in by_seed.items()}


@dataclass(frozen=True)
class Difference:
    """A setting with its value in each group; `also` lists longer keys that repeat it.

    `shared` says whether each group has settings of this section, which evaluations and runs do not record alike.
    """

    key: str
    values: list[str]
    also: list[str]
    shared: bool = True

    @property
    def is_choice(self) -> bool:
        """Whether groups differ in the value, rather than in what they record."""
        return self.shared or len({*self.values} - {ABSENT}) > 1


def group_runs(runs: list[Run]) -> tuple[list[Group], list[Difference]]:
    """Groups the runs that have settings or metrics, in the order given, and finds how the groups' settings differ.

    Runs of one group have the same settings, except for seeds and those of the evaluation, and were measured alike.
    """
    runs = [run for run in runs if run.config or run.metrics]
    settings = _decisive(runs)
    members = _members(runs, settings)
    differences = _differences([settings[indices[0]] for indices in members])
    groups = []
    for position, indices in enumerate(members):
        chosen = sorted((runs[i] for i in indices), key=_seeds_of)
        label = label_of(differences, position) or chosen[0].path.name
        if not differences and len(chosen) > 1:
            label += f" and {len(chosen) - 1} more"
        groups.append(Group(_letters(position) if len(members) > 1 else "", label, chosen))
    return groups, differences


def _seeds_of(run: Run) -> tuple[float, float]:
    """Returns what the runs of a group are sorted by; unknown seeds come last."""
    return tuple(inf if seed is None else seed for seed in (run.seed, run.noise))  # type: ignore[return-value]


def _members(runs: list[Run], settings: list[dict[str, Any]]) -> list[list[int]]:
    """Returns the positions of the runs of each group."""
    members: list[list[int]] = []
    alike: dict[str, list[list[int]]] = defaultdict(list)  # the groups with the same settings
    for index, config in enumerate(settings):
        training = {key: value for key, value in config.items() if not key.startswith(EVALUATION)}
        candidates = alike[json.dumps(training, sort_keys=True, default=str)]
        for group in candidates:
            if all(measured_alike(runs[i].provenance, runs[index].provenance) for i in group):
                group.append(index)
                break
        else:
            candidates.append([index])
            members.append(candidates[-1])
    return members


def decisive(config: dict[str, Any], folder: str = "RUN") -> dict[str, Any]:
    """Returns the settings that affect the results, by dotted key, with the run's folder replaced by "RUN"."""
    return {
        key: value.replace(folder, "RUN") if isinstance(value, str) else value
        for key, value in config.items()
        if not key.startswith(NEUTRAL)
    }


def settings_of_training(run: Run) -> dict[str, Any]:
    """Returns the settings that the weights of a run depend on."""
    settings = decisive(run.config, str(run.config.get("run_dir", run.path)))
    return {key: value for key, value in settings.items() if not key.startswith((*SAMPLING, EVALUATION))}


def _decisive(runs: list[Run]) -> list[dict[str, Any]]:
    """Returns the settings of each run that affect its results, without its seed."""
    seeds = _seed_keys(runs)
    kept = [decisive(run.config, str(run.config.get("run_dir", run.path))) for run in runs]
    return [{key: value for key, value in config.items() if key not in seeds} for config in kept]


def _seed_keys(runs: list[Run]) -> set[str]:
    """Returns the settings that repeat the run's seed: those named seed that equal it in every run."""
    keys = {key for run in runs for key in run.config if key.rpartition(".")[2] == "seed"}
    return {key for key in keys if all(run.config.get(key, run.seed) == run.seed for run in runs)}


def _differences(settings: list[dict[str, Any]]) -> list[Difference]:
    """Lists the settings that differ; one that a config repeats is listed once, by its shortest key."""
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in dict.fromkeys(key for config in settings for key in config):
        values = tuple(_text(config[key]) if key in config else ABSENT for config in settings)
        if len(set(values)) > 1:
            rows[(key.rpartition(".")[2], *values)].append(key)
    shared = set.intersection(*({_section(key) for key in config} for config in settings)) if settings else set()
    differences = []
    for (_, *row), keys in rows.items():
        first, *rest = sorted(keys, key=lambda key: (key.count("."), len(key)))
        differences.append(Difference(_short(first), row, rest, _section(first) in shared))
    return sorted(differences, key=lambda difference: difference.key.count("."))


def _short(key: str) -> str:
    """Shortens schedule._target_ to schedule, and prediction.name to prediction."""
    head, _, leaf = key.rpartition(".")
    return head if head and leaf in ("_target_", "name") else key


def _section(key: str) -> str:
    return key.partition(".")[0]


def _text(value: Any) -> str:
    text = str(value)
    return text.rpartition(".")[2] if text.startswith(("ldm.", "torch.")) else text


def label_of(differences: list[Difference], position: int, most: int = 60) -> str:
    """Returns a group's values of the settings that differ, cut off after about `most` characters.

    Subordinate settings, and those that some groups do not record, are included only if the groups cannot be
    distinguished without them.
    """
    return _joined(_distinguishing(differences), position, most)


def _joined(differences: list[Difference], position: int, most: int) -> str:
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


def described(differences: list[Difference], position: int) -> str:
    """Returns all of a group's settings that differ, without the subordinate ones, those of the evaluation and those
    that some groups do not record, which are included only if the groups cannot be distinguished without them."""
    chosen = [d for d in differences if _section(d.key) != "evaluation" and d.is_choice]
    return _joined(_completed(_superior(chosen), differences), position, most=10_000)


def _distinct(differences: list[Difference]) -> int:
    """Returns the number of groups that the settings distinguish."""
    return len(set(zip(*(d.values for d in differences), strict=True))) or 1


def _distinguishing(differences: list[Difference]) -> list[Difference]:
    """Leaves out subordinate settings, such as schedule.offset if the schedule differs, and those that some groups do
    not record, if all groups stay distinct."""
    return _completed(_superior([d for d in differences if d.is_choice]), differences)


def _superior(differences: list[Difference]) -> list[Difference]:
    """Returns the settings that are not subordinate to another one that differs."""
    keys = {difference.key for difference in differences}
    return [d for d in differences if not any(d.key.startswith(f"{key}.") for key in keys)]


def _completed(chosen: list[Difference], differences: list[Difference]) -> list[Difference]:
    """Adds to the chosen settings those of `differences` that distinguish more groups, until all are distinct."""
    for difference in differences:
        if _distinct([*chosen, difference]) > _distinct(chosen):
            chosen = [*chosen, difference]
    return chosen


def _letters(index: int) -> str:
    """Returns A … Z, AA, AB …"""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)

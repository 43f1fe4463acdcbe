"""The report states which seeds its intervals cover."""

from pathlib import Path
from typing import Any

import pytest

from ldm.report.coverage import BOTH, NOISE, TRAINING, coverage
from ldm.report.groups import Group
from ldm.report.runs import Run


def about(training: int, noise: int) -> dict[str, Any]:
    return {"seed": training, "prompts": {"seeds": [512 * noise, 512 * noise + 511]}}


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ([(0, 0), (1, 0), (2, 0)], TRAINING),
        ([(0, 0), (0, 1)], NOISE),
        ([(0, 0), (1, 1)], BOTH),
        ([(0, 0)], ""),
    ],
)
def test_an_interval_covers_the_seeds_that_differ_between_runs(seeds: list[tuple[int, int]], expected: str) -> None:
    runs = [Run(Path(str(pair)), "finished", provenance=about(*pair)) for pair in seeds]
    assert coverage([Group("", "a", runs)]) == expected


def test_runs_without_generated_images_differ_in_their_training() -> None:
    runs = [Run(Path(str(seed)), "finished", provenance={"seed": seed, "prompts": None}) for seed in range(3)]
    assert coverage([Group("A", "a", runs), Group("B", "b", runs[:1])]) == TRAINING


def test_a_run_that_was_never_evaluated_has_no_other_noise() -> None:
    runs = [Run(Path(str(seed)), "finished", provenance=about(seed, 0)) for seed in range(2)]
    assert coverage([Group("", "a", [*runs, Run(Path("2"), "finished", provenance={"seed": 2})])]) == TRAINING

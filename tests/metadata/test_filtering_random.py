"""Compares the filter on random files with an implementation that reads one row at a time."""

from pathlib import Path

import pytest

from experiments.robustness.filter.campaign import corrupt_trial, trial


@pytest.mark.parametrize("seed", range(8))
def test_random_files_are_filtered_like_row_by_row(seed: int, tmp_path: Path) -> None:
    assert trial(seed, tmp_path).wrong is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 60))
def test_more_random_files_are_filtered_like_row_by_row(seed: int, tmp_path: Path) -> None:
    assert trial(seed, tmp_path).wrong is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_every_row_of_a_corrupt_file_is_kept_rejected_or_refused(seed: int, tmp_path: Path) -> None:
    assert corrupt_trial(seed, tmp_path).wrong is None

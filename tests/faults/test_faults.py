from pathlib import Path

import pytest
import torch

from experiments.benchmark import faults

SHORT, LONG = 2, 50


@pytest.mark.parametrize(
    "kills", [pytest.param(SHORT, marks=pytest.mark.slow), pytest.param(LONG, marks=pytest.mark.full_size)]
)
def test_repeatedly_killed_runs_end_bit_for_bit_like_an_uninterrupted_run(kills: int) -> None:
    found = faults.measure(kills, seed=1)
    assert found["kills"] == kills and found["bytes"] > 1e6 * found["runs"]
    assert found["bytes_differing"] == 0
    other = found["with_other_ranks"]
    assert other["steps_with_other_samples"] == 0
    assert other["largest_difference_of_weights"] < 1e-5 and other["largest_difference_of_losses"] < 1e-5


def test_a_difference_between_results_is_detected() -> None:
    """Without this test, a comparison that compares nothing would also pass."""
    zeros = {"weights": torch.zeros(4, dtype=torch.uint8)}
    other = {"weights": torch.tensor([0, 0, 1, 0], dtype=torch.uint8)}
    with pytest.warns(UserWarning, match="weights: 1 bytes differ"):
        assert faults.difference(zeros, other) == (1, 4)
    with pytest.warns(UserWarning, match="4 bytes differ"):
        assert faults.difference(zeros, {}) == (4, 4)


def test_a_repeated_sample_is_detected_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    (tmp_path / "run.samples.1.0").write_text("0 0 5\n1 0 7\n")
    (tmp_path / "run.samples.1.1").write_text("0 0 6\n1 0 8\n")
    (tmp_path / "run.samples.2.0").write_text("1 0 7\n1 0 7\n")
    assert faults.samples(tmp_path / "run") == {0: {(0, 5): 1, (0, 6): 1}, 1: {(0, 7): 2}}

"""Half of every batch are class images, with a separate loss weight."""

from typing import Any

import pytest
import torch

from ldm.data.loading.order import Order
from ldm.data.sources.prior import WithPrior
from tests.training.tiny import Images


class Masked(Images):
    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return {**super().__getitem__(key), "mask": torch.zeros(1, 8, 8, dtype=torch.uint8)}


def mixed(subject: int = 5, others: int = 7, weight: float = 0.5) -> WithPrior:
    return WithPrior(Images(subject), Images(others, seed=1), weight)


def test_half_of_every_batch_are_class_images() -> None:
    data = mixed()
    for batch in Order(len(data), batch_size=4, run=2):
        assert sorted(data[key]["weight"] for key in batch) == [1.0, 1.0, 2.0, 2.0]


def test_the_weighted_mean_is_the_subjects_loss_plus_the_weighted_prior_loss() -> None:
    data, losses = mixed(weight=0.3), torch.rand(8, dtype=torch.float64)
    weights = torch.tensor([data[k]["weight"] for k in range(8)], dtype=torch.float64)
    subject, prior = losses[0::2].mean(), losses[1::2].mean()
    torch.testing.assert_close((losses * weights).mean(), subject + 0.3 * prior)


def test_both_sets_are_used_in_full_before_one_repeats() -> None:
    data = mixed()
    samples = [data[draw, k] for draw in range(5) for k in range(len(data))]
    assert len(data) == 14 and [sample["id"] for sample in samples] == [*range(14)] * 5
    for member, count in enumerate((5, 7)):
        keys = [sample["key"] for sample in samples[member::2]]
        assert keys == [str(k) for k in range(count)] * (35 // count)


def test_class_images_count_in_full_if_the_others_are_masked() -> None:
    data = WithPrior(Masked(2), Images(2))
    assert not data[0]["mask"].any() and (data[1]["mask"] == 255).all()


def test_a_prior_weight_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.prior_weight=0: expected a positive number"):
        mixed(weight=0)

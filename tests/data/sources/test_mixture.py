from collections import Counter
from typing import Any

import pytest
from torch.utils.data import Dataset

from ldm.data.loading.datamodule import DataModule
from ldm.data.loading.order import Order
from ldm.data.sources.mixture import Mixture
from ldm.data.sources.shapes import Shapes


class Named(Dataset[dict[str, Any]]):
    """Samples that contain the (draw, index) they were requested with."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {"key": f"{self.name}-{key[1]}", "draw": key[0], "id": key[1]}


def mixture(length: int = 12, sizes: tuple[int, int] = (100, 3)) -> Mixture:
    return Mixture([Named("a", sizes[0]), Named("b", sizes[1])], [3, 1], length)


def keys(mixture: Mixture, draw: int = 0) -> list[str]:
    return [mixture[draw, index]["key"] for index in range(len(mixture))]


def test_every_block_of_samples_has_each_data_set_by_its_weight() -> None:
    found = keys(mixture())
    for start in range(0, 12, 4):
        assert Counter(key[0] for key in found[start : start + 4]) == {"a": 3, "b": 1}


def test_each_data_set_is_read_in_order_from_its_beginning() -> None:
    found = keys(mixture())
    assert [key for key in found if key[0] == "a"] == [f"a-{i}" for i in range(9)]


def test_an_exhausted_data_set_restarts_with_the_next_draw() -> None:
    found = [sample for sample in map(mixture(20).__getitem__, range(20)) if sample["key"][0] == "b"]
    assert [(sample["draw"], sample["key"]) for sample in found] == [(i // 3, f"b-{i % 3}") for i in range(5)]


def test_the_next_epoch_continues_where_the_last_one_ended() -> None:
    assert keys(mixture(12), 0) + keys(mixture(12), 1) == keys(mixture(24), 0)


def test_a_limit_trains_on_the_same_samples_in_every_epoch() -> None:
    module = DataModule(mixture(12), {}, batch_size=4, limit=4)
    epochs = [[module.train[epoch, index]["key"] for index in range(4)] for epoch in range(3)]
    assert epochs == [keys(mixture(4))] * 3
    assert module.train[2, 0]["draw"] == 2  # so that the noise differs


def test_sample_ids_are_indices_of_the_mixture() -> None:
    assert [mixture()[1, index]["id"] for index in range(12)] == list(range(12))


def test_samples_of_all_data_sets_have_the_list_of_errors() -> None:
    assert mixture()[0]["bad"] == []


def test_an_index_beyond_the_length_is_refused() -> None:
    with pytest.raises(IndexError):
        mixture(12)[12]


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, 1, 1]])
def test_invalid_weights_of_a_mixture_are_refused(weights: list[int]) -> None:
    with pytest.raises(ValueError, match="2 data sets needs one integer weight >= 1 for each of them"):
        Mixture([Named("a", 1), Named("b", 1)], weights, 10)


def test_batches_of_the_clip_experiment_contain_all_near_misses_of_a_scene() -> None:
    shapes, other = Shapes(variants=8), Shapes(seed=1)
    mixture = Mixture([shapes, other], [7, 1], length=6400)
    batch = next(iter(Order(6400, 128, run=64)))
    keys = [mixture[key]["key"].rpartition("-") for key in batch]
    scenes = [int(index) // 8 for split, _, index in keys if split == "train-0"]
    assert len(scenes) == 112 and all(scenes.count(scene) == 8 for scene in scenes)

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.weights.storage.pickled import read_pickled
from ldm.weights.storage.sharded import join_shards, shard_files

WEIGHT, MEAN = torch.arange(12.0).view(6, 2), torch.arange(5.0)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def save(folder: Path, *ranks: tuple[list[Tensor], list[Tensor]]) -> Path:
    """Writes a checkpoint whose ranks have these rows of WEIGHT and MEAN."""
    first, *others = ([torch.cat(weight), torch.cat(mean)] for weight, mean in ranks)
    names = [f"step_7_rank_{rank}.shards" for rank in range(1, len(ranks))]
    tree = {"state_dict": {"weight": {"shard": 0}}, "optimizer_states": [{"state": {0: {"mean": {"shard": 1}}}}]}
    torch.save({**tree, "step": 7, "shards": first, "other_ranks": names}, folder / "7.ckpt")
    for name, shards in zip(names, others, strict=True):
        torch.save({"shards": shards}, folder / name)
    return folder / "7.ckpt"


def three(folder: Path) -> Path:
    """Writes a checkpoint whose last rank has no row of the shorter tensor, as with more ranks than rows."""
    rows, numbers = WEIGHT.split(2), (*MEAN.split(3), MEAN[:0])
    return save(folder, *(([row], [number]) for row, number in zip(rows, numbers, strict=True)))


def test_the_shards_of_all_ranks_are_joined(tmp_path: Path) -> None:
    read = join_shards(three(tmp_path), load)
    assert read.keys() == {"state_dict", "optimizer_states", "step"} and read["step"] == 7
    assert torch.equal(read["state_dict"]["weight"], WEIGHT)
    assert torch.equal(read["optimizer_states"][0]["state"][0]["mean"], MEAN)


def test_a_checkpoint_that_one_process_wrote_is_returned_unchanged(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": WEIGHT}}, tmp_path / "7.ckpt")
    assert torch.equal(join_shards(tmp_path / "7.ckpt", load)["state_dict"]["weight"], WEIGHT)


def test_the_caller_chooses_how_shards_are_joined_and_which_keys_are_skipped(tmp_path: Path) -> None:
    read = join_shards(three(tmp_path), load, join=lambda shards: shards[1], skip=("optimizer_states",))
    assert torch.equal(read["state_dict"]["weight"], WEIGHT[2:4])
    assert read["optimizer_states"][0]["state"][0]["mean"] == {"shard": 1}


def test_models_are_read_from_sharded_checkpoints(tmp_path: Path) -> None:
    assert torch.equal(read_pickled(three(tmp_path))["state_dict"]["weight"], WEIGHT)


def test_a_missing_file_of_a_rank_is_named(tmp_path: Path) -> None:
    path = three(tmp_path)
    (tmp_path / "step_7_rank_2.shards").unlink()
    with pytest.raises(FileNotFoundError, match=r"step_7_rank_2\.shards is missing; keep them together"):
        join_shards(path, load)


def test_a_file_in_another_folder_is_never_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Invalid name"):
        shard_files(tmp_path / "7.ckpt", {"other_ranks": ["../secret"]})

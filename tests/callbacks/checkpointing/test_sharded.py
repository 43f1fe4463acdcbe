import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing import checkpoint_file
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.checkpointing.effective_settings import EffectiveSettings
from ldm.callbacks.checkpointing.sharded import ShardedModelParallel
from ldm.callbacks.export import Export
from ldm.training.optim import cosine
from ldm.weights.contents import open_contents
from tests.callbacks.ranks import train_on_two
from tests.training.tiny import GRADIENT, STEADY, diffusion, drift, fit


def train(
    folder: Path, steps: int, resume: Path | None = None, ranks: int = 1, strategy: Any = None, **settings: float
) -> EMA:
    ema = EMA(decay=0.9)
    callbacks = [EffectiveSettings(), ema, Checkpoint(folder, every_n_train_steps=1, keep=2), Export(folder)]
    how: dict[str, Any] = {
        "callbacks": callbacks,
        "enable_checkpointing": True,
        "devices": ranks,
        "gradient_clip_val": 1,
    }
    module = diffusion(optimizer=partial(STEADY, **settings), lr=cosine(2))
    fit(folder, module, steps, resume, 4 // ranks, strategy=strategy or ShardedModelParallel(), **how)
    return ema


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of three steps on two ranks."""
    folder = tmp_path_factory.mktemp("halves")
    codes, stderr = train_on_two(folder, lambda _: train(folder, 3, ranks=2) and None)
    assert codes == [0, 0], stderr
    Checkpoint(folder, keep=2)._prune(3)  # rank 0 may have pruned before rank 1 had written
    return folder


@pytest.fixture
def copied(halves: Path, tmp_path: Path) -> Path:
    for file in halves.glob("step_*"):
        shutil.copy2(file, tmp_path)  # keeps the modification time
    return tmp_path


def vector(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_each_rank_writes_its_shards_and_old_checkpoints_are_deleted(halves: Path) -> None:
    names = sorted(
        re.sub("_[0-9a-f]{8}_rank", "_SAVE_rank", file.name) for file in halves.glob("*.*") if file.suffix != ".txt"
    )
    steps = [name for step in (2, 3) for name in (f"step_{step:08}.ckpt", f"step_{step:08}_SAVE_rank_1.shards")]
    assert names == ["last.ckpt", *steps, "unet.safetensors"]
    sizes = [sum(t.numel() for t in torch.load(file)["shards"]) for file in halves.glob("step_00000003*")]
    assert abs(sizes[0] - sizes[1]) < 0.05 * sum(sizes)


def test_the_shards_together_equal_the_checkpoint_of_one_process(halves: Path, tmp_path: Path) -> None:
    train(tmp_path, 3, strategy="auto")
    ours, expected = (checkpoint_file.read(folder / "last.ckpt") for folder in (halves, tmp_path))
    for part in ("state_dict", "ema"):
        torch.testing.assert_close(vector(ours[part]), vector(expected[part]), **drift(steps=3))
    for name, state in expected["optimizer_states"][0]["state"].items():
        joined = ours["optimizer_states"][0]["state"][name]
        assert joined["step"] == state["step"] == 3
        torch.testing.assert_close(joined["exp_avg"], state["exp_avg"], rtol=0, atol=2 * GRADIENT)
        roots = joined["exp_avg_sq"].sqrt(), state["exp_avg_sq"].sqrt()  # these differ by less than the gradients
        torch.testing.assert_close(*roots, rtol=0, atol=2 * GRADIENT)


def test_models_are_read_from_shards_and_exported_with_ema_weights(halves: Path) -> None:
    of_checkpoint, exported = (
        open_contents(halves / name).network("unet").load() for name in ("last.ckpt", "unet.safetensors")
    )
    assert all(map(torch.equal, of_checkpoint.parameters(), exported.parameters()))


@pytest.mark.slow
def test_one_process_resumes_from_the_checkpoint_of_two_ranks(halves: Path, copied: Path, tmp_path: Path) -> None:
    uninterrupted = train(tmp_path / "uninterrupted", 5, strategy="auto")
    resumed = train(copied, 5, checkpoint_file.newest(copied), strategy="auto")
    torch.testing.assert_close(vector(resumed.averages), vector(uninterrupted.averages), **drift(steps=5))


@pytest.mark.parametrize("corrupt", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-500])])
def test_a_corrupt_or_missing_shard_file_falls_back_to_the_previous_checkpoint(copied: Path, corrupt: object) -> None:
    corrupt(next(copied.glob("step_00000003_*")))  # type: ignore[operator]
    with pytest.warns(UserWarning, match=r"step_00000003\.ckpt is corrupt"):
        assert checkpoint_file.newest(copied) == copied / "step_00000002.ckpt"


@pytest.mark.slow
def test_two_resumed_ranks_end_bit_for_bit_like_uninterrupted_ones(halves: Path, copied: Path) -> None:
    codes, stderr = train_on_two(copied, lambda _: train(copied, 3, copied / "step_00000002.ckpt", 2) and None)
    assert codes == [0, 0], stderr
    straight, resumed = (checkpoint_file.read(folder / "last.ckpt") for folder in (halves, copied))
    assert torch.equal(vector(straight["state_dict"]), vector(resumed["state_dict"]))
    assert torch.equal(vector(straight["ema"]), vector(resumed["ema"]))
    for index, state in straight["optimizer_states"][0]["state"].items():
        assert torch.equal(vector(state), vector(resumed["optimizer_states"][0]["state"][index]))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [None, "ddp"])
def test_two_resumed_ranks_train_with_the_hyperparameters_of_their_config(
    halves: Path, copied: Path, tmp_path: Path, strategy: str | None
) -> None:
    changed = {"lr": 3e-3, "weight_decay": 0.5}
    last = copied / "step_00000003.ckpt"
    codes, stderr = train_on_two(copied, lambda _: train(copied, 6, last, 2, strategy, **changed) and None)
    assert codes == [0, 0], stderr
    for group in checkpoint_file.read(copied / "last.ckpt")["optimizer_states"][0]["param_groups"]:
        assert {name: group[name] for name in ("initial_lr", "weight_decay")} == {
            "initial_lr": 3e-3,
            "weight_decay": 0.5,
        }
    uninterrupted = train(tmp_path / "uninterrupted", 6, halves / "last.ckpt", strategy="auto", **changed)
    ours = checkpoint_file.read(copied / "last.ckpt")["ema"]
    torch.testing.assert_close(vector(ours), vector(uninterrupted.averages), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_resume_from_the_checkpoint_of_one_process(tmp_path: Path) -> None:
    uninterrupted = train(tmp_path, 4, strategy="auto")
    codes, stderr = train_on_two(tmp_path, lambda _: train(tmp_path, 4, tmp_path / "step_00000003.ckpt", 2) and None)
    assert codes == [0, 0], stderr
    again = checkpoint_file.read(tmp_path / "last.ckpt")
    torch.testing.assert_close(vector(again["ema"]), vector(uninterrupted.averages), **drift(steps=4))


def test_an_incomplete_checkpoint_does_not_count_when_old_ones_are_deleted(copied: Path) -> None:
    next(copied.glob("step_00000003_*")).unlink()
    keeper = Checkpoint(copied, keep=1)
    keeper._prune(3)
    assert {file.name[:13] for file in copied.glob("step_*")} == {"step_00000002", "step_00000003"}

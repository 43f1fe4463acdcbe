from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO, Checkpoint
from ldm.data.loading.datamodule import DataModule, collate

Key = tuple[int, int]


class Counted(Dataset[dict[str, Any]]):
    """Sample i has the value i; the samples `bad` report that they replace an unreadable one."""

    def __init__(self, length: int, bad: tuple[int, ...] = ()) -> None:
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int | Key) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        if not 0 <= index < self.length:
            raise IndexError(index)
        reasons = [f"sample {index} is broken"] if index in self.bad else []
        return {"x": torch.tensor(float(index)), "key": str(index), "id": index, "bad": reasons}


class Recorder(LightningModule):
    """Records the (draw, id) of every batch; the final weight depends on all of them and on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches: list[list[Key]] = []
        self.validated = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.weight], lr=0.1)

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        self.batches.append(list(zip(batch["draw"].tolist(), batch["id"].tolist(), strict=True)))
        return (self.weight - batch["x"]).square().mean()

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        self.validated += len(batch["id"])


def data(length: int = 11, batch_size: int = 2, **options: Any) -> DataModule:
    return DataModule(Counted(length), {"held_out": Counted(3)}, batch_size, **options)


def fit(folder: Path, data: DataModule, steps: int, resume: bool = False, **options: Any) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        accumulate_grad_batches=data.accumulation(1),
        callbacks=[Checkpoint(folder)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, data, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    return module


def assert_resumes_exactly(folder: Path, stops: list[int], steps: int, options: dict[str, Any], **trainer: Any) -> None:
    """Checks that a run stopped after each of `stops` has the batches and weights of an uninterrupted run."""
    uninterrupted = fit(folder, data(**options), steps, **trainer)
    batches: list[list[Key]] = []
    for i, stop in enumerate([*stops, steps]):
        resumed = fit(folder, data(**options), stop, resume=i > 0, **trainer)
        batches += resumed.batches
    assert batches == uninterrupted.batches
    assert torch.equal(resumed.weight, uninterrupted.weight)


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_run_stopped_at_any_step_resumes_exactly(tmp_path: Path, stop: int) -> None:
    assert_resumes_exactly(tmp_path, [stop], 12, {})  # a pass has 5 steps and leaves one sample for the next


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_run_that_accumulates_gradients_resumes_exactly(tmp_path: Path, stop: int) -> None:
    assert_resumes_exactly(tmp_path, [stop], 6, {"length": 13, "batch_size": 1, "global_batch": 4})


@pytest.mark.parametrize("stop", [1, 2, 5, 6, 9])
@pytest.mark.parametrize(
    "options", [{"val_check_interval": 2}, {"val_check_interval": 3, "check_val_every_n_epoch": None}]
)
def test_a_run_with_validation_resumes_exactly(tmp_path: Path, stop: int, options: dict[str, Any]) -> None:
    assert_resumes_exactly(tmp_path, [stop], 11, {}, **options)


def test_a_run_stopped_repeatedly_resumes_exactly(tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, [1, 5, 6, 10, 13], 16, {})


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_whose_workers_had_read_ahead_resumes_exactly(tmp_path: Path, stop: int) -> None:
    assert_resumes_exactly(tmp_path, [stop], 7, {"workers": 2})


def test_epochs_have_different_orders_and_each_sample_once(tmp_path: Path) -> None:
    batches = fit(tmp_path, data(), 11).batches
    stream = [key for batch in batches for key in batch]
    epochs = [[index for _, index in stream[start : start + 11]] for start in (0, 11)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 2 and epochs[0] != epochs[1]
    assert [draw for draw, _ in stream] == [0] * 11 + [1] * 11


def test_the_state_counts_the_samples_trained_on(tmp_path: Path) -> None:
    module = data(length=13, batch_size=1, global_batch=4, workers=1)
    fit(tmp_path, module, 5, val_check_interval=4)
    assert module.state_dict() == {"seen": 20}


def test_validation_sees_every_sample_once(tmp_path: Path) -> None:
    assert fit(tmp_path, data(), 5).validated == 3


def test_a_limit_restricts_training_to_the_first_samples(tmp_path: Path) -> None:
    seen = {index for batch in fit(tmp_path, data(limit=4), 6).batches for _, index in batch}
    assert seen == {0, 1, 2, 3}


def test_collating_stacks_numbers_and_tensors_and_lists_text() -> None:
    batch = collate([Counted(5, bad=(4,))[index] for index in (1, 4)])
    assert torch.equal(batch["x"], torch.tensor([1.0, 4.0])) and batch["id"].dtype == torch.int64
    assert batch["key"] == ["1", "4"] and batch["bad"] == [[], ["sample 4 is broken"]]


def test_tokenizing_is_refused_if_the_trained_module_reads_no_captions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenize=true, but Recorder reads no captions: remove the setting"):
        fit(tmp_path, data(tokenize=True), 1)


def test_too_many_bad_samples_stop_the_run_with_one_of_the_reasons(tmp_path: Path) -> None:
    damaged = DataModule(Counted(20, bad=tuple(range(10))), {}, 4, max_bad_share=0.3)
    with pytest.raises(ValueError, match=r"sample \d is broken; fix the data or raise data.max_bad_share"):
        fit(tmp_path, damaged, 5)


def test_a_few_bad_samples_are_counted_once_and_tolerated(tmp_path: Path) -> None:
    damaged = DataModule(Counted(20, bad=(3, 5)), {"all": Counted(20, bad=(3, 5))}, 4, max_bad_share=0.3, workers=1)
    fit(tmp_path, damaged, 5)
    assert (damaged.bad.bad, damaged.bad.seen) == (2, 20)


@pytest.mark.parametrize(("global_batch", "world", "steps"), [(None, 3, 1), (8, 1, 4), (8, 2, 2), (8, 4, 1)])
def test_gradient_accumulation_reaches_the_global_batch_size(global_batch: int | None, world: int, steps: int) -> None:
    assert data(global_batch=global_batch).accumulation(world) == steps


@pytest.mark.parametrize(("global_batch", "world"), [(7, 1), (8, 3), (2, 2)])
def test_a_global_batch_that_is_not_a_multiple_is_refused(global_batch: int, world: int) -> None:
    message = f"data.global_batch={global_batch} is not a multiple of data.batch_size=2 x {world} ranks"
    with pytest.raises(ValueError, match=message):
        data(global_batch=global_batch).accumulation(world)


def test_fewer_samples_than_one_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are 3 training samples, fewer than the 4 of one optimizer step"):
        fit(tmp_path, data(length=3, batch_size=4), 1)


def test_an_empty_training_set_is_refused() -> None:
    with pytest.raises(ValueError, match="the training data set is empty"):
        data(length=0)


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.batch_size must be at least 1"):
        data(batch_size=0)


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (2, 1), (6, 1), (2, 3), (1, 4), (3, 2)])
def test_each_sample_of_a_global_batch_has_its_own_stratum_on_any_ranks(batch_size: int, world: int) -> None:
    module = data(batch_size=batch_size, global_batch=12)
    strata = []
    for step in range(2):
        for _ in range(module.accumulation(world)):
            strata += [row for rank in range(world) for row in module._strata(world, rank).tolist()]
            module.seen += batch_size * world
        one_rank = data(batch_size=12)
        one_rank.seen = 12 * step
        assert strata[12 * step :] == one_rank._strata(1, 0).tolist()
        assert sorted(strata[12 * step :]) == [[stratum, 12] for stratum in range(12)]


def test_the_strata_of_each_rank_and_accumulated_batch_cover_the_range() -> None:
    module = data(batch_size=8, global_batch=64)
    for rank in range(8):
        strata = module._strata(8, rank)[:, 0].sort().values
        assert strata[0] < 16 and strata[-1] >= 48 and strata.diff().max() <= 16


class Shaped(Counted):
    """Every third sample is wide."""

    @property
    def buckets(self) -> Any:
        return np.arange(self.length) % 3 == 0

    def __getitem__(self, key: int | Key) -> dict[str, Any]:
        sample = super().__getitem__(key)
        return {**sample, "x": torch.full((2, 4) if sample["id"] % 3 == 0 else (3, 3), float(sample["id"]))}


def test_a_run_of_bucketed_batches_resumes_exactly(tmp_path: Path) -> None:
    def bucketed() -> DataModule:
        return DataModule(Shaped(29), {"held_out": Shaped(7)}, 2, global_batch=4, val_batch_size=3, bucketed=True)

    uninterrupted = fit(tmp_path / "one", bucketed(), 12, val_check_interval=4)
    first = fit(tmp_path / "two", bucketed(), 5)
    second = fit(tmp_path / "two", bucketed(), 12, resume=True)
    assert first.batches + second.batches == uninterrupted.batches
    keys = [key for batch in uninterrupted.batches for key in batch]
    assert len(set(keys)) == len(keys) == 48
    assert uninterrupted.validated % 7 == 0 and uninterrupted.validated


@pytest.mark.parametrize("options", [{}, {"global_batch": 4, "limit": 8}])
def test_buckets_without_a_global_batch_or_with_a_limit_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"needs data.global_batch, .* works with neither data.limit"):
        DataModule(Shaped(29), {}, 2, bucketed=True, **options)


def test_one_sample_of_each_data_set_stands_for_data_of_one_size() -> None:
    assert [sample["id"] for sample in data().samples_of_each_size()] == [0, 0]


def test_bucketed_data_sets_give_one_sample_of_each_size() -> None:
    several = DataModule(Shaped(29), {"held_out": Shaped(7)}, 2, global_batch=4, bucketed=True)
    shapes = [tuple(sample["x"].shape) for sample in several.samples_of_each_size()]
    expected = {tuple(Shaped(29)[index]["x"].shape) for index in range(29)}
    assert len(expected) > 1 and len(shapes) == 2 * len(expected) and set(shapes) == expected

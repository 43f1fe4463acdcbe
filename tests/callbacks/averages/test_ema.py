from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing.checkpoint import AtomicCheckpointIO, Checkpoint
from tests.callbacks.tiny import Batches, Tiny, trainer


class Weights(Callback):
    """Records the weights at the start and after each batch."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_start(self, _: Any, module: Any) -> None:
        self.seen.append(module.weights())

    def on_train_batch_end(self, _: Any, module: Any, *__: Any) -> None:
        self.seen.append(module.weights())


def vector(averages: dict[str, Tensor]) -> Tensor:
    return nn.utils.parameters_to_vector(averages.values())


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_equals_a_float64_reference(tmp_path: Path, warmup: bool) -> None:
    ema, weights = EMA(decay=0.25, warmup=warmup), Weights()
    trainer(tmp_path, ema, weights, max_steps=5).fit(Tiny(), Batches())
    average = weights.seen[0].double()
    for n, weight in enumerate(weights.seen[1:], start=1):
        decay = min(0.25, (1 + n) / (10 + n)) if warmup else 0.25
        average = decay * average + (1 - decay) * weight.double()
    torch.testing.assert_close(vector(ema.averages).double(), average, rtol=1e-6, atol=1e-7)


def test_the_average_is_updated_per_optimizer_step_and_not_per_batch(tmp_path: Path) -> None:
    ema = EMA()
    trainer(tmp_path, ema, max_steps=4, accumulate_grad_batches=3).fit(Tiny(), Batches())
    assert ema.updates == 4


@pytest.mark.parametrize("stop", [4, 6, 8])
def test_resuming_restores_weights_and_averages_bit_for_bit(tmp_path: Path, stop: int) -> None:
    expected, straight = EMA(0.9), Tiny()
    trainer(tmp_path / "a", expected, Checkpoint(tmp_path / "a"), max_steps=13).fit(straight, Batches())
    trainer(tmp_path / "b", EMA(0.9), Checkpoint(tmp_path / "b"), max_steps=stop).fit(Tiny(), Batches())
    ema, resumed = EMA(0.9), Tiny()
    again = trainer(tmp_path / "b", ema, Checkpoint(tmp_path / "b"), max_steps=13)
    again.fit(resumed, Batches(), ckpt_path=tmp_path / "b" / "last.ckpt")
    assert torch.equal(resumed.weights(), straight.weights())
    assert torch.equal(vector(ema.averages), vector(expected.averages))
    assert ema.updates == expected.updates == 13


def test_a_checkpoint_stores_the_averages_once_by_weight_name(tmp_path: Path) -> None:
    ema = EMA()
    trainer(tmp_path, ema, Checkpoint(tmp_path)).fit(Tiny(), Batches())
    checkpoint = AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["callbacks"]["EMA"] == {"updates": 4}
    assert list(checkpoint["ema"]) == ["weight", "bias"]
    assert torch.equal(vector(checkpoint["ema"]), vector(ema.averages))


def test_swapped_uses_the_averages_and_restores_the_weights_after_an_exception(tmp_path: Path) -> None:
    ema, module = EMA(), Tiny()
    trainer(tmp_path, ema).fit(module, Batches())
    before = module.weights()
    with pytest.raises(ZeroDivisionError), ema.swapped(module):
        inside = module.weights()
        raise ZeroDivisionError
    assert torch.equal(inside, vector(ema.averages)) and not torch.equal(inside, before)
    assert torch.equal(module.weights(), before)


def test_the_averages_are_swapped_in_without_a_copy(tmp_path: Path) -> None:
    ema, module = EMA(), Tiny()
    trainer(tmp_path, ema).fit(module, Batches())
    weight, average = module.backbone.weight.data_ptr(), ema.averages["weight"].data_ptr()
    with ema.swapped(module):
        assert module.backbone.weight.data_ptr() == average
    assert module.backbone.weight.data_ptr() == weight


def test_averages_of_another_dtype_are_swapped_and_the_weights_restored_exactly(tmp_path: Path) -> None:
    ema, module = EMA(device="cpu", dtype="bfloat16"), Tiny()
    trainer(tmp_path, ema).fit(module, Batches())
    before = module.weights()
    with torch.inference_mode(), ema.swapped(module):  # as in validation
        assert torch.equal(module.weights(), vector(ema.averages).float())
    assert torch.equal(module.weights(), before) and not module.backbone.weight.is_inference()


def test_validation_uses_the_averages_and_does_not_change_the_weights(tmp_path: Path) -> None:
    ema, seen = EMA(), []

    class Watched(Tiny):
        def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
            seen.append((self.weights(), vector(ema.averages).clone()))

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            weights.append(self.weights())

    weights: list[Tensor] = []
    module = Watched()
    last = Weights()
    run = trainer(tmp_path, ema, last, max_steps=8, val_check_interval=2, limit_val_batches=1)
    run.fit(module, Batches(), Batches())
    assert len(seen) == 4 and all(torch.equal(inside, average) for inside, average in seen)
    assert len(weights) == 8
    assert all(torch.equal(a, b) for a, b in zip(weights, last.seen[:-1], strict=True))


def test_an_exception_in_validation_restores_the_training_weights(tmp_path: Path) -> None:
    class Failing(Tiny):
        def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
            raise ZeroDivisionError

    module, last = Failing(), Weights()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, EMA(), last, val_check_interval=2).fit(module, Batches(), Batches())
    assert torch.equal(module.weights(), last.seen[-1])


def test_testing_from_a_checkpoint_uses_its_averages(tmp_path: Path) -> None:
    trained = EMA()
    trainer(tmp_path, trained, Checkpoint(tmp_path)).fit(Tiny(), Batches())
    seen = []

    class Watched(Tiny):
        def test_step(self, batch: dict[str, Tensor], _: int) -> None:
            seen.append(self.weights())

    trainer(tmp_path, EMA()).test(Watched(), Batches(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(seen[0], vector(trained.averages))


def test_no_checkpoint_can_be_saved_while_the_averages_are_swapped_in(tmp_path: Path) -> None:
    ema, module = EMA(), Tiny()
    run = trainer(tmp_path, ema)
    run.fit(module, Batches())
    with ema.swapped(module), pytest.raises(RuntimeError, match="while the averages"):
        run.save_checkpoint(tmp_path / "wrong.ckpt")
    assert not (tmp_path / "wrong.ckpt").exists()


def test_a_decay_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="decay is 1"):
        EMA(decay=1)


def test_a_bfloat16_average_follows_updates_below_its_rounding() -> None:
    torch.manual_seed(0)
    network = nn.Linear(100, 100)
    exact, low = EMA(0.999, warmup=False), EMA(0.999, warmup=False, device="cpu", dtype="bfloat16")
    for ema in (exact, low):
        ema.tracks = [{name: w.detach().to(ema.dtype, copy=True) for name, w in network.named_parameters()}]
    nn.init.constant_(network.weight, 1.0)
    naive = low.averages["weight"].clone()
    for _ in range(500):
        naive = naive.float().lerp(network.weight, 1e-3).bfloat16()
        exact.update(dict(network.named_parameters()))
        low.update(dict(network.named_parameters()))
    lost = (exact.averages["weight"] - naive.float()).mean()  # by rounding to nearest
    error = (exact.averages["weight"] - low.averages["weight"].float()).mean()
    assert lost > 0.1 and abs(error) < 0.01 * lost


def test_an_unsupported_dtype_of_the_average_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema\.dtype is int8"):
        EMA(dtype="int8")


@pytest.mark.cuda
def test_an_average_on_the_cpu_of_weights_on_a_gpu_equals_one_on_the_gpu() -> None:
    linear = nn.Linear(3, 3).cuda()
    averages = []
    for device in ("cpu", "cuda"):
        ema = EMA(decay=0.5, warmup=False, device=device)
        ema.tracks = [{name: (2 * weight.detach()).to(device) for name, weight in linear.named_parameters()}]
        for _ in range(2):
            ema.update(dict(linear.named_parameters()))
        averages.append(torch.cat([average.flatten().cpu() for average in ema.averages.values()]))
    torch.testing.assert_close(*averages)

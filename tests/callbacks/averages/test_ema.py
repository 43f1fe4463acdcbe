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
    """Keeps the weights at the start and after each batch."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_start(self, _: Any, module: Any) -> None:
        self.seen.append(module.weights())

    def on_train_batch_end(self, _: Any, module: Any, *__: Any) -> None:
        self.seen.append(module.weights())


def vector(averages: dict[str, Tensor]) -> Tensor:
    return nn.utils.parameters_to_vector(averages.values())


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_the_one_written_by_hand_in_float64(tmp_path: Path, warmup: bool) -> None:
    ema, weights = EMA(decay=0.25, warmup=warmup), Weights()
    trainer(tmp_path, ema, weights, max_steps=5).fit(Tiny(), Batches())
    average = weights.seen[0].double()
    for n, weight in enumerate(weights.seen[1:], start=1):
        decay = min(0.25, (1 + n) / (10 + n)) if warmup else 0.25
        average = decay * average + (1 - decay) * weight.double()
    torch.testing.assert_close(vector(ema.averages).double(), average, rtol=1e-6, atol=1e-7)


def test_an_update_is_made_for_each_optimizer_step_and_not_for_each_batch(tmp_path: Path) -> None:
    ema = EMA()
    trainer(tmp_path, ema, max_steps=4, accumulate_grad_batches=3).fit(Tiny(), Batches())
    assert ema.updates == 4


@pytest.mark.parametrize("stop", [4, 6, 8])
def test_a_resumed_run_has_the_same_weights_and_averages_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole, straight = EMA(0.9), Tiny()
    trainer(tmp_path / "a", whole, Checkpoint(tmp_path / "a"), max_steps=13).fit(straight, Batches())
    trainer(tmp_path / "b", EMA(0.9), Checkpoint(tmp_path / "b"), max_steps=stop).fit(Tiny(), Batches())
    parts, resumed = EMA(0.9), Tiny()
    again = trainer(tmp_path / "b", parts, Checkpoint(tmp_path / "b"), max_steps=13)
    again.fit(resumed, Batches(), ckpt_path=tmp_path / "b" / "last.ckpt")
    assert torch.equal(resumed.weights(), straight.weights())
    assert torch.equal(vector(parts.averages), vector(whole.averages))
    assert parts.updates == whole.updates == 13


def test_a_checkpoint_holds_the_averages_once_and_by_the_names_of_the_weights(tmp_path: Path) -> None:
    ema = EMA()
    trainer(tmp_path, ema, Checkpoint(tmp_path)).fit(Tiny(), Batches())
    checkpoint = AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint["callbacks"]["EMA"] == {"updates": 4}
    assert list(checkpoint["ema"]) == ["weight", "bias"]
    assert torch.equal(vector(checkpoint["ema"]), vector(ema.averages))


def test_swapped_puts_the_averages_in_and_the_weights_back_after_an_exception(tmp_path: Path) -> None:
    ema, module = EMA(), Tiny()
    trainer(tmp_path, ema).fit(module, Batches())
    before = module.weights()
    with pytest.raises(ZeroDivisionError), ema.swapped(module):
        inside = module.weights()
        raise ZeroDivisionError
    assert torch.equal(inside, vector(ema.averages)) and not torch.equal(inside, before)
    assert torch.equal(module.weights(), before)


def test_the_averages_themselves_stand_in_for_the_weights_instead_of_copies(tmp_path: Path) -> None:
    ema, module = EMA(), Tiny()
    trainer(tmp_path, ema).fit(module, Batches())
    place, average = module.backbone.weight.data_ptr(), ema.averages["weight"].data_ptr()
    with ema.swapped(module):
        assert module.backbone.weight.data_ptr() == average
    assert module.backbone.weight.data_ptr() == place


def test_averages_of_another_type_are_swapped_in_and_the_weights_back_bit_for_bit(tmp_path: Path) -> None:
    ema, module = EMA(device="cpu", dtype="bfloat16"), Tiny()
    trainer(tmp_path, ema).fit(module, Batches())
    before = module.weights()
    with torch.inference_mode(), ema.swapped(module):  # as in validation
        assert torch.equal(module.weights(), vector(ema.averages).float())
    assert torch.equal(module.weights(), before) and not module.backbone.weight.is_inference()


def test_validation_sees_the_averages_and_leaves_the_weights(tmp_path: Path) -> None:
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


def test_an_exception_in_validation_leaves_the_training_weights_in_place(tmp_path: Path) -> None:
    class Failing(Tiny):
        def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
            raise ZeroDivisionError

    module, last = Failing(), Weights()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, EMA(), last, val_check_interval=2).fit(module, Batches(), Batches())
    assert torch.equal(module.weights(), last.seen[-1])


def test_testing_from_a_checkpoint_uses_the_averages_in_it(tmp_path: Path) -> None:
    trained = EMA()
    trainer(tmp_path, trained, Checkpoint(tmp_path)).fit(Tiny(), Batches())
    seen = []

    class Watched(Tiny):
        def test_step(self, batch: dict[str, Tensor], _: int) -> None:
            seen.append(self.weights())

    trainer(tmp_path, EMA()).test(Watched(), Batches(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(seen[0], vector(trained.averages))


def test_no_checkpoint_is_saved_while_the_averages_stand_in_for_the_weights(tmp_path: Path) -> None:
    ema, module = EMA(), Tiny()
    run = trainer(tmp_path, ema)
    run.fit(module, Batches())
    with ema.swapped(module), pytest.raises(RuntimeError, match="while the averages"):
        run.save_checkpoint(tmp_path / "wrong.ckpt")
    assert not (tmp_path / "wrong.ckpt").exists()


def test_a_decay_that_forgets_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="decay is 1"):
        EMA(decay=1)


def test_an_average_in_bfloat16_on_the_cpu_follows_the_one_in_float32_though_each_step_is_below_its_rounding() -> None:
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
    way = (exact.averages["weight"] - naive.float()).mean()  # what rounding to the nearest loses
    left = (exact.averages["weight"] - low.averages["weight"].float()).mean()
    assert way > 0.1 and abs(left) < 0.01 * way


def test_a_type_that_averages_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema\.dtype is int8"):
        EMA(dtype="int8")

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from ldm.callbacks.monitoring.throughput import Throughput
from ldm.callbacks.monitoring.utilisation import Utilisation
from tests.callbacks.logged import Logged
from tests.callbacks.tiny import Batches, Tiny, trainer


def logged(tmp_path: Path, flops: float | None) -> Logged:
    logger = Logged()
    callbacks = Throughput(), Utilisation(flops, lambda _: 1e12)
    trainer(tmp_path, *callbacks, logger=logger, log_every_n_steps=2).fit(Tiny(), Batches())
    return logger


def test_flops_per_second_are_those_of_an_image_times_the_logged_speed(tmp_path: Path) -> None:
    logger = logged(tmp_path, 1e9)
    speed, flops = logger.curve("train/images_per_second"), logger.curve("train/flops_per_second")
    assert list(flops) == [1, 3]
    assert list(flops.values()) == pytest.approx([1e9 * value for value in speed.values()])


def test_on_a_cpu_neither_mfu_nor_gpu_memory_is_logged(tmp_path: Path) -> None:
    assert {name for row in logged(tmp_path, 1e9).rows.values() for name in row} == {
        *("train/images_per_second", "train/data_wait", "train/flops_per_second", "epoch")
    }


def test_without_a_plan_no_flops_are_logged(tmp_path: Path) -> None:
    assert not logged(tmp_path, None).curve("train/flops_per_second")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_mfu_and_the_peak_of_its_memory_are_logged(tmp_path: Path) -> None:
    logger, tiny = Logged(), Tiny()
    with patch.object(torch.cuda, "get_device_name", lambda _: "a GPU"):
        callbacks = Throughput(), Utilisation(1e9, {"a GPU": 1e12}.get)
        trainer(tmp_path, *callbacks, logger=logger, accelerator="gpu").fit(tiny, Batches())
    mfu, flops = logger.curve("train/mfu"), logger.curve("train/flops_per_second")
    assert list(mfu.values()) == pytest.approx([value / 1e12 for value in flops.values()])
    for used, reserved in zip(
        logger.curve("train/gpu_memory").values(), logger.curve("train/gpu_memory_reserved").values(), strict=True
    ):
        assert 0 < used <= reserved

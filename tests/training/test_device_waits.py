"""A training step that is not logged neither reads from the device nor copies to it, which would wait for it."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from ldm.adapters.lora import LoRA
from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing import checkpoint
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.monitoring import health
from ldm.callbacks.monitoring.health import Health
from ldm.callbacks.monitoring.images_seen import ImagesSeen
from ldm.callbacks.monitoring.learning import Learning
from ldm.callbacks.monitoring.loss_by_noise import LossByNoise
from ldm.callbacks.monitoring.progress import Progress
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import scaled_linear
from ldm.diffusion.time_sampling import Uniform
from ldm.training.diffusion import DiffusionTraining
from ldm.training.muon import Muon
from tests.callbacks.ranks import train_on_two
from tests.meta_device import Waits, on_meta
from tests.tiny import tiny_inpainting_unet, tiny_unet
from tests.training import test_autoencoder, test_clip
from tests.training.tiny import STEADY, diffusion, fit

FUSED = {"optimizer": STEADY}


def discrete() -> DiffusionTraining:
    schedule = scaled_linear()
    return diffusion(schedule=schedule, prediction=Prediction("v"), times=Uniform(schedule), stratified=True, **FUSED)


def with_adapter() -> DiffusionTraining:
    unet, adapter = tiny_unet().train(), LoRA(rank=2, dropout=0.5)
    adapter.adapt(unet)
    return diffusion(backbone=unet, adapter=adapter, base={"weights": "unet", "fingerprint": "u"}, **FUSED)


def autoencoder() -> LightningModule:
    module = test_autoencoder.training()
    module.make_optimizer = STEADY
    return module


def clip() -> LightningModule:
    module = test_clip.training()
    module.make_optimizer = STEADY
    return module


MODULES = {
    "flow": lambda: diffusion(**FUSED),
    "muon": lambda: diffusion(optimizer=Muon),
    "discrete": discrete,
    "inpainting": lambda: diffusion(backbone=tiny_inpainting_unet().train(), **FUSED),
    "adapter": with_adapter,
    "autoencoder": autoencoder,
    "clip": clip,
}


class Done(Exception):
    """Ends a run."""


class Recording(Callback):
    """Keeps the waits of the second and third step, from the start of one step to the start of the next."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.places: list[str] = []

    def on_train_batch_start(self, _: Any, __: Any, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx == 1:
            self.waits.places.clear()
        if batch_idx == 3:
            self.places = list(self.waits.places)
            raise Done


def waits_of_two_steps(folder: Path, module: LightningModule, monkeypatch: pytest.MonkeyPatch, **how: Any) -> list[str]:
    """Trains with the callbacks of a diffusion run and returns where two steps waited for the device."""
    adam = sys.modules["torch.optim.adam"]  # whose fused kernel has a meta implementation, but a check against it
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    waits = Waits()
    recording = Recording(waits)
    measures = [
        ImagesSeen(),
        Health(folder),
        LossByNoise(),
        Throughput(),
        Progress(seconds=1e9),
        EMA(),
        Checkpoint(folder),
    ]
    callbacks = [recording, *([Learning()] if isinstance(module, DiffusionTraining) else []), *measures]
    how = {"log_every_n_steps": 50, "enable_checkpointing": True, "enable_progress_bar": True} | how
    with waits, pytest.raises(Done):
        fit(folder, module, 9, batch_size=2, tokenize=None, callbacks=callbacks, **on_meta(), **how)
    return recording.places


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=[] if name == "flow" else [pytest.mark.slow]) for name, make in MODULES.items()],
)
def test_a_step_copies_its_batch_to_the_device_and_does_not_wait_otherwise(
    tmp_path: Path, make: Callable[[], LightningModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make()
    places = waits_of_two_steps(tmp_path, module, monkeypatch, gradient_clip_val=1.0)
    batches = [place for place in places if place.startswith("copy in apply_func.py")]  # Lightning's, pinned on a GPU
    assert [place for place in places if place not in batches] == []
    assert len(batches) == 2 * len({"image", "id", "draw"} | ({"tokens"} if hasattr(module, "tokenize") else set()))


@pytest.mark.slow
def test_the_instrument_sees_the_finiteness_that_is_read_in_logged_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = waits_of_two_steps(tmp_path, diffusion(**FUSED), monkeypatch, log_every_n_steps=1)
    assert sum(place.startswith("read in health.py") and "broken" in place for place in places) == 2


@pytest.mark.cuda
def test_a_step_on_a_gpu_does_not_synchronise(tmp_path: Path) -> None:
    class Strict(Callback):
        def on_train_batch_start(self, _: Any, __: Any, ___: Any, batch_idx: int) -> None:
            if batch_idx:  # the first step copies tables to the device
                torch.cuda.set_sync_debug_mode("default" if batch_idx == 3 else "error")

    callbacks = [Strict(), ImagesSeen(), Health(tmp_path), LossByNoise(), Throughput(), EMA()]
    how = {"accelerator": "cuda", "callbacks": callbacks, "log_every_n_steps": 50}
    try:
        trainer = fit(tmp_path, discrete(), 4, batch_size=2, tokenize=None, **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.global_step == 4


@pytest.mark.slow
def test_ranks_agree_on_nothing_but_finiteness_in_a_step_that_is_not_logged(tmp_path: Path) -> None:
    """Counts the collective operations of Python code; those of gradients are started by DDP itself."""

    class Counting(Callback):
        def on_train_batch_start(self, _: Any, __: Any, ___: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                calls.clear()
            if batch_idx == 2:
                (tmp_path / f"{os.environ['RANK']}.json").write_text(json.dumps(calls))

    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(torch.distributed, name)
        return lambda *args, **how: (calls.append(name), real(*args, **how))[1]

    def work(rank: int) -> None:
        for name in ("barrier", "all_reduce", "broadcast", "all_gather"):
            setattr(torch.distributed, name, counted(name))
        health.all_reduce = torch.distributed.all_reduce  # type: ignore[attr-defined]
        checkpoint.steps_to_next_poll = lambda *_: 1000  # as on GPUs
        callbacks = [
            Counting(),
            ImagesSeen(),
            Health(tmp_path),
            LossByNoise(),
            Throughput(),
            EMA(),
            Checkpoint(tmp_path),
        ]
        how = {"devices": 2, "strategy": "ddp", "log_every_n_steps": 50, "enable_checkpointing": True}
        fit(tmp_path, discrete(), 4, batch_size=1, callbacks=callbacks, **how)

    codes, stderr = train_on_two(tmp_path, work)
    assert codes == [0, 0], stderr
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [["all_reduce"]] * 2

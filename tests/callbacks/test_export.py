from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.export import Export
from ldm.callbacks.monitoring.metrics import Metrics
from ldm.weights.native import load_network, read_about
from tests.training.tiny import diffusion, fit


def state(path: Path) -> dict[str, torch.Tensor]:
    return load_network(path, "unet", dtype=None).state_dict()


def test_networks_are_exported_with_ema_weights_and_all_that_sampling_needs(tmp_path: Path) -> None:
    module, ema = diffusion(), EMA(decay=0.5)
    fit(tmp_path, module, callbacks=[ema, Export(tmp_path)])
    saved, trained = state(tmp_path / "unet.safetensors"), module.backbone.state_dict()
    assert all(torch.equal(saved[name], ema.averages[name]) for name in trained)
    assert not any(torch.equal(saved[name], trained[name]) for name in trained)
    assert read_about(tmp_path / "unet.safetensors") == module.about()


def test_without_an_ema_the_weights_are_exported_in_the_requested_dtype(tmp_path: Path) -> None:
    module = diffusion()
    fit(tmp_path, module, callbacks=[Export(tmp_path, dtype="float16")])
    saved = state(tmp_path / "unet.safetensors")
    assert all(torch.equal(saved[name], weight.half()) for name, weight in module.backbone.state_dict().items())


def test_a_run_that_fails_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("broken")

    module = diffusion()
    monkeypatch.setattr(module, "training_step", broken)
    with pytest.raises(ValueError, match="broken"):
        fit(tmp_path, module, callbacks=[Metrics(tmp_path), Export(tmp_path)])
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / "metrics.json").exists()


def test_resuming_a_finished_run_keeps_the_exported_weights(tmp_path: Path) -> None:
    for resume in (None, tmp_path / "last.ckpt"):
        callbacks = [EMA(decay=0.5), Checkpoint(tmp_path), Export(tmp_path)]
        fit(tmp_path, diffusion(), steps=4, callbacks=callbacks, resume=resume, enable_checkpointing=True)
        exported = (tmp_path / "unet.safetensors").read_bytes()
        if resume is None:
            first = exported
    assert exported == first

"""Optimizers from optional packages are refused without the package and resume bit for bit with it."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.checkpointing.effective_settings import EffectiveSettings
from ldm.planning.memory import optimizer_state, total_bytes
from ldm.training.packaged_optimizers import adamw_8bit, prodigy
from tests.runs import ALONE, TINY, refusal
from tests.training.tiny import diffusion, fit

MAKE = {"adamw_8bit": (adamw_8bit, "bitsandbytes"), "prodigy": (prodigy, "prodigyopt")}


@pytest.mark.parametrize("name", MAKE)
def test_an_optimizer_without_its_package_is_refused_in_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = MAKE[name][1]
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(tmp_path, *TINY, *ALONE, f"optimizer={name}", "trainer.max_steps=1")
    assert message.startswith(f"optimizer={name} needs the package {package}") and "pip install 'ldm[" in message


@pytest.mark.parametrize("name", MAKE)
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    make, package = MAKE[name]
    pytest.importorskip(package)

    def train(folder: Path, steps: int, resume: Path | None = None) -> tuple[dict[str, Any], list[Any]]:
        module = diffusion(optimizer=partial(make, lr=1e-2))
        callbacks = [EffectiveSettings(), Checkpoint(folder)]
        trainer = fit(folder, module, steps, resume, callbacks=callbacks, enable_checkpointing=True)
        return module.backbone.state_dict(), [group.get("d") for group in trainer.optimizers[0].param_groups]

    straight = train(tmp_path / "a", 5)
    train(tmp_path / "b", 3)
    resumed = train(tmp_path / "b", 5, tmp_path / "b" / "last.ckpt")
    assert resumed[1] == straight[1]
    assert all(torch.equal(resumed[0][key], weight) for key, weight in straight[0].items())


@pytest.mark.parametrize("name", MAKE)
def test_the_plan_counts_the_optimizer_state(name: str) -> None:
    make, package = MAKE[name]
    pytest.importorskip(package)
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((64, 100), (10,))]
    optimizer = make(weights, lr=1e-2)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if "qmap" not in key]
    held = total_bytes(value for value in states if torch.is_tensor(value))
    assert optimizer_state({"_target_": f"ldm.training.packaged_optimizers.{name}"}, weights) == held


def test_prodigy_refuses_a_separate_learning_rate_for_the_text_encoder() -> None:
    pytest.importorskip("prodigyopt")
    groups: Any = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in (1.0, 0.5)]
    with pytest.raises(ValueError, match="optimizer=prodigy has one step size for all weights"):
        prodigy(groups)

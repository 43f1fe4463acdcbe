"""A run ends with an error if a part that should be trained does not change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.adapters.lora import LoRA
from ldm.adapters.targets import low_rank_layers
from ldm.adapters.text import train_all
from ldm.callbacks.monitoring.learning import Learning
from ldm.training.diffusion import DiffusionTraining
from ldm.weights.parts import Frozen
from tests.tiny import tiny_text_encoder, tiny_unet
from tests.training.tiny import diffusion, fit

BASE = {"weights": "unet.safetensors", "fingerprint": "u"}


def lora() -> DiffusionTraining:
    backbone, adapter = tiny_unet().train(), LoRA(rank=2)
    adapter.adapt(backbone)
    return diffusion(backbone=backbone, adapter=adapter, base=BASE)


def with_text() -> DiffusionTraining:
    text = tiny_text_encoder()
    train_all(text)
    return diffusion(text_encoder=Frozen(text, {"weights": "t", "fingerprint": "t"}), text_encoder_lr=1e-2)


@pytest.mark.parametrize("make", [lora, with_text, diffusion])
def test_a_run_that_learns_is_not_interrupted(make: Any, tmp_path: Path) -> None:
    assert fit(tmp_path, make(), 3, callbacks=[Learning(2)]).global_step == 3


def test_a_run_whose_low_rank_weights_stay_zero_ends_and_names_the_layer(tmp_path: Path) -> None:
    module = lora()
    name, layer = list(low_rank_layers(module.backbone).items())[1]
    torch.nn.init.zeros_(layer.down)
    layer.down.requires_grad_(False)  # so that `up` has a gradient of zero
    with pytest.raises(ValueError, match=rf"after 2 steps the low-rank changes of 1 layers are still zero .*{name}"):
        fit(tmp_path, module, 3, callbacks=[Learning(2)])


def test_a_short_run_that_has_learnt_nothing_ends_with_the_reason(tmp_path: Path) -> None:
    module = lora()
    for layer in low_rank_layers(module.backbone).values():
        layer.up.register_hook(torch.zeros_like)
    with pytest.raises(ValueError, match="the run ends after 2 steps with all low-rank changes still zero"):
        fit(tmp_path, module, 2, callbacks=[Learning(100)])


def test_a_text_encoder_without_gradient_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = with_text()
    encode = module.text_encoder.encode

    def detached(*inputs: Any, **how: Any) -> Any:
        return encode(*inputs, **how).map(Tensor.detach)

    monkeypatch.setattr(module.text_encoder, "encode", detached)
    with pytest.raises(ValueError, match=r"after 2 steps no gradient reaches the .* weights of the text encoder"):
        fit(tmp_path, module, 3, callbacks=[Learning(2)])


def test_a_text_encoder_that_had_a_gradient_earlier_is_accepted(tmp_path: Path) -> None:
    callback = Learning(2)
    callback.load_state_dict({"reached": True})
    module = with_text()
    module.trained_text.requires_grad_(False)
    module.trained_text.towers[0].norm.bias.requires_grad_(True)
    module.trained_text.towers[0].norm.bias.register_hook(torch.zeros_like)
    assert fit(tmp_path, module, 3, callbacks=[callback]).global_step == 3


def test_a_check_after_zero_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"callbacks\.learning\.after is 0"):
        Learning(0)

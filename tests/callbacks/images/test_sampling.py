from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.images.sampling import image_sampler
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Flow
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.settings import Settings
from tests.callbacks.tiny import Batches, Tiny, trainer
from tests.tiny import SAMPLING, tiny_text_encoder, tiny_unet, tiny_vae

PROMPTS, SEEDS = ["a red circle", "a blue square"], [3, 4]


class Real(Tiny):
    """Has all parts of a latent diffusion model, but trains on an arbitrary objective."""

    sampling, size, seed = SAMPLING, (16, 16), 0

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_unet().train()
        self.parts = tiny_vae(), tiny_text_encoder()
        self.first_stage, self.text_encoder = self.parts
        self.schedule, self.prediction = Flow(), Prediction("flow")
        self.denoiser = Denoiser(self.backbone, self.schedule, self.prediction)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        x, conditioning = torch.ones(2, 4, 8, 8), Conditioning(text=torch.ones(2, 16, 16))
        return self.backbone(x, torch.ones(2), conditioning).square().mean()


def test_the_sampler_generates_what_a_pipeline_with_the_ema_weights_generates(tmp_path: Path) -> None:
    ema, module = EMA(decay=0.5), Real()
    run = trainer(tmp_path, ema, max_steps=3)
    run.fit(module, Batches())
    before = module.weights()
    with image_sampler(run, module) as sample:
        images = sample(PROMPTS, SEEDS)
    unet = tiny_unet()
    unet.load_state_dict(ema.averages)
    parts: list[Any] = [*module.parts, module.schedule, module.prediction]
    pipeline = Pipeline(unet, *parts, Settings((16, 16), **SAMPLING), module.denoiser.time)
    assert torch.equal(images, pipeline(PROMPTS, seeds=SEEDS).images)
    assert torch.equal(module.weights(), before)


def test_an_exception_restores_weights_and_mode_and_pauses_the_clock(tmp_path: Path) -> None:
    ema, speed, module = EMA(decay=0.5), Throughput(), Real()
    run = trainer(tmp_path, ema, speed, max_steps=1)
    run.fit(module, Batches())
    before = module.weights()
    with pytest.raises(ZeroDivisionError), image_sampler(run, module):
        assert not module.backbone.training and not torch.equal(module.weights(), before)
        raise ZeroDivisionError
    assert module.backbone.training and torch.equal(module.weights(), before)
    assert speed._since is None


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of one shape to bfloat16."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += (kwargs or {}).get("dtype") == torch.bfloat16
        return func(*args, **(kwargs or {}))


def test_sampling_in_mixed_precision_casts_each_weight_once(tmp_path: Path) -> None:
    module = Real()
    run = trainer(tmp_path, max_steps=1, precision="bf16-mixed")
    run.fit(module, Batches())
    with Casts(module.backbone.conv_in.weight.shape) as casts, image_sampler(run, module) as sample:
        sample(PROMPTS, SEEDS)
        sample(PROMPTS, SEEDS)
    networks = module.backbone, module.first_stage
    assert casts.count == sum(weight.shape == casts.shape for net in networks for weight in net.parameters())

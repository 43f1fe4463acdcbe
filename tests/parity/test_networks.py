"""Networks compared with those of diffusers and transformers, whose random weights are read from files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ldm.conditioning import Conditioning
from ldm.weights.arrange import to_theirs
from ldm.weights.keymaps import entries
from tests.weights.foreign import loaded

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP = {CROSS: "CrossAttnUpBlock2D", PLAIN: "UpBlock2D"}
UNETS: dict[str, dict[str, Any]] = {
    "SD 1": {},
    "SD 1 at every level": {"down_block_types": [CROSS, CROSS, CROSS]},
    "sd_attn123": {"down_block_types": [PLAIN, CROSS, CROSS]},
    "two layers deep": {"transformer_layers_per_block": 2, "layers_per_block": 1},
    "SD 2": {"attention_head_dim": [2, 4, 4], "use_linear_projection": True, "cross_attention_dim": 40},
    "SDXL without its added embedding": {
        "attention_head_dim": [2, 4, 4],
        "use_linear_projection": True,
        "down_block_types": [PLAIN, CROSS, CROSS],
        "transformer_layers_per_block": [1, 2, 3],
    },
    "inpainting": {"in_channels": 9},
    "one level": {"block_out_channels": [16], "down_block_types": [CROSS], "attention_head_dim": 2},
}
SIZES = [(8, 8), (8, 12), (7, 5)]


def randomised(network: nn.Module, std: float = 0.1) -> nn.Module:
    """Sets all weights to random values, so that every tensor, including biases and norms, affects the output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=std, generator=generator)
    return network.eval()


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Compares to `tolerance` relative to the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def assert_same_gradients(kind: str, layout: str, ours: Any, theirs: nn.Module, losses: tuple[Tensor, Tensor]) -> None:
    """Compares the gradient of every parameter to 1e-4 of its largest value, plus 1e-6 of the largest of all."""
    actual = _gradients(ours, losses[0])
    actual = to_theirs(entries(kind, layout, ours.config, list(actual)), actual)
    expected = _gradients(theirs, losses[1])
    rounding = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in actual.items():
        other = expected[name] if name in expected else expected[name.partition(".")[2]]  # transformers drops a prefix
        error = (gradient.flatten() - other.flatten()).abs().max()
        assert error <= 1e-4 * other.abs().max() + rounding, name
    assert len(actual) == len(expected)


def _gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    kinds = changes.pop("down_block_types", [CROSS, CROSS, PLAIN])
    settings: dict[str, Any] = {
        "block_out_channels": [16, 32, 32],
        "layers_per_block": 2,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    types = {"down_block_types": kinds, "up_block_types": [UP[kind] for kind in reversed(kinds)]}
    return randomised(UNet2DConditionModel(**(settings | types | changes)))  # type: ignore[return-value]


@pytest.mark.parametrize("name", UNETS)
def test_unet_matches_diffusers(tmp_path: Path, name: str) -> None:
    theirs = tiny_unet(**UNETS[name])
    theirs.save_pretrained(tmp_path)
    ours, config = loaded(tmp_path, "unet"), theirs.config
    time = torch.tensor([3.0, 981.0])
    for size in SIZES:
        x = torch.randn(2, config["in_channels"], *size)
        text, (latents, hint) = torch.randn(2, 7, config["cross_attention_dim"]), x.tensor_split([4], dim=1)
        conditioning = Conditioning(text=text, hints={"inpainting": hint} if hint.shape[1] else {})
        actual, expected = ours(latents, time, conditioning), theirs(x, time, text).sample
        assert_near(actual, expected)
    weights = torch.randn_like(expected)
    assert_same_gradients("unet", "diffusers", ours, theirs, ((actual * weights).sum(), (expected * weights).sum()))


@pytest.mark.parametrize(("widths", "blocks"), [([16, 32, 32], 1), ([16, 16], 2)])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_autoencoder_matches_diffusers(tmp_path: Path, widths: list[int], blocks: int, size: tuple[int, int]) -> None:
    levels = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    theirs = randomised(
        AutoencoderKL(
            block_out_channels=widths, layers_per_block=blocks, latent_channels=4, norm_num_groups=8, **levels
        )
    )
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    ours = loaded(tmp_path, "vae")
    image = torch.rand(2, 3, *size) * 2 - 1
    moments, posterior = ours.moments(image), theirs.encode(image).latent_dist  # type: ignore[operator]
    assert_near(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
    latents = torch.randn(2, 4, size[0] // ours.factor, size[1] // ours.factor)
    actual, expected = ours.decode(latents * 0.18215), theirs.decode(latents).sample  # type: ignore[operator]
    assert_near(actual, expected)
    losses = tuple(
        (image * torch.linspace(-1, 1, image.numel()).view_as(image)).sum()
        + (both * torch.linspace(1, -1, both.numel()).view_as(both)).sum()
        for image, both in ((actual, moments), (expected, posterior.parameters))
    )
    assert_same_gradients("vae", "diffusers", ours, theirs, losses)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_tower_matches_transformers(tmp_path: Path, activation: str) -> None:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=12,
        hidden_act=activation,
        projection_dim=24,
        eos_token_id=49407,
    )
    theirs = randomised(CLIPTextModelWithProjection(config), std=0.2)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    ours = loaded(tmp_path, "text_tower")
    tokens = torch.tensor([[49406, 320, 2368, 49407, 49407, 49407], [49406, 1125, 539, 320, 2368, 49407]])
    states = theirs(tokens, output_hidden_states=True).hidden_states
    for skip in range(3):  # clip skip: the final norm is applied to the selected layer
        assert_near(ours(tokens, skip), theirs.text_model.final_layer_norm(states[-1 - skip]))  # type: ignore[operator,union-attr]
    actual, expected = ours.embed(tokens), theirs(tokens).text_embeds
    assert_near(actual, expected)
    weights = torch.randn_like(expected)
    losses = (actual * weights).sum(), (expected * weights).sum()
    assert_same_gradients("text_tower", "transformers", ours, theirs, losses)


def test_image_tower_matches_transformers(tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        image_size=28,
        patch_size=7,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="quick_gelu",
        projection_dim=24,
    )
    theirs = randomised(CLIPVisionModelWithProjection(config), std=0.2)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    ours = loaded(tmp_path, "image_tower")
    images = torch.randn(2, 3, 28, 28)
    assert_near(ours(images), theirs(images).last_hidden_state)
    actual, expected = ours.embed(images), theirs(images).image_embeds
    assert_near(actual, expected)
    weights = torch.randn_like(expected)
    losses = (actual * weights).sum(), (expected * weights).sum()
    assert_same_gradients("image_tower", "transformers", ours, theirs, losses)


@pytest.mark.full_size
@torch.no_grad()
def test_stable_diffusion_15_at_full_size_matches_diffusers(tmp_path: Path) -> None:
    """Needs 8 GB of memory, 4 GB of disk space and about two minutes."""
    attention = [CROSS, CROSS, CROSS, PLAIN]
    unet = UNet2DConditionModel(
        block_out_channels=[320, 640, 1280, 1280],
        down_block_types=attention,
        up_block_types=[UP[kind] for kind in reversed(attention)],
        cross_attention_dim=768,
    )
    randomised(unet, 0.02).save_pretrained(tmp_path / "unet")
    ours = loaded(tmp_path / "unet", "unet")
    assert sum(parameter.numel() for parameter in ours.parameters()) == 859_520_964
    x, time, context = torch.randn(1, 4, 16, 24), torch.tensor([500.0]), torch.randn(1, 77, 768)
    assert_near(ours(x, time, context), unet(x, time, context).sample)
    del ours, unet

    vae = AutoencoderKL(
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    randomised(vae, 0.02).save_pretrained(tmp_path / "vae")
    first_stage = loaded(tmp_path / "vae", "vae")
    assert sum(parameter.numel() for parameter in first_stage.parameters()) == 83_653_863
    image = torch.rand(1, 3, 128, 64) * 2 - 1
    posterior = vae.encode(image).latent_dist
    assert_near(first_stage.moments(image), torch.cat([posterior.mean, posterior.logvar], dim=1))
    assert_near(first_stage.decode(posterior.mean * 0.18215), vae.decode(posterior.mean).sample)

    settings = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, eos_token_id=49407, **settings))
    randomised(text, 0.02).save_pretrained(tmp_path / "text_encoder")
    tower = loaded(tmp_path / "text_encoder", "text_tower")
    assert sum(parameter.numel() for parameter in tower.parameters()) == 123_060_480
    tokens = torch.randint(0, 49406, (2, 77))
    assert_near(tower(tokens), text(tokens).last_hidden_state)

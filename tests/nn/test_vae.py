"""The autoencoder: its size, the scaling of latents and the posterior."""

import pytest
import torch

from ldm.nn.vae import VAE

TINY = {"widths": (16, 32), "blocks": 1, "groups": 8}


def tiny(**changes: object) -> VAE:
    torch.manual_seed(0)
    return VAE(**{**TINY, **changes})  # type: ignore[arg-type]


def test_the_defaults_have_the_parameters_of_stable_diffusion() -> None:
    with torch.device("meta"):
        vae = VAE()
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    assert vae.factor == 8


@pytest.mark.parametrize(("changes", "factor"), [({}, 2), ({"patch": 4}, 8), ({"groups": 0, "patch": 2}, 4)])
def test_latents_are_downsampled_by_the_factor(changes: dict[str, object], factor: int) -> None:
    vae = tiny(**changes)
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = vae.encode(image)
    assert vae.factor == factor and latents.shape == (2, 4, 32 // factor, 48 // factor)
    assert vae.decode(latents).shape == image.shape


def test_scale_and_shift_cancel_between_encoding_and_decoding() -> None:
    plain, scaled = tiny(scale=1.0), tiny(scale=[0.5, 2.0, 3.0, 0.1], shift=[1.0, -1.0, 0.0, 2.0])
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(plain.moments(image), scaled.moments(image))
    torch.testing.assert_close(
        plain.decode(plain.encode(image)), scaled.decode(scaled.encode(image)), rtol=1e-4, atol=1e-4
    )
    expected = (plain.encode(image) - scaled.shift) * scaled.scale
    torch.testing.assert_close(scaled.encode(image), expected)


def test_sampled_latents_have_the_mean_and_std_of_the_posterior() -> None:
    vae = tiny(scale=2.0)
    moments = torch.cat([torch.full((1, 4, 50, 50), 0.3), torch.full((1, 4, 50, 50), -2.0)], dim=1)
    sampled = vae.latents(moments, torch.randn(1, 4, 50, 50))
    assert sampled.mean().item() == pytest.approx(0.6, abs=0.03)
    assert sampled.std().item() == pytest.approx(2 * torch.tensor(-1.0).exp().item(), rel=0.03)
    assert torch.equal(vae.latents(moments), torch.full((1, 4, 50, 50), 0.6))


def test_pixel_norm_treats_pixels_independently() -> None:
    norm = tiny(groups=0).encoder.norm_out
    x = torch.randn(1, 32, 4, 4)
    y = x.clone()
    y[..., 0, 0] += 5 * torch.randn(32)
    assert torch.equal(norm(x)[..., 1:, :], norm(y)[..., 1:, :])


def test_the_log_variance_is_bounded() -> None:
    vae = tiny()
    vae.quant.weight.data *= 1e4
    log_variance = vae.moments(torch.rand(1, 3, 16, 16))[:, 4:]
    assert log_variance.min() >= -30 and log_variance.max() <= 20


def test_sizes_that_are_no_multiple_of_the_factor_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        tiny().encode(torch.zeros(1, 3, 15, 16))


def test_layers_in_bfloat16_keep_latents_and_scale_in_float32() -> None:
    vae, image = tiny(scale=0.18215), torch.rand(1, 3, 32, 32) * 2 - 1
    latents = vae.encode(image)
    decoded = vae.decode(latents)
    for layers in vae.children():
        layers.bfloat16()
    assert vae.scale.dtype == vae.encode(image).dtype == vae.decode(latents).dtype == torch.float32
    torch.testing.assert_close(vae.encode(image), latents, rtol=0, atol=0.02)
    torch.testing.assert_close(vae.decode(latents), decoded, rtol=0, atol=0.05)

"""The UNet: Stable Diffusion's size, its symmetries, and how it starts."""

import math

import pytest
import torch

from ldm.nn.unet import UNet, timestep_embedding

TINY = {"width": 32, "multipliers": (1, 2), "blocks": 1, "depth": (1, 0), "heads": 4, "context_width": 24, "groups": 8}


def tiny(**changes: object) -> UNet:
    torch.manual_seed(0)
    unet = UNet(**{**TINY, **changes})  # type: ignore[arg-type]
    for parameter in unet.parameters():  # away from zero, where most of the network has no say
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, height, width, generator=generator)
    return x, torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24, generator=generator)


def test_the_defaults_are_stable_diffusion_15() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in UNet().parameters()) == 859_520_964


def test_an_untrained_network_predicts_zero() -> None:
    assert not UNet(**TINY)(*inputs()).any()  # type: ignore[arg-type]


def test_the_config_builds_the_same_network() -> None:
    unet = tiny(linear_projection=True)
    twin = UNet(**unet.config)
    twin.load_state_dict(unet.state_dict())
    assert torch.equal(unet(*inputs()), twin(*inputs()))


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5)])
def test_any_size_comes_back_as_it_went_in(size: tuple[int, int]) -> None:
    x, time, context = inputs(*size)
    assert tiny()(x, time, context).shape == x.shape


def test_time_and_text_both_matter() -> None:
    unet, (x, time, context) = tiny(), inputs()
    out = unet(x, time, context)
    assert not torch.allclose(out, unet(x, time + 50, context))
    assert not torch.allclose(out, unet(x, time, context.flip(0)))


def test_the_order_of_the_text_tokens_does_not_matter() -> None:
    unet, (x, time, context) = tiny(), inputs()
    torch.testing.assert_close(unet(x, time, context), unet(x, time, context.flip(1)), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        unet = tiny(checkpointing=checkpointing)
        unet(*inputs()).square().sum().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, saved)


def test_linear_projections_are_the_convolutions_written_otherwise() -> None:
    conv, linear = tiny(), tiny(linear_projection=True)
    state = {
        name: tensor.flatten(1) if name.endswith(("proj_in.weight", "proj_out.weight")) else tensor
        for name, tensor in conv.state_dict().items()
    }
    linear.load_state_dict(state)
    torch.testing.assert_close(conv(*inputs()), linear(*inputs()), rtol=1e-4, atol=1e-5)


def test_the_time_embedding_is_cosines_then_sines() -> None:
    embedding = timestep_embedding(torch.tensor([2.0]), 8)[0]
    frequencies = [10000 ** (-k / 4) for k in range(4)]
    expected = [math.cos(2 * f) for f in frequencies] + [math.sin(2 * f) for f in frequencies]
    torch.testing.assert_close(embedding, torch.tensor(expected))


def test_depths_that_do_not_match_the_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="2 levels"):
        UNet(**{**TINY, "depth": (1,)})  # type: ignore[arg-type]

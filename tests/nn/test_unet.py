"""The UNet: published sizes, symmetries and settings."""

import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.conditioning import Conditioning
from ldm.nn.unet import UNet, timestep_embedding

TINY = {"width": 32, "multipliers": (1, 2), "blocks": 1, "depth": (1, 0), "heads": 4, "context_width": 24, "groups": 8}


def tiny(**changes: object) -> UNet:
    torch.manual_seed(0)
    unet = UNet(**{**TINY, **changes})  # type: ignore[arg-type]
    for parameter in unet.parameters():  # in a new network most layers have no effect, because they start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, height, width, generator=generator)
    return x, torch.tensor([3.0, 700.0]), Conditioning(text=torch.randn(2, 5, 24, generator=generator))


def test_the_defaults_have_the_parameters_of_stable_diffusion_15() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in UNet().parameters()) == 859_520_964


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5)])
def test_output_shape_equals_input_shape_at_any_size(size: tuple[int, int]) -> None:
    x, time, conditioning = inputs(*size)
    assert tiny()(x, time, conditioning).shape == x.shape


def test_the_order_of_the_text_tokens_does_not_matter() -> None:
    unet, (x, time, conditioning) = tiny(), inputs()
    reversed_text = conditioning.map(lambda text: text.flip(1))
    torch.testing.assert_close(unet(x, time, conditioning), unet(x, time, reversed_text), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"depth": (0, 1)}, {"depth": (0, 0), "middle_depth": 0}])
def test_several_texts_per_latent_equal_separate_calls_at_any_first_attention(changes: dict[str, object]) -> None:
    unet, (x, time, _) = tiny(**changes), inputs()
    texts = torch.randn(3, len(x), 5, 24, generator=torch.Generator().manual_seed(2))
    batches: list[int] = []
    unet.conv_in.register_forward_hook(lambda _module, _args, out: batches.append(len(out)))
    together = unet(x, time, Conditioning(text=texts.flatten(0, 1)))
    torch.testing.assert_close(together, torch.cat([unet(x, time, Conditioning(text=text)) for text in texts]))
    assert batches == [len(x)] * 4


def test_linear_projections_equal_1x1_convolutions() -> None:
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": (1,)}, r"depth is \[1\], but a UNet of 2 levels needs 2 numbers, or one for all"),
        ({"heads": (4,)}, r"heads is \[4\], but a UNet of 2 levels needs 2 numbers"),
        ({"head_width": 24}, r"head_width is 24, but must divide the width of every level: \[32, 64\]"),
        ({"heads": 5}, "width is 32, but must be a multiple of the number of heads, 5"),
    ],
)
def test_settings_that_do_not_fit_the_levels_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**{**TINY, **changes})  # type: ignore[arg-type]


def test_a_single_number_applies_to_every_level() -> None:
    single, per_level = tiny(), tiny(heads=(4, 4))
    assert torch.equal(single(*inputs()), per_level(*inputs()))


def test_head_width_sets_heads_in_proportion_to_the_width() -> None:
    counted, measured = tiny(depth=(1, 1), heads=(4, 8)), tiny(depth=(1, 1), head_width=8)
    assert torch.equal(counted(*inputs()), measured(*inputs()))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("sd15", 859_520_964), ("sd15_inpainting", 859_535_364), ("sd21", 865_910_724), ("sd_attn123", None)],
)
def test_the_model_configs_have_the_published_parameter_counts(name: str, parameters: int | None) -> None:
    """The counts of the published weights; sd_attn123 moves the transformers of the first level to the last."""
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf" / "model"), version_base=None):
        settings = OmegaConf.to_container(compose(name))
    assert isinstance(settings, dict) and settings.pop("_target_") == "ldm.nn.unet.UNet"
    with torch.device("meta"):
        unet = UNet(**settings)  # type: ignore[arg-type]
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert count == parameters if parameters else unet.config["depth"] == [0, 1, 1, 1]

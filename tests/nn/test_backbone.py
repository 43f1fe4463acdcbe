"""The contract of `Backbone`, tested on every denoising network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.nn.backbone import Backbone, check_inputs, check_size, trainable
from ldm.nn.dit import DiT
from ldm.nn.unet import UNet
from ldm.weights.kinds import BACKBONES, constructor

Make = Callable[..., Backbone]


def unet(**changes: Any) -> Backbone:
    return UNet(
        **{"width": 16, "multipliers": (1, 2), "blocks": 1, "depth": (1, 0), "heads": 2, "context_width": 24}
        | {"groups": 8}
        | changes
    )


def inpainting_unet(**changes: Any) -> Backbone:
    return unet(in_channels=9, **changes)


def dit(**changes: Any) -> Backbone:
    return DiT(**{"width": 32, "layers": 2, "heads": 4, "patch": 2, "context_width": 24} | changes)


each_backbone = pytest.mark.parametrize("make", [unet, inpainting_unet, dit])


def trained(make: Make, **changes: Any) -> Backbone:
    """A backbone with random weights; in a new one most of the network has no effect, because its weights are zero."""
    torch.manual_seed(0)
    backbone = make(**changes)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return backbone


def latents() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 700.0])


def conditioning(samples: int = 2, seed: int = 2) -> Conditioning:
    """Every field and hint that any of the networks reads."""
    generator = torch.Generator().manual_seed(seed)
    hint = torch.randn(samples, 5, 8, 6, generator=generator)
    return Conditioning(text=torch.randn(samples, 5, 24, generator=generator)).with_hint("inpainting", hint)


def test_every_kind_of_backbone_is_tested_here() -> None:
    assert {make().kind for make in (unet, inpainting_unet, dit)} == set(BACKBONES)


@each_backbone
def test_kind_and_config_rebuild_the_same_network(make: Make) -> None:
    backbone = trained(make)
    twin = constructor(backbone.kind)(**backbone.config)
    twin.load_state_dict(backbone.state_dict())
    assert torch.equal(backbone(*latents(), conditioning()), twin(*latents(), conditioning()))


@each_backbone
def test_the_prediction_has_the_shape_of_the_latents(make: Make) -> None:
    x, time = latents()
    assert make().latent_channels == x.shape[1]
    assert trained(make)(x, time, conditioning()).shape == x.shape


@each_backbone
def test_an_untrained_network_predicts_zero(make: Make) -> None:
    assert not make()(*latents(), conditioning()).any()


@each_backbone
def test_the_prediction_depends_on_latents_time_and_conditioning(make: Make) -> None:
    backbone, (x, time), given, other = trained(make), latents(), conditioning(), conditioning(seed=3)
    out = backbone(x, time, given)
    assert not torch.allclose(out, backbone(x.flip(2), time, given))
    assert not torch.allclose(out, backbone(x, time + 50, given))
    for name in backbone.reads:
        field = {"hints": {name: other.get(name)}} if name in given.hints else {name: other.get(name)}
        changed = Conditioning(**({"text": given.text, "hints": given.hints} | field))
        assert not torch.allclose(out, backbone(x, time, changed)), name


@each_backbone
def test_several_conditionings_per_latent_equal_separate_calls(make: Make) -> None:
    backbone, (x, time) = trained(make), latents()
    each = [conditioning(seed=seed) for seed in (4, 5, 6)]
    together = Conditioning(text=torch.cat([part.get("text") for part in each]))
    hints = torch.cat([part.get("inpainting") for part in each])
    out = backbone(x, time, together.with_hint("inpainting", hints))
    torch.testing.assert_close(out, torch.cat([backbone(x, time, part) for part in each]))


@each_backbone
def test_conditionings_can_share_one_hint(make: Make) -> None:
    backbone, (x, time), hint = trained(make), latents(), conditioning().get("inpainting")
    each = [Conditioning(text=conditioning(seed=seed).text).with_hint("inpainting", hint) for seed in (4, 5)]
    together = Conditioning(text=torch.cat([part.get("text") for part in each])).with_hint("inpainting", hint)
    torch.testing.assert_close(backbone(x, time, together), torch.cat([backbone(x, time, part) for part in each]))


@pytest.mark.parametrize("make", [unet, dit])
def test_layers_before_the_conditioning_run_once_per_latent(make: Make) -> None:
    backbone, (x, time), batches = trained(make), latents(), []
    backbone.conv_in.register_forward_hook(lambda _module, _args, out: batches.append(len(out)))  # type: ignore[union-attr]
    backbone(x, time, conditioning(6))
    assert batches == [len(x)]


@each_backbone
def test_a_number_of_texts_that_is_no_multiple_of_the_latents_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="got 3 texts for 2 latents: give the same number of texts for each"):
        make()(*latents(), conditioning(3))


@each_backbone
def test_missing_conditioning_is_named_in_the_error(make: Make) -> None:
    with pytest.raises(ValueError, match="the network reads text, but the conditioning has no fields"):
        make()(*latents(), Conditioning())


@each_backbone
def test_gradient_checkpointing_does_not_change_gradients(make: Make) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = trained(make, checkpointing=checkpointing)
        backbone(*latents(), conditioning()).square().sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@each_backbone
def test_gradient_checkpointing_recomputes_the_repeated_blocks_only(make: Make) -> None:
    backbone, calls = trained(make, checkpointing=True), []
    for block in backbone.repeated_blocks():
        block.register_forward_pre_hook(lambda module, _args: calls.append(module))
    backbone(*latents(), conditioning()).sum().backward()
    assert calls[: len(calls) // 2] == list(backbone.repeated_blocks())  # in the forward pass
    assert calls[len(calls) // 2 :] == list(reversed(backbone.repeated_blocks()))  # recomputed in the backward pass


@pytest.mark.parametrize(("kind", "share"), [("unet", 0.9), ("dit", 0.95)])
def test_the_repeated_blocks_hold_most_of_the_parameters(kind: str, share: float) -> None:
    with torch.device("meta"):
        backbone: Backbone = constructor(kind)()
    blocks = sum(weight.numel() for block in backbone.repeated_blocks() for weight in block.parameters())
    assert share < blocks / sum(weight.numel() for weight in backbone.parameters()) < 1


@each_backbone
def test_dtype_and_device_are_those_of_the_weights(make: Make) -> None:
    backbone = make().to("meta", torch.bfloat16)
    assert backbone.dtype == torch.bfloat16 and backbone.device.type == "meta"


@each_backbone
def test_a_matching_first_stage_and_text_encoder_are_accepted(make: Make) -> None:
    check_inputs(make(), 4, {"text": 24})


@each_backbone
def test_a_first_stage_with_another_number_of_channels_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"first stage has 16 latent channels, but the \w+ takes 4: choose"):
        check_inputs(make(), 16, {"text": 24})


@each_backbone
def test_a_text_encoder_of_another_width_is_refused(make: Make) -> None:
    with pytest.raises(
        ValueError, match=r"reads text of width 24, but the text encoder gives text of width 32: choose"
    ):
        check_inputs(make(), 4, {"text": 32})


@each_backbone
def test_a_text_encoder_that_lacks_a_field_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"reads text of width 24, but the text encoder gives no text"):
        check_inputs(make(), 4, {"pooled": 24})


@pytest.mark.parametrize("channels", [3, 5, 8])
def test_input_channels_that_fit_neither_latents_nor_inpainting_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"takes {channels} input channels, but must take 4 or, for inpainting, 9"):
        check_inputs(unet(in_channels=channels), 4, {"text": 24})


@pytest.mark.parametrize(("make", "multiple"), [(unet, 8), (dit, 16), (lambda: dit(patch=4), 32)])
def test_image_sizes_must_be_multiples_of_the_downsampling_and_patch_size(make: Make, multiple: int) -> None:
    backbone = make()
    check_size(backbone, 8, (3 * multiple, multiple))
    for size in ((multiple, multiple + 4), (multiple + 4, multiple), (0, multiple)):
        with pytest.raises(ValueError, match=f"size is {size[0]}x{size[1]}, .* multiples of {multiple}$"):
            check_size(backbone, 8, size)


@each_backbone
def test_trainable_weights_are_those_that_require_gradients(make: Make) -> None:
    backbone = make()
    assert dict(backbone.named_parameters()) == trainable(backbone)
    backbone.requires_grad_(False).conv_in.requires_grad_(True)  # type: ignore[union-attr]
    assert [*trainable(backbone)] == ["conv_in.weight", "conv_in.bias"]

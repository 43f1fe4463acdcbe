from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm.weights.diffusers.networks import (
    image_from,
    image_to,
    text_from,
    text_to,
    unet_from,
    unet_to,
    vae_from,
    vae_to,
)
from ldm.weights.native import build

HERE = Path("config.json")
# As published with runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-2-1.
DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
SD15 = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False, "cross_attention_dim": 768, "down_block_types": DOWN, "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64, "up_block_types": UP,
}  # fmt: skip
SD21 = SD15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "sample_size": 96,
    "upcast_attention": True,
    "num_class_embeds": None,
    "dual_cross_attention": False,
}


def test_the_default_unet_is_that_of_sd15() -> None:
    assert unet_from(SD15, HERE) == {key: unet_defaults()[key] for key in unet_from(SD15, HERE)}


def unet_defaults() -> dict[str, Any]:
    return build({"kind": "unet", "config": {}}, "nothing").config  # type: ignore[return-value]


def test_attention_heads_of_sd2_are_64_wide_at_every_level() -> None:
    config = unet_from(SD21, HERE)
    assert config["head_width"] == 64 and config["linear_projection"] and config["context_width"] == 1024


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"multipliers": [1, 3], "depth": [2, 1], "middle_depth": 1},
        {"multipliers": [1, 2, 3], "depth": [0, 2, 0], "middle_depth": 4, "heads": [1, 2, 8]},
        {"head_width": 16, "linear_projection": True},
        {"context_width": [768, 512, 16, 8]},
    ],
)
def test_a_unet_config_survives_a_round_trip(changes: dict[str, Any]) -> None:
    config = unet_defaults() | changes
    back = unet_from(unet_to(config, 64, HERE), HERE)
    assert back == {key: config[key] for key in back} | ({"head_width": 16} if "head_width" in changes else {})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type=text_time"),
        ({"class_embed_type": "projection"}, "class_embed_type=projection"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift=scale_shift"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "is a UNet of AttnDownBlock2D"),
        ({"up_block_types": UP[::-1]}, "mirrored"),
        ({"block_out_channels": [320, 480, 1280, 1280]}, "needs multiples of the first"),
    ],
)
def test_a_unet_that_ldm_cannot_build_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet_from(SD15 | changes, HERE)


def test_an_autoencoder_without_a_scale_has_that_of_sd1() -> None:
    old = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
    assert vae_from(old, HERE)["scale"] == 0.18215 and vae_from(old, HERE)["shift"] == 0.0


def test_an_autoencoder_config_survives_a_round_trip() -> None:
    config = {"widths": [8, 16], "blocks": 3, "latent_channels": 2, "scale": 0.3, "shift": 0.1, "groups": 4}
    assert vae_from(vae_to(config | {"patch": 1}, 64, HERE), HERE) == config


@pytest.mark.parametrize("changes", [{"groups": 0}, {"patch": 2}, {"scale": [1.0, 2.0]}])
def test_an_autoencoder_that_other_tools_cannot_build_is_refused(changes: dict[str, Any]) -> None:
    config = {"widths": [8], "blocks": 1, "latent_channels": 2, "scale": 1.0, "shift": 0.0, "groups": 4, "patch": 1}
    with pytest.raises(ValueError, match="other tools cannot build"):
        vae_to(config | changes, 64, HERE)


def test_the_configs_of_clip_towers_survive_a_round_trip() -> None:
    text = {"vocab_size": 9, "width": 8, "layers": 3, "heads": 2, "context": 5, "activation": "gelu"}
    assert text_from(text_to(text | {"projection": None}, 0), HERE) == text
    image = {"size": 8, "patch": 4, "width": 8, "layers": 3, "heads": 2, "activation": "quick_gelu"}
    assert image_from(image_to(image | {"projection": 3}), HERE) == image


def test_a_tower_with_an_mlp_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="intermediate_size=100 at width 512"):
        text_from({"intermediate_size": 100}, HERE)


@pytest.mark.parametrize(
    ("reader", "base", "field"),
    [
        (unet_from, SD15, {"resnet_out_scale_factor": 1.414}),
        (unet_from, SD15, {"mid_block_only_cross_attention": True}),
        (unet_from, SD15, {"time_embedding_dim": 512}),
        (unet_from, SD15, {"num_class_embeds": 1000}),
        (unet_from, SD15, {"norm_num_groups": None}),
        (unet_from, SD15, {"a_field_of_tomorrow": 1}),
        (unet_from, SD15, {"layers_per_block": 10**9}),
        (unet_from, SD15, {"layers_per_block": True}),
        (unet_from, SD15, {"block_out_channels": [320] * 10**5}),
        (vae_from, {}, {"latents_mean": [0.0]}),
        (vae_from, {}, {"down_block_types": ["AttnDownEncoderBlock2D"]}),
        (vae_from, {}, {"scaling_factor": float("nan")}),
        (text_from, {}, {"layer_norm_eps": 1e-6}),
        (text_from, {}, {"hidden_act": "relu"}),
        (text_from, {}, {"eos_token_id": 5}),
        (image_from, {}, {"num_channels": 4}),
    ],
)
def test_a_field_that_ldm_cannot_honour_is_refused_by_name(
    reader: Callable[[dict[str, Any], Path], Any], base: dict[str, Any], field: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        reader(base | field, HERE)


def test_the_fields_that_transformers_writes_into_every_config_have_no_effect() -> None:
    extra = {"_name_or_path": "openai/clip", "torch_dtype": "float32", "num_beams": 1, "eos_token_id": 2}
    assert text_from(extra, HERE) == text_from({}, HERE)

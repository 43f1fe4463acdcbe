"""Converts between ldm's network configs and those of diffusers and transformers."""

from pathlib import Path
from typing import Any

Config = dict[str, Any]

# Settings that ldm's networks do not have, with the value that disables them; so does leaving them out.
UNET_FIXED: Config = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "class_embed_type": None,
    "encoder_hid_dim": None,
    "center_input_sample": False,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "time_cond_proj_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
}
VAE_FIXED: Config = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}


def unet_from(given: Config, source: Path) -> Config:
    """Converts the config of a UNet2DConditionModel to ldm's. Raises ValueError for one that ldm cannot build."""
    refuse_unknown(given, UNET_FIXED, source)
    widths = given["block_out_channels"]
    layers = _per_level(given.get("transformer_layers_per_block", 1), widths)
    attends = [kind == "CrossAttnDownBlock2D" for kind in given["down_block_types"]]
    expected = ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)]
    downs = {"CrossAttnDownBlock2D", "DownBlock2D"}
    if not set(given["down_block_types"]) <= downs or list(given["up_block_types"]) != expected:
        raise ValueError(
            f"{source} is a UNet of {', '.join(given['down_block_types'])} and {', '.join(given['up_block_types'])}, "
            "which ldm cannot build; give one of CrossAttn and plain blocks, mirrored on the way up"
        )
    if any(width % widths[0] for width in widths):
        raise ValueError(
            f"{source} has levels of widths {widths}, but ldm needs multiples of the first; give another UNet"
        )
    return {
        "in_channels": given["in_channels"],
        "out_channels": given["out_channels"],
        "width": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": given["layers_per_block"],
        "depth": [depth if attend else 0 for depth, attend in zip(layers, attends, strict=True)],
        "middle_depth": layers[-1],
        "context_width": given["cross_attention_dim"],
        "linear_projection": given.get("use_linear_projection", False),
        "groups": given.get("norm_num_groups", 32),
        # diffusers names the number of heads attention_head_dim, and still does so in old files
        **_heads(_per_level(given.get("num_attention_heads") or given.get("attention_head_dim", 8), widths), widths),
    }


def unet_to(config: Config, sample_size: int, source: Path) -> Config:
    """Converts a UNet's config to config.json. Raises ValueError for one that diffusers cannot build."""
    widths = [config["width"] * multiplier for multiplier in config["multipliers"]]
    depth, head_width = config["depth"], config["head_width"]
    # the middle in diffusers has the last level's number of layers, even if that level itself has none
    layers = [*(d or 1 for d in depth[:-1]), config["middle_depth"]]
    if config["multipliers"][0] != 1 or config["middle_depth"] == 0 or depth[-1] not in (0, config["middle_depth"]):
        raise ValueError(
            f"{source} has a UNet that diffusers cannot build: its first multiplier must be 1, and its middle as "
            "deep as its last level (not 0); convert it to a single file instead"
        )
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": config["blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depth)],
        "transformer_layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "attention_head_dim": [width // head_width for width in widths] if head_width else config["heads"],
        "cross_attention_dim": config["context_width"],
        "use_linear_projection": config["linear_projection"],
        "norm_num_groups": config["groups"],
        **UNET_FIXED,
    }


def vae_from(given: Config, source: Path) -> Config:
    """Converts the config of an AutoencoderKL to ldm's."""
    refuse_unknown(given, VAE_FIXED, source)
    return {
        "widths": list(given["block_out_channels"]),
        "blocks": given.get("layers_per_block", 1),
        "latent_channels": given.get("latent_channels", 4),
        "scale": given.get("scaling_factor", 0.18215),
        "shift": given.get("shift_factor") or 0.0,
        "groups": given.get("norm_num_groups", 32),
    }


def vae_to(config: Config, sample_size: int, source: Path) -> Config:
    """Converts an autoencoder's config to config.json. Raises ValueError for one that no other tool can build."""
    if (
        config["groups"] == 0
        or config["patch"] != 1
        or isinstance(config["scale"], list)
        or isinstance(config["shift"], list)
    ):
        raise ValueError(
            f"{source} has an autoencoder that other tools cannot build (they have no per-pixel norm, patches or "
            "scale per channel); convert it to ldm's own format, --to ldm"
        )
    levels = len(config["widths"])
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "block_out_channels": config["widths"],
        "layers_per_block": config["blocks"],
        "latent_channels": config["latent_channels"],
        "scaling_factor": config["scale"],
        "shift_factor": config["shift"] or None,
        "norm_num_groups": config["groups"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **VAE_FIXED,
    }


def text_from(given: Config, source: Path) -> Config:
    """Converts a CLIPTextConfig to ldm's config, without the projection, whose width is that of the tensor."""
    _check_mlp(given, 512, source)
    return {
        "vocab_size": given.get("vocab_size", 49408),
        "width": given.get("hidden_size", 512),
        "layers": given.get("num_hidden_layers", 12),
        "heads": given.get("num_attention_heads", 8),
        "context": given.get("max_position_embeddings", 77),
        "activation": given.get("hidden_act", "quick_gelu"),
    }


def image_from(given: Config, source: Path) -> Config:
    """Converts a CLIPVisionConfig to ldm's config, without the projection."""
    _check_mlp(given, 768, source)
    return {
        "size": given.get("image_size", 224),
        "patch": given.get("patch_size", 32),
        "width": given.get("hidden_size", 768),
        "layers": given.get("num_hidden_layers", 12),
        "heads": given.get("num_attention_heads", 12),
        "activation": given.get("hidden_act", "quick_gelu"),
    }


def text_to(config: Config, pad: int) -> Config:
    return {
        "architectures": ["CLIPTextModel" if config["projection"] is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["context"],
        **_tower_to(config),
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": pad,
    }


def image_to(config: Config) -> Config:
    return {
        "architectures": ["CLIPVisionModel" if config["projection"] is None else "CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "image_size": config["size"],
        "patch_size": config["patch"],
        **_tower_to(config),
    }


def refuse_unknown(given: Config, fixed: Config, source: Path) -> None:
    """Raises ValueError for settings whose value is not the `fixed` one, because ldm has no other."""
    other = [f"{key}={given[key]}" for key, value in fixed.items() if key in given and given[key] != value]
    if other:
        raise ValueError(
            f"{source} asks for {', '.join(other)}, which ldm does not have; "
            "give a model of Stable Diffusion 1.x or 2.x"
        )


def _per_level(value: Any, widths: list[int]) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * len(widths)


def _heads(heads: list[int], widths: list[int]) -> Config:
    if len(set(heads)) == 1:
        return {"heads": heads[0], "head_width": None}
    head_widths = {width / n for width, n in zip(widths, heads, strict=True)}
    if len(head_widths) > 1:
        return {"heads": heads, "head_width": None}
    return {"head_width": int(head_widths.pop())}


def _check_mlp(given: Config, width: int, source: Path) -> None:
    width = given.get("hidden_size", width)
    if given.get("intermediate_size", 4 * width) != 4 * width:
        raise ValueError(
            f"{source} has intermediate_size={given['intermediate_size']} at width {width}, but ldm's is 4 times the "
            "width; give another CLIP"
        )


def _tower_to(config: Config) -> Config:
    return {
        "hidden_size": config["width"],
        "intermediate_size": 4 * config["width"],
        "num_hidden_layers": config["layers"],
        "num_attention_heads": config["heads"],
        "hidden_act": config["activation"],
        "projection_dim": config["projection"] or config["width"],
        "layer_norm_eps": 1e-5,
    }

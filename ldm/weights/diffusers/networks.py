"""Converts between ldm's network configs and those of diffusers and transformers."""

from pathlib import Path

from ldm.weights.diffusers import network_fields
from ldm.weights.diffusers.fields import MAX_NUMBER, Config, Given
from ldm.weights.diffusers.network_fields import UNET_FIXED, VAE_FIXED

WIDTHS = (320, 640, 1280, 1280)  # defaults of missing fields are those of diffusers
MAX_LAYERS = 1000
DOWNS = "CrossAttnDownBlock2D", "DownBlock2D"


def unet_from(config: Config, source: Path) -> Config:
    """Converts the config of a UNet2DConditionModel to ldm's. Raises ValueError if ldm cannot build it."""
    network_fields.UNET.check(config, source)
    given = Given(config, source)
    widths = given.integers("block_out_channels", WIDTHS)
    layers = _per_level(given.integers("transformer_layers_per_block", (1,)), widths, source)
    downs = given.names("down_block_types", (*DOWNS[:1] * 3, DOWNS[1]))
    ups = given.names("up_block_types", ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3))
    attends = [kind == DOWNS[0] for kind in downs]
    expected = ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)]
    if not {*downs} <= {*DOWNS} or ups != expected or len(downs) != len(widths):
        raise ValueError(
            f"{source} is a UNet of {', '.join(downs)} and {', '.join(ups)} with {len(widths)} widths, which ldm "
            "cannot build; give one of CrossAttn and plain blocks, mirrored on the way up"
        )
    if any(width % widths[0] for width in widths):
        raise ValueError(
            f"{source} has levels of widths {widths}, but ldm needs multiples of the first; give another UNet"
        )
    context = given.integers("cross_attention_dim", (1280,))
    # old files of diffusers store the number of heads in attention_head_dim
    heads = "num_attention_heads" if given.has("num_attention_heads") else "attention_head_dim"
    return {
        "in_channels": given.integer("in_channels", 4),
        "out_channels": given.integer("out_channels", 4),
        "width": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": given.integer("layers_per_block", 2, most=MAX_LAYERS),
        "depth": [depth if attend else 0 for depth, attend in zip(layers, attends, strict=True)],
        "middle_depth": layers[-1],
        "context_width": context[0] if len(context) == 1 else _per_level(context, widths, source),
        "linear_projection": given.flag("use_linear_projection", False),
        "groups": _groups(given),
        **_heads(_per_level(given.integers(heads, (8,)), widths, source), widths),
    }


def unet_to(config: Config, sample_size: int, source: Path) -> Config:
    """Converts ldm's UNet config to config.json. Raises ValueError if diffusers cannot build it."""
    widths = [config["width"] * multiplier for multiplier in config["multipliers"]]
    depth, head_width = config["depth"], config["head_width"]
    # in diffusers the middle has the last level's layer count, even if that level has no transformer layers
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


def vae_from(config: Config, source: Path) -> Config:
    """Converts the config of an AutoencoderKL to ldm's."""
    network_fields.VAE.check(config, source)
    given = Given(config, source)
    widths = given.integers("block_out_channels", (64,))
    for field, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if given.has(field) and given.names(field, ()) != [kind] * len(widths):
            raise ValueError(
                f"{source} has {field}={config.get(field)}, but ldm builds {len(widths)} {kind} for widths {widths}; "
                "give an autoencoder of Stable Diffusion 1.x or 2.x"
            )
    return {
        "widths": widths,
        "blocks": given.integer("layers_per_block", 1, most=MAX_LAYERS),
        "latent_channels": given.integer("latent_channels", 4),
        "scale": given.number("scaling_factor", 0.18215),
        "shift": given.number("shift_factor", 0.0, above=-MAX_NUMBER),
        "groups": _groups(given),
    }


def vae_to(config: Config, sample_size: int, source: Path) -> Config:
    """Converts ldm's autoencoder config to config.json. Raises ValueError if no other tool can build it."""
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


def text_from(config: Config, source: Path) -> Config:
    """Converts a CLIPTextConfig to ldm's config without the projection, whose width is read from its tensor."""
    network_fields.TEXT.check(config, source)
    given = Given(config, source)
    return {
        "vocab_size": given.integer("vocab_size", 49408),
        "context": given.integer("max_position_embeddings", 77),
        **_tower_from(given, width=512, heads=8),
    }


def image_from(config: Config, source: Path) -> Config:
    """Converts a CLIPVisionConfig to ldm's config, without the projection."""
    network_fields.IMAGE.check(config, source)
    given = Given(config, source)
    return {
        "size": given.integer("image_size", 224),
        "patch": given.integer("patch_size", 32),
        **_tower_from(given, width=768, heads=12),
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


def _per_level(values: list[int], widths: list[int], source: Path) -> list[int]:
    listed = values * len(widths) if len(values) == 1 else values
    if len(listed) != len(widths):
        raise ValueError(f"{source} lists {values} for the levels of widths {widths}; download it again")
    return listed


def _groups(given: Given) -> int:
    if given.config.get("norm_num_groups", 32) is None:
        raise ValueError(f"{given.source} has norm_num_groups=null, a network without norms, which ldm does not have")
    return given.integer("norm_num_groups", 32)


def _heads(heads: list[int], widths: list[int]) -> Config:
    if len(set(heads)) == 1:
        return {"heads": heads[0], "head_width": None}
    head_widths = {width / n for width, n in zip(widths, heads, strict=True)}
    if len(head_widths) > 1:
        return {"heads": heads, "head_width": None}
    return {"head_width": int(head_widths.pop())}


def _tower_from(given: Given, width: int, heads: int) -> Config:
    width = given.integer("hidden_size", width)
    hidden = given.integer("intermediate_size", 4 * width)
    if hidden != 4 * width:
        raise ValueError(
            f"{given.source} has intermediate_size={hidden} at width {width}, but ldm's is 4 times the width; "
            "give another CLIP"
        )
    return {
        "width": width,
        "layers": given.integer("num_hidden_layers", 12, most=MAX_LAYERS),
        "heads": given.integer("num_attention_heads", heads),
        "activation": given.choice("hidden_act", "quick_gelu", "quick_gelu", "gelu"),
    }


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

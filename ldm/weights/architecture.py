"""Infers the architecture of a network from the shapes of its tensors, for files without a configuration."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.weights.storage.tensors import Header

Shapes = Mapping[str, Header]
# Shapes do not determine attention heads: Stable Diffusion 1.x has 8 heads everywhere, 2.x heads of width 64.
HEADS: dict[int, dict[str, Any]] = {768: {"heads": 8, "head_width": None}, 1024: {"head_width": 64}}
CLIP_HEAD = 64  # the width of an attention head in every CLIP


def infer(kind: str, layout: str, shapes: Shapes, source: Path) -> dict[str, Any]:
    """Returns the `config` of a network with these tensors. Raises ValueError if they do not determine it."""
    readers = {"unet": _unet, "vae": _vae, "text_tower": _text_tower, "image_tower": _image_tower}
    try:
        return readers[kind](layout, shapes)
    except KeyError as error:
        raise ValueError(f"{source} lacks the tensor {error} of a {kind}; download or export it again") from error
    except (IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"the tensors in {source} do not form a {kind} that ldm knows; download or export it again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{source} {error}") from error


def _unet(layout: str, shapes: Shapes) -> dict[str, Any]:
    conv_in = shapes["input_blocks.0.0.weight" if layout == "compvis" else "conv_in.weight"]
    conv_out = shapes["out.2.weight" if layout == "compvis" else "conv_out.weight"]
    width, in_channels = conv_in.shape[:2]
    if layout == "compvis":
        ends = _numbers(shapes, r"input_blocks\.(\d+)\.0\.op\.weight")
        blocks = (ends[0] if ends else len(_numbers(shapes, r"input_blocks\.(\d+)\.0\..*"))) - 1
        firsts = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(len(ends) + 1)]
        convs, transformers = [f"{block}.0.out_layers.3" for block in firsts], [f"{block}.1" for block in firsts]
        middle = "middle_block.1"
    else:
        levels = _numbers(shapes, r"down_blocks\.(\d+)\..*")
        blocks = len(_numbers(shapes, r"down_blocks\.0\.resnets\.(\d+)\..*"))
        convs = [f"down_blocks.{level}.resnets.0.conv2" for level in levels]
        transformers = [f"down_blocks.{level}.attentions.0" for level in levels]
        middle = "mid_block.attentions.0"
    attended = [name for name in shapes if name.endswith("attn2.to_k.weight")]
    context = int(shapes[attended[0]].shape[1]) if attended else 768
    projections = [shapes[name] for name in shapes if name.endswith(".proj_in.weight")]
    if context not in HEADS:
        raise ValueError(
            f"does not say how many attention heads its UNet has (its context width of {context} is neither that of "
            "Stable Diffusion 1.x nor that of 2.x); give the diffusers folder, or a file that ldm wrote"
        )
    return {
        "in_channels": int(in_channels),
        "out_channels": int(conv_out.shape[0]),
        "width": int(width),
        "multipliers": [int(shapes[f"{conv}.weight"].shape[0] // width) for conv in convs],
        "blocks": blocks,
        "depth": [_depth(shapes, transformer) for transformer in transformers],
        "middle_depth": _depth(shapes, middle),
        "context_width": context,
        "linear_projection": bool(projections) and len(projections[0].shape) == 2,
        **HEADS[context],
    }


def _vae(layout: str, shapes: Shapes) -> dict[str, Any]:
    level, block = ("down", "block") if layout == "compvis" else ("down_blocks", "resnets")
    levels = _numbers(shapes, rf"encoder\.{level}\.(\d+)\..*")
    if "quant_conv.weight" not in shapes:
        raise ValueError(
            "holds an autoencoder without a quant convolution, as in SD 3 or Flux, which ldm does not read; give one "
            "of Stable Diffusion 1.x or 2.x"
        )
    return {
        "widths": [int(shapes[f"encoder.{level}.{n}.{block}.0.conv2.weight"].shape[0]) for n in levels],
        "blocks": len(_numbers(shapes, rf"encoder\.{level}\.0\.{block}\.(\d+)\..*")),
        "latent_channels": int(shapes["post_quant_conv.weight"].shape[0]),
    }


def _text_tower(layout: str, shapes: Shapes) -> dict[str, Any]:
    prefix = "text_model.embeddings." if layout == "transformers" else ""
    vocab_size, width = shapes[f"{prefix}token_embedding.weight"].shape
    position = "position_embedding.weight" if layout == "transformers" else "positional_embedding"
    block = r"text_model\.encoder\.layers" if layout == "transformers" else r"transformer\.resblocks"
    layers = len(_numbers(shapes, rf"{block}\.(\d+)\..*"))
    projection = None
    if layout == "openclip" and "text_projection" in shapes:
        projection = int(shapes["text_projection"].shape[1])
    elif "text_projection.weight" in shapes:
        projection = int(shapes["text_projection.weight"].shape[0])
    return {
        "vocab_size": int(vocab_size),
        "width": int(width),
        "layers": layers,
        "heads": max(1, int(width) // CLIP_HEAD),
        "context": int(shapes[f"{prefix}{position}"].shape[0]),
        # OpenAI's towers are at most 768 wide and use quick_gelu; the OpenCLIP towers in SD are wider and use gelu.
        "activation": "gelu" if layout == "openclip" or width >= 1024 else "quick_gelu",
        "projection": projection,
        # SD 2.x reads the penultimate layer; files converted from diffusers lack the last, the 24th.
        "skip": 1 if layout == "openclip" and layers != 23 else 0,
    }


def _image_tower(_: str, shapes: Shapes) -> dict[str, Any]:
    patches = shapes["vision_model.embeddings.patch_embedding.weight"]
    width, patch = int(patches.shape[0]), int(patches.shape[-1])
    grid = round((shapes["vision_model.embeddings.position_embedding.weight"].shape[0] - 1) ** 0.5)
    projection = shapes.get("visual_projection.weight")
    return {
        "size": grid * patch,
        "patch": patch,
        "width": width,
        "layers": len(_numbers(shapes, r"vision_model\.encoder\.layers\.(\d+)\..*")),
        "heads": max(1, width // CLIP_HEAD),
        "projection": None if projection is None else int(projection.shape[0]),
    }


def _numbers(shapes: Shapes, pattern: str) -> list[int]:
    """Returns the sorted, distinct numbers in the group of `pattern`, over all names that match it."""
    return sorted({int(match[1]) for name in shapes if (match := re.fullmatch(pattern, name))})


def _depth(shapes: Shapes, transformer: str) -> int:
    return len(_numbers(shapes, rf"{re.escape(transformer)}\.transformer_blocks\.(\d+)\..*"))

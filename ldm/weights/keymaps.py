"""Maps the names of ldm's tensors to those of other tools, as tables.

A row is one layer, or one tensor, under its name in ldm and in each layout of `LAYOUTS`; ".weight" and ".bias" are
appended unless the row contains them. Words in braces stand for the numbers in ldm's name, or for those that
`_numbers` computes from them. A suffix in brackets says how the other tool's tensor differs from ldm's: [1x1] is a
convolution in place of a linear layer, [linear] is a linear layer that may be stored as a convolution, [T] is
transposed, and [0/3] is the first third of a packed tensor.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

LAYOUTS = {
    "unet": ("compvis", "diffusers"),
    "vae": ("compvis", "diffusers"),
    "text_tower": ("transformers", "openclip"),
    "image_tower": ("transformers",),
}
NATIVE = "ldm"

Row = tuple[str, ...]


def _within(place: Row, rows: Sequence[Row]) -> list[Row]:
    return [tuple(f"{outer}.{inner}" for outer, inner in zip(place, row, strict=True)) for row in rows]


UNET_BLOCK = [
    ("norm1", "in_layers.0", "norm1"),
    ("conv1", "in_layers.2", "conv1"),
    ("time", "emb_layers.1", "time_emb_proj"),
    ("norm2", "out_layers.0", "norm2"),
    ("conv2", "out_layers.3", "conv2"),
    ("skip", "skip_connection", "conv_shortcut"),
]
ATTENTION = [
    ("to_q", "to_q", "to_q"),
    ("to_k", "to_k", "to_k"),
    ("to_v", "to_v", "to_v"),
    ("to_out", "to_out.0", "to_out.0"),
]
TRANSFORMER = [
    ("norm", "norm", "norm"),
    ("proj_in", "proj_in", "proj_in"),
    *_within(
        ("blocks.{depth}", "transformer_blocks.{depth}", "transformer_blocks.{depth}"),
        [
            ("norm1", "norm1", "norm1"),
            *_within(("self_attention", "attn1", "attn1"), ATTENTION),
            ("norm2", "norm2", "norm2"),
            *_within(("text_attention", "attn2", "attn2"), ATTENTION),
            ("norm3", "norm3", "norm3"),
            ("feed_forward.to_hidden", "ff.net.0.proj", "ff.net.0.proj"),
            ("feed_forward.to_out", "ff.net.2", "ff.net.2"),
        ],
    ),
    ("proj_out", "proj_out", "proj_out"),
]
UNET: list[Row] = [
    ("time.0", "time_embed.0", "time_embedding.linear_1"),
    ("time.2", "time_embed.2", "time_embedding.linear_2"),
    ("conv_in", "input_blocks.0.0", "conv_in"),
    *_within(("down.{level}.{block}.block", "input_blocks.{in}.0", "down_blocks.{level}.resnets.{block}"), UNET_BLOCK),
    *_within(
        ("down.{level}.{block}.transformer", "input_blocks.{in}.1", "down_blocks.{level}.attentions.{block}"),
        TRANSFORMER,
    ),
    ("downsample.{level}.conv", "input_blocks.{in_last}.0.op", "down_blocks.{level}.downsamplers.0.conv"),
    *_within(("middle_in.block", "middle_block.0", "mid_block.resnets.0"), UNET_BLOCK),
    *_within(("middle_in.transformer", "middle_block.1", "mid_block.attentions.0"), TRANSFORMER),
    *_within(("middle_out.block", "middle_block.2", "mid_block.resnets.1"), UNET_BLOCK),
    *_within(("up.{level}.{block}.block", "output_blocks.{out}.0", "up_blocks.{level}.resnets.{block}"), UNET_BLOCK),
    *_within(
        ("up.{level}.{block}.transformer", "output_blocks.{out}.1", "up_blocks.{level}.attentions.{block}"),
        TRANSFORMER,
    ),
    ("upsample.{level}.conv", "output_blocks.{out_last}.{place}.conv", "up_blocks.{level}.upsamplers.0.conv"),
    ("norm_out", "out.0", "conv_norm_out"),
    ("conv_out", "out.2", "conv_out"),
]

VAE_BLOCK = [
    ("norm1", "norm1", "norm1"),
    ("conv1", "conv1", "conv1"),
    ("norm2", "norm2", "norm2"),
    ("conv2", "conv2", "conv2"),
    ("skip", "nin_shortcut", "conv_shortcut"),
]
VAE_HALF = [  # what encoder and decoder have in common
    ("conv_in", "conv_in", "conv_in"),
    *_within(("middle.block1", "mid.block_1", "mid_block.resnets.0"), VAE_BLOCK),
    *_within(
        ("middle.attention", "mid.attn_1", "mid_block.attentions.0"),
        [
            ("norm", "norm", "group_norm"),
            ("to_q", "q [1x1]", "to_q [linear]"),
            ("to_k", "k [1x1]", "to_k [linear]"),
            ("to_v", "v [1x1]", "to_v [linear]"),
            ("to_out", "proj_out [1x1]", "to_out.0 [linear]"),
        ],
    ),
    *_within(("middle.block2", "mid.block_2", "mid_block.resnets.1"), VAE_BLOCK),
    ("norm_out", "norm_out", "conv_norm_out"),
    ("conv_out", "conv_out", "conv_out"),
]
VAE: list[Row] = [
    *_within(("encoder", "encoder", "encoder"), VAE_HALF),
    *_within(
        (
            "encoder.down.{n}",
            "encoder.down.{down}.block.{down_block}",
            "encoder.down_blocks.{down}.resnets.{down_block}",
        ),
        VAE_BLOCK,
    ),
    ("encoder.down.{n}.conv", "encoder.down.{down}.downsample.conv", "encoder.down_blocks.{down}.downsamplers.0.conv"),
    ("quant", "quant_conv", "quant_conv"),
    ("post_quant", "post_quant_conv", "post_quant_conv"),
    *_within(("decoder", "decoder", "decoder"), VAE_HALF),
    *_within(
        ("decoder.up.{n}", "decoder.up.{level}.block.{up_block}", "decoder.up_blocks.{up}.resnets.{up_block}"),
        VAE_BLOCK,
    ),
    ("decoder.up.{n}.conv", "decoder.up.{level}.upsample.conv", "decoder.up_blocks.{up}.upsamplers.0.conv"),
]

TEXT_TOWER: list[Row] = [
    ("token_embedding", "text_model.embeddings.token_embedding", "token_embedding"),
    ("position_embedding", "text_model.embeddings.position_embedding.weight", "positional_embedding"),
    *_within(
        ("blocks.{n}", "text_model.encoder.layers.{n}", "transformer.resblocks.{n}"),
        [
            ("norm1", "layer_norm1", "ln_1"),
            ("attention.q.weight", "self_attn.q_proj.weight", "attn.in_proj_weight [0/3]"),
            ("attention.q.bias", "self_attn.q_proj.bias", "attn.in_proj_bias [0/3]"),
            ("attention.k.weight", "self_attn.k_proj.weight", "attn.in_proj_weight [1/3]"),
            ("attention.k.bias", "self_attn.k_proj.bias", "attn.in_proj_bias [1/3]"),
            ("attention.v.weight", "self_attn.v_proj.weight", "attn.in_proj_weight [2/3]"),
            ("attention.v.bias", "self_attn.v_proj.bias", "attn.in_proj_bias [2/3]"),
            ("attention.out", "self_attn.out_proj", "attn.out_proj"),
            ("norm2", "layer_norm2", "ln_2"),
            ("fc1", "mlp.fc1", "mlp.c_fc"),
            ("fc2", "mlp.fc2", "mlp.c_proj"),
        ],
    ),
    ("norm", "text_model.final_layer_norm", "ln_final"),
    ("projection.weight", "text_projection.weight", "text_projection [T]"),
]
IMAGE_TOWER: list[Row] = [
    ("patch_embedding", "vision_model.embeddings.patch_embedding"),
    ("class_embedding", "vision_model.embeddings.class_embedding"),
    ("position_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("pre_norm", "vision_model.pre_layrnorm"),
    *_within(
        ("blocks.{n}", "vision_model.encoder.layers.{n}"),
        [
            ("norm1", "layer_norm1"),
            ("attention.q", "self_attn.q_proj"),
            ("attention.k", "self_attn.k_proj"),
            ("attention.v", "self_attn.v_proj"),
            ("attention.out", "self_attn.out_proj"),
            ("norm2", "layer_norm2"),
            ("fc1", "mlp.fc1"),
            ("fc2", "mlp.fc2"),
        ],
    ),
    ("post_norm", "vision_model.post_layernorm"),
    ("projection.weight", "visual_projection.weight"),
]
TABLES = {"unet": UNET, "vae": VAE, "text_tower": TEXT_TOWER, "image_tower": IMAGE_TOWER}

# Alternative spellings of a layout's names as (pattern, replacement); they are read, but never written.
ALIASES: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("vae", "diffusers"): [  # diffusers before 0.18
        (r"(attentions\.0)\.query\b", r"\1.to_q"),
        (r"(attentions\.0)\.key\b", r"\1.to_k"),
        (r"(attentions\.0)\.value\b", r"\1.to_v"),
        (r"(attentions\.0)\.proj_attn\b", r"\1.to_out.0"),
    ],
    ("text_tower", "transformers"): [(r"^(?=(embeddings|encoder|final_layer_norm)\.)", "text_model.")],
    ("image_tower", "transformers"): [(r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_model.")],
}
# Tensors in a layout's files that the network does not need: constants, tensors that only training uses, and the
# other tower of a CLIP.
UNUSED = {
    ("vae", "compvis"): r"loss\..*|model_ema\..*",
    (
        "text_tower",
        "transformers",
    ): r".*\.position_ids|logit_scale|(vision_model|visual_projection)\..*",
    ("text_tower", "openclip"): r"logit_scale|attn_mask",
    (
        "image_tower",
        "transformers",
    ): r".*\.position_ids|logit_scale|(text_model|text_projection)\..*",
}


@dataclass(frozen=True)
class Entry:
    """The name of a tensor in ldm and in another layout, and the bracketed suffix that says how the two differ."""

    ours: str
    theirs: str
    form: str


def entries(kind: str, layout: str, config: dict[str, Any], names: Sequence[str]) -> list[Entry]:
    """Returns the entry in a layout of each of ldm's tensor `names`, for a network with this `config`."""
    if layout == NATIVE:
        return [Entry(name, name, "") for name in names]
    return [_entry(kind, config, _rows(kind, layout), name) for name in names]


def canonical(kind: str, layout: str, names: Sequence[str]) -> dict[str, str]:
    """Returns a dictionary from a layout's standard names to the `names` in a file, without unused tensors."""
    unused = re.compile(UNUSED.get((kind, layout), r"(?!)"))
    found = {}
    for name in names:
        standard = name
        for pattern, replacement in ALIASES.get((kind, layout), []):
            standard = re.sub(pattern, replacement, standard)
        if not unused.fullmatch(standard):
            found[standard] = name
    return found


@cache
def _rows(kind: str, layout: str) -> list[tuple[re.Pattern[str], str]]:
    column = 1 + LAYOUTS[kind].index(layout)
    return [(_pattern(row[0]), row[column]) for row in TABLES[kind]]


def _pattern(template: str) -> re.Pattern[str]:
    numbered = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(template))
    return re.compile(rf"{numbered}(?P<leaf>\.weight|\.bias)?")


def _entry(kind: str, config: dict[str, Any], rows: list[tuple[re.Pattern[str], str]], name: str) -> Entry:
    for pattern, template in rows:
        if match := pattern.fullmatch(name):
            numbers = {word: int(digits) for word, digits in match.groupdict().items() if word != "leaf" and digits}
            theirs, _, form = template.partition(" ")
            theirs = theirs.format(**_numbers(kind, config, numbers)) + (match["leaf"] or "")
            return Entry(name, theirs, form.strip("[]"))
    raise ValueError(
        f"no other tool has the tensor {name} of this {kind}; convert the {kind} to ldm's own format, --to ldm"
    )


def _numbers(kind: str, config: dict[str, Any], numbers: dict[str, int]) -> dict[str, int]:
    """Returns `numbers` of ldm's name and those of other layouts; CompVis numbers a UNet's blocks across levels."""
    if kind == "unet" and "level" in numbers:
        blocks, level, block = config["blocks"], numbers["level"], numbers.get("block", 0)
        out_last = level * (blocks + 1) + blocks
        return numbers | {
            "in": 1 + level * (blocks + 1) + block,
            "in_last": (level + 1) * (blocks + 1),
            "out": level * (blocks + 1) + block,
            "out_last": out_last,
            "place": 2 if config["depth"][-1 - level] else 1,  # after the transformer, if the level has one
        }
    if kind == "vae" and "n" in numbers:
        down, down_block = divmod(numbers["n"], config["blocks"] + 1)
        up, up_block = divmod(numbers["n"], config["blocks"] + 2)
        level = len(config["widths"]) - 1 - up
        return {"down": down, "down_block": down_block, "up": up, "up_block": up_block, "level": level}
    return numbers

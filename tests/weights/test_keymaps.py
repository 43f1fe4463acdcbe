from typing import Any

import pytest
import torch
from torch import nn

from ldm.nn.clip import ImageTower, TextTower
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.weights.arrange import to_ours, to_theirs
from ldm.weights.keymaps import LAYOUTS, NATIVE, canonical, entries
from tests.tiny import randomised, tiny_text_tower

UNETS = [
    {"multipliers": (1,), "depth": (2,), "blocks": 1},
    {"multipliers": (1, 2, 3), "depth": (0, 1, 2), "blocks": 1, "middle_depth": 0},
    {"multipliers": (1, 1, 2, 2, 4), "depth": (1, 0, 1, 0, 1), "blocks": 3, "linear_projection": True},
]
VAES = [{"widths": (8,), "blocks": 2}, {"widths": (8, 16, 16), "blocks": 1}, {"widths": (8, 8, 16, 32), "blocks": 3}]


def unet(**config: Any) -> UNet:
    return UNet(width=4, groups=2, heads=2, context_width=6, **config)


NETWORKS: list[tuple[str, nn.Module]] = [
    *(("unet", unet(**config)) for config in UNETS),
    *(("vae", VAE(**config, groups=4)) for config in VAES),
    ("text_tower", TextTower(vocab_size=9, width=8, layers=3, heads=2, context=5, projection=3)),
    ("image_tower", ImageTower(8, 4, 8, 2, 2, projection=3)),
]
MIDDLE = "decoder.mid_block.attentions.0"
CASES = [(kind, network, layout) for kind, network in NETWORKS for layout in LAYOUTS[kind]]


@pytest.mark.parametrize("kind, network, layout", CASES)
def test_a_round_trip_preserves_every_tensor(kind: str, network: nn.Module, layout: str) -> None:
    state = randomised(network, 0, 1.0).state_dict()
    there = entries(kind, layout, network.config, list(state))  # type: ignore[arg-type]
    back = to_ours(there, to_theirs(there, state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("kind, network, layout", CASES)
def test_no_value_is_lost_or_stored_twice(kind: str, network: nn.Module, layout: str) -> None:
    state = network.state_dict()
    theirs = to_theirs(entries(kind, layout, network.config, list(state)), state)  # type: ignore[arg-type]
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in state.values())


def test_compvis_numbers_unet_blocks_across_levels() -> None:
    network = unet(multipliers=(1, 2, 3), depth=(0, 1, 0), blocks=2)
    names = {e.ours: e.theirs for e in entries("unet", "compvis", network.config, list(network.state_dict()))}
    assert names["conv_in.weight"] == "input_blocks.0.0.weight"
    assert names["down.1.0.block.conv1.weight"] == "input_blocks.4.0.in_layers.2.weight"
    assert names["downsample.0.conv.bias"] == "input_blocks.3.0.op.bias"
    assert names["up.0.2.block.norm1.weight"] == "output_blocks.2.0.in_layers.0.weight"
    assert names["upsample.0.conv.weight"] == "output_blocks.2.1.conv.weight"
    assert names["upsample.1.conv.weight"] == "output_blocks.5.2.conv.weight"  # after a transformer


def test_compvis_numbers_autoencoder_levels_from_the_pixels_in_both_halves() -> None:
    network = VAE(widths=(8, 8, 16), blocks=1, groups=4)
    names = {e.ours: e.theirs for e in entries("vae", "compvis", network.config, list(network.state_dict()))}
    assert names["encoder.down.2.norm1.weight"] == "encoder.down.1.block.0.norm1.weight"
    assert names["decoder.up.0.conv1.bias"] == "decoder.up.2.block.0.conv1.bias"
    assert names["decoder.up.2.conv.bias"] == "decoder.up.2.upsample.conv.bias"


def test_compvis_stores_autoencoder_attention_as_convolutions() -> None:
    state = VAE(widths=(8,), blocks=1, groups=4).state_dict()
    theirs = to_theirs(entries("vae", "compvis", {"widths": (8,), "blocks": 1}, list(state)), state)
    assert theirs["encoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    assert theirs["encoder.mid.attn_1.q.bias"].shape == (8,)


def test_openclip_packs_query_key_and_value_and_transposes_the_projection() -> None:
    state = {name: t for name, t in NETWORKS[-2][1].state_dict().items()}
    theirs = to_theirs(entries("text_tower", "openclip", {}, list(state)), state)
    attention = [state[f"blocks.1.attention.{name}.weight"] for name in "qkv"]
    assert torch.equal(theirs["transformer.resblocks.1.attn.in_proj_weight"], torch.cat(attention))
    assert torch.equal(theirs["text_projection"], state["projection.weight"].T)


@pytest.mark.parametrize(
    "kind, layout, found, own",
    [
        ("vae", "diffusers", f"{MIDDLE}.query.weight", f"{MIDDLE}.to_q.weight"),
        ("vae", "diffusers", f"{MIDDLE}.proj_attn.bias", f"{MIDDLE}.to_out.0.bias"),
        ("text_tower", "transformers", "encoder.layers.0.mlp.fc1.bias", "text_model.encoder.layers.0.mlp.fc1.bias"),
        ("image_tower", "transformers", "embeddings.class_embedding", "vision_model.embeddings.class_embedding"),
    ],
)
def test_older_spellings_are_read(kind: str, layout: str, found: str, own: str) -> None:
    assert canonical(kind, layout, [found]) == canonical(kind, layout, [own]) | {own: found} == {own: found}


def test_unused_tensors_are_left_out() -> None:
    names = ["text_model.embeddings.position_ids", "logit_scale", "text_model.final_layer_norm.bias"]
    assert list(canonical("text_tower", "transformers", names)) == names[2:]
    assert canonical("vae", "compvis", ["loss.discriminator.main.0.weight"]) == {}


def test_the_native_layout_keeps_every_name() -> None:
    assert [(e.ours, e.theirs) for e in entries("vae", NATIVE, {}, ["a", "b"])] == [("a", "a"), ("b", "b")]


@pytest.mark.parametrize(
    "kind, network", [("vae", VAE(widths=(8,), blocks=1, groups=0)), ("text_tower", tiny_text_tower())]
)
def test_a_tensor_that_no_other_tool_has_is_named(kind: str, network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no other tool has the tensor (known|encoder\.\S+norm\.weight) of this"):
        entries(kind, LAYOUTS[kind][0], network.config, list(network.state_dict()))  # type: ignore[arg-type]

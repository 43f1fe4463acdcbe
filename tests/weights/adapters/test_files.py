"""Tests adapter files: reading every layout, writing two layouts, and refusing files that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.adapters.change import LowRankChange, norms
from ldm.adapters.targets import layers
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.nn.unet import UNet
from ldm.weights.adapters.layouts import LAYOUTS
from ldm.weights.adapters.names import dotted, own_names, public_names, underscored
from ldm.weights.adapters.reader import AdapterFile, networks_of, open_adapter
from ldm.weights.adapters.recognise import has_adapter
from ldm.weights.adapters.writer import write_adapter
from ldm.weights.keymaps import entries
from ldm.weights.native import build
from tests.tiny import tiny_dit, tiny_text_encoder, tiny_text_tower, tiny_unet
from tests.weights.adapters.made import changes, same

RANK, ALPHA = 3, 1.5
LAYER = "down.1.0.transformer.blocks.0.text_attention.to_k"
PUBLIC = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
CONV, KOHYA_CONV = "down.0.0.block.conv1", "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def factors(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weight of a layer of the tiny UNet, and random factors of a change."""
    weight = layers(tiny_unet())[name].weight.detach()
    outputs, inputs, *kernel = weight.shape
    return weight, torch.randn(RANK, inputs, *kernel), torch.randn(outputs, RANK, *[1] * len(kernel))


def product(up: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("or...,rikl->oikl" if down.ndim == 4 else "or,ri->oi", up.flatten(1), down)


def saved(folder: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> AdapterFile:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "lora.safetensors", metadata)
    return open_adapter(folder / "lora.safetensors")


def changed(file: AdapterFile, name: str = LAYER) -> Tensor:
    """Returns the weight of a layer of the tiny UNet changed by a file; asserts that no other layer changes."""
    found = file.changes(networks_of(tiny_unet(), tiny_text_encoder()))
    assert [*found] == ["unet"] and [*found["unet"]] == [name]
    return found["unet"][name].changed(layers(tiny_unet())[name].weight.detach())


SPELLINGS = {
    "kohya": (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"),
    "peft": (f"unet.{PUBLIC}.lora_A.weight", f"unet.{PUBLIC}.lora_B.weight"),
    "diffusers": (f"unet.{PUBLIC}.lora.down.weight", f"unet.{PUBLIC}.lora.up.weight"),
    "processors": tuple(
        f"unet.{PUBLIC.replace('to_k', 'processor.to_k_lora')}.{part}.weight" for part in ("down", "up")
    ),
    "linear layers": (f"unet.{PUBLIC}.lora_linear_layer.down.weight", f"unet.{PUBLIC}.lora_linear_layer.up.weight"),
    "no network": (f"{PUBLIC}.lora_A.weight", f"{PUBLIC}.lora_B.weight"),
    "a file of peft": (f"base_model.model.{PUBLIC}.lora_A.weight", f"base_model.model.{PUBLIC}.lora_B.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_lora_is_read_with_scale_1_if_alpha_is_missing(spelling: str, tmp_path: Path) -> None:
    weight, down, up = factors(LAYER)
    file = saved(tmp_path, dict(zip(SPELLINGS[spelling], (down, up), strict=True)))
    torch.testing.assert_close(changed(file), weight + up @ down)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_both_spellings_of_the_attention_output_projection_are_read(spelling: str, tmp_path: Path) -> None:
    own = LAYER.replace("to_k", "to_out")
    weight, down, up = factors(own)
    public = [name.replace("to_k", "to_out_0" if spelling == "kohya" else "to_out.0") for name in SPELLINGS[spelling]]
    if spelling == "processors":
        public = [name.replace("to_k_lora", "to_out_lora") for name in SPELLINGS[spelling]]
    file = saved(tmp_path, dict(zip(public, (down, up), strict=True)))
    torch.testing.assert_close(changed(file, own), weight + up @ down)


def test_each_layer_has_its_own_alpha_which_defaults_to_its_rank(tmp_path: Path) -> None:
    weight, down, up = factors(LAYER)
    other = KOHYA.replace("attn2_to_k", "attn1_to_q")
    weight2, down2, up2 = factors(LAYER.replace("text_attention.to_k", "self_attention.to_q"))
    state = {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.alpha": torch.tensor(ALPHA)}
    state |= {f"{other}.lora_down.weight": down2[:2], f"{other}.lora_up.weight": up2[:, :2]}
    found = saved(tmp_path, state).changes(networks_of(tiny_unet(), tiny_text_encoder()))["unet"]
    one, two = found[LAYER], found[LAYER.replace("text_attention.to_k", "self_attention.to_q")]
    torch.testing.assert_close(one.changed(weight), weight + ALPHA / RANK * up @ down)
    torch.testing.assert_close(two.changed(weight2), weight2 + up2[:, :2] @ down2[:2])


PEFT: dict[str, tuple[dict[str, Any], float]] = {
    "alpha": ({"lora_alpha": ALPHA, "r": RANK}, ALPHA / RANK),
    "rsLoRA": ({"lora_alpha": ALPHA, "use_rslora": True}, ALPHA / RANK**0.5),
    "pattern": ({"lora_alpha": 7, "alpha_pattern": {"attn1.to_k": 5, "attn2.to_k": ALPHA}}, ALPHA / RANK),
    "expression": ({"lora_alpha": 7, "alpha_pattern": {r".*\.attn\d\.to_[kv]": ALPHA}}, ALPHA / RANK),
    "no alpha": ({"r": RANK}, 1.0),
}


@pytest.mark.parametrize("case", PEFT)
def test_alphas_are_read_from_the_metadata_of_peft(case: str, tmp_path: Path) -> None:
    weight, down, up = factors(LAYER)
    settings, scale = PEFT[case]
    state = dict(zip(SPELLINGS["peft"], (down, up), strict=True))
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}
    torch.testing.assert_close(changed(saved(tmp_path, state, metadata)), weight + scale * up @ down)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_alphas_are_read_from_the_metadata_of_a_single_network(prefix: str, tmp_path: Path) -> None:
    weight, down, up = factors(LAYER)
    names = (name.replace("unet.", prefix) for name in SPELLINGS["peft"])
    metadata = {"lora_adapter_metadata": json.dumps({f"{prefix}lora_alpha": ALPHA, f"{prefix}r": RANK})}
    file = saved(tmp_path, dict(zip(names, (down, up), strict=True)), metadata)
    torch.testing.assert_close(changed(file), weight + ALPHA / RANK * up @ down)


def test_alphas_are_read_from_the_peft_config_next_to_the_file(tmp_path: Path) -> None:
    weight, down, up = factors(LAYER)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA, "r": RANK}))
    save_file(dict(zip(SPELLINGS["a file of peft"], (down, up), strict=True)), tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(changed(open_adapter(tmp_path)), weight + ALPHA / RANK * up @ down)


def test_changes_of_convolutions_are_read(tmp_path: Path) -> None:
    weight, down, up = factors(CONV)
    file = saved(tmp_path, {f"{KOHYA_CONV}.lora_down.weight": down, f"{KOHYA_CONV}.lora_up.weight": up})
    torch.testing.assert_close(changed(file, CONV), weight + product(up, down), rtol=1e-4, atol=1e-5)


def test_a_tucker_core_is_multiplied_with_the_factors(tmp_path: Path) -> None:
    weight, _, up = factors(CONV)
    down, mid = torch.randn(RANK, weight.shape[1], 1, 1), torch.randn(RANK, RANK, 3, 3)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid, "alpha": torch.tensor(ALPHA)}
    file = saved(tmp_path, {f"{KOHYA_CONV}.{part}": tensor for part, tensor in parts.items()})
    x = torch.randn(1, weight.shape[1], 6, 6)
    conv = torch.nn.functional.conv2d
    expected = conv(x, weight) + ALPHA / RANK * conv(conv(conv(x, down), mid), up)
    torch.testing.assert_close(conv(x, changed(file, CONV)), expected, rtol=1e-4, atol=1e-4)


def lycoris(kind: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the tensors of a change and its unscaled ΔW, as defined by LyCORIS."""
    outputs, inputs, *kernel = shape
    columns = inputs * torch.Size(kernel).numel()

    def random(*sides: int) -> Tensor:
        return torch.randn(*sides)

    if kind == "LoHa":
        parts = {
            f"hada_w{k}_{x}": random(*s) for k in (1, 2) for x, s in (("a", (outputs, RANK)), ("b", (RANK, columns)))
        }
        one, two = (parts[f"hada_w{k}_a"] @ parts[f"hada_w{k}_b"] for k in (1, 2))
        return parts, (one * two).view(shape)
    if kind == "LoHa with cores":
        parts = {f"hada_w{k}_{x}": random(RANK, n) for k in (1, 2) for x, n in (("a", outputs), ("b", inputs))}
        parts |= {f"hada_t{k}": random(RANK, RANK, *kernel) for k in (1, 2)}
        full = torch.ones(shape)
        for k in (1, 2):
            for o, c in ((o, c) for o in range(outputs) for c in range(inputs)):
                pairs = torch.outer(parts[f"hada_w{k}_a"][:, o], parts[f"hada_w{k}_b"][:, c])
                full[o, c] *= (pairs[:, :, None, None] * parts[f"hada_t{k}"]).sum((0, 1))
        return parts, full
    if kind == "LoKr":
        parts = {"lokr_w1": random(2, 4), "lokr_w2": random(outputs // 2, inputs // 4, *kernel)}
    elif kind == "LoKr of factors":
        parts = {"lokr_w1_a": random(2, RANK), "lokr_w1_b": random(RANK, 4)}
        parts |= {"lokr_w2_a": random(outputs // 2, RANK), "lokr_w2_b": random(RANK, columns // 4)}
    else:
        parts = {"lokr_w1": random(2, 4), "lokr_t2": random(RANK, RANK, *kernel)}
        parts |= {"lokr_w2_a": random(RANK, outputs // 2), "lokr_w2_b": random(RANK, inputs // 4)}
    one = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_t2" in parts:
        two = torch.einsum("ijkl,io,jc->ockl", parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        two = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        two = two.view(outputs // 2, inputs // 4, *kernel)
    full = torch.empty(shape)
    for i, j in ((i, j) for i in range(2) for j in range(4)):
        rows, columns_ = (
            slice(i * (outputs // 2), (i + 1) * (outputs // 2)),
            slice(j * (inputs // 4), (j + 1) * (inputs // 4)),
        )
        full[rows, columns_] = one[i, j] * two
    return parts, full


WITH_CORE = [(kind, CONV) for kind in ("LoHa with cores", "LoKr with a core")]


@pytest.mark.parametrize(
    ("kind", "name"),
    [*WITH_CORE, *((kind, name) for kind in ("LoHa", "LoKr", "LoKr of factors") for name in (LAYER, CONV))],
)
def test_lycoris_changes_match_their_definition(kind: str, name: str, tmp_path: Path) -> None:
    weight = layers(tiny_unet())[name].weight.detach()
    parts, delta = lycoris(kind, tuple(weight.shape))
    label = KOHYA if name == LAYER else KOHYA_CONV
    state = {f"{label}.{part}": tensor for part, tensor in parts.items()} | {f"{label}.alpha": torch.tensor(ALPHA)}
    scale = 1.0 if kind == "LoKr" else ALPHA / RANK  # full factors have no rank
    torch.testing.assert_close(changed(saved(tmp_path, state), name), weight + scale * delta, rtol=1e-4, atol=1e-4)


MAGNITUDES = [*((part, axis) for part in ("dora_scale", "magnitude") for axis in (0, 1)), ("lora_magnitude_vector", 0)]


@pytest.mark.parametrize(("part", "axis"), MAGNITUDES)
@pytest.mark.parametrize("name", [LAYER, CONV])
def test_the_shape_of_a_magnitude_identifies_outputs_or_inputs(name: str, axis: int, part: str, tmp_path: Path) -> None:
    weight, down, up = factors(name)
    magnitude = norms(weight, axis) * (0.5 + torch.rand(norms(weight, axis).shape))
    stored = magnitude
    if part == "lora_magnitude_vector":
        stored = magnitude[:, 0] if magnitude.ndim == 2 else magnitude.transpose(0, 1)
    label = KOHYA if name == LAYER else KOHYA_CONV
    state = {f"{label}.lora_down.weight": down, f"{label}.lora_up.weight": up, f"{label}.{part}": stored}
    total = weight + (up @ down if weight.ndim == 2 else product(up, down))
    norm = total.transpose(0, axis).flatten(1).norm(dim=1)
    expected = (total.transpose(0, axis) * (magnitude.flatten() / norm).view(-1, *[1] * (total.ndim - 1))).transpose(
        0, axis
    )
    torch.testing.assert_close(changed(saved(tmp_path, state), name), expected, rtol=1e-4, atol=1e-4)


def test_a_magnitude_of_ambiguous_shape_is_refused(tmp_path: Path) -> None:
    square = KOHYA.replace("attn2_to_k", "attn1_to_q")
    _, down, up = factors(LAYER.replace("text_attention.to_k", "self_attention.to_q"))
    state = {f"{square}.lora_down.weight": down, f"{square}.lora_up.weight": up}
    with pytest.raises(ValueError, match=r"a magnitude \[16\] for 16 outputs and 16 inputs, which does not say whose"):
        changed(saved(tmp_path, state | {f"{square}.dora_scale": torch.ones(16)}))


def test_kohya_names_of_every_sd15_layer_are_recognised() -> None:
    unet = build({"kind": "unet", "config": {}}, "here")
    public = public_names("unet", unet.config, layers(unet))
    assert {dotted("unet", underscored(name)) for name in public.values()} == {*public.values()}
    for own, entry in zip(
        public, entries("unet", "compvis", unet.config, [f"{one}.weight" for one in public]), strict=True
    ):
        assert dotted("unet", underscored(entry.theirs.removesuffix(".weight"))) == public[own]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("magnitude", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_written_adapters_are_read_back_bit_identical(
    layout: str, magnitude: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = {"unet": changes(tiny_unet(), "all", dtype, magnitude)}
    made["text_encoder"] = changes(tiny_text_tower(), "all", dtype, magnitude)
    write_adapter(tmp_path / "a.safetensors", made, layout, {"modelspec.license": "CC0"})
    file = open_adapter(tmp_path / "a.safetensors")
    assert file.layout == layout and file.metadata["modelspec.license"] == "CC0"
    again = file.by_public_name()
    assert {network: {*found} for network, found in again.items()} == {one: {*made[one]} for one in made}
    assert all(same(again[network][name], made[network][name]) for network in made for name in made[network])


def test_converting_from_kohya_to_diffusers_and_back_is_lossless(tmp_path: Path) -> None:
    made = {"unet": changes(tiny_unet(), magnitude=0), "text_encoder": changes(tiny_text_tower(), magnitude=0)}
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    write_adapter(paths[0], made, "kohya", {})
    for source, path, layout in zip(paths, paths[1:], ("diffusers", "kohya"), strict=False):
        write_adapter(path, open_adapter(source).by_public_name(), layout, open_adapter(source).metadata)
    first, last = (load_file(path) for path in (paths[0], paths[2]))
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    with safe_open(paths[0], "pt") as one, safe_open(paths[2], "pt") as two:
        assert one.metadata().items() <= two.metadata().items()


def test_magnitudes_of_inputs_are_written_for_kohya_and_refused_for_peft(tmp_path: Path) -> None:
    made = {"unet": changes(tiny_unet(), magnitude=1)}
    write_adapter(tmp_path / "a.safetensors", made, "kohya", {})
    again = open_adapter(tmp_path / "a.safetensors").by_public_name()["unet"]
    assert all(same(again[name], made["unet"][name]) for name in again)
    with pytest.raises(ValueError, match="is one of its inputs, which peft's layout cannot hold: give --to kohya"):
        write_adapter(tmp_path / "b.safetensors", made, "diffusers", {})


def test_dora_in_only_some_layers_is_refused_for_peft(tmp_path: Path) -> None:
    made = changes(tiny_unet()) | dict(list(changes(tiny_unet(), magnitude=0).items())[:2])
    with pytest.raises(ValueError, match=r"2 of the \d+ layers of the unet are changed as by DoRA, but peft's layout"):
        write_adapter(tmp_path / "a.safetensors", {"unet": made}, "diffusers", {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_changes_without_factors_is_refused(layout: str, tmp_path: Path) -> None:
    parts, _ = lycoris("LoHa", (16, 16))
    file = saved(tmp_path, {f"{KOHYA}.{part}": tensor for part, tensor in parts.items()})
    with pytest.raises(ValueError, match=r"which has no pair of factors .*: merge it into a model with ldm merge"):
        write_adapter(tmp_path / "b.safetensors", file.by_public_name(), layout, {})


def test_dit_layers_keep_their_ldm_names_in_kohya_files(tmp_path: Path) -> None:
    made = {"unet": changes(tiny_dit())}
    write_adapter(tmp_path / "a.safetensors", made, "kohya", {})
    again = open_adapter(tmp_path / "a.safetensors").changes(networks_of(tiny_dit(), tiny_text_encoder()))["unet"]
    assert again.keys() == made["unet"].keys() and all(same(again[name], made["unet"][name]) for name in again)
    with pytest.raises(ValueError, match="has no name in diffusers, whose layout cannot hold it: give --to kohya"):
        write_adapter(tmp_path / "b.safetensors", made, "diffusers", {})


def sdxl_lora() -> dict[str, Tensor]:
    """Returns two layers of an SDXL LoRA: one that SD 1.5 has with another shape, and one that it lacks."""
    state = {}
    for block, inputs in (("0_attn2_to_k", 2048), ("1_attn2_to_k", 2048)):
        label = f"lora_unet_input_blocks_4_1_transformer_blocks_{block}"
        state |= {
            f"{label}.lora_down.weight": torch.randn(RANK, inputs),
            f"{label}.lora_up.weight": torch.randn(640, RANK),
        }
    return state


def test_the_error_for_an_sdxl_lora_on_sd15_contains_both_shapes(tmp_path: Path) -> None:
    file = saved(tmp_path, sdxl_lora(), {"ss_base_model_version": "sdxl_base_v1-0"})
    unet: UNet = build({"kind": "unet", "config": {}}, "here")  # type: ignore[assignment]
    with pytest.raises(ValueError) as refused:
        file.changes(networks_of(unet, tiny_text_encoder()))
    message = str(refused.value)
    assert "made for sdxl_base_v1-0" in message and "blocks_4_1_transformer_blocks_1_attn2_to_k" in message
    assert "changes a weight [640, 2048], but that of the layer is [640, 768]" in message


@pytest.mark.parametrize(
    "name",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.{}.weight",
        "text_encoder.encoder.layers.0.mlp.fc1.lora.{}.weight",
    ],
)
def test_every_spelling_of_text_encoder_layers_is_read(name: str, tmp_path: Path) -> None:
    file = saved(tmp_path, {name.format("down"): torch.ones(2, 16), name.format("up"): torch.ones(64, 2)})
    found = file.changes(networks_of(tiny_unet(), tiny_text_encoder()))
    assert {network: [*layers] for network, layers in found.items()} == {"text_encoder": ["blocks.0.fc1"]}


def test_unknown_layers_are_refused(tmp_path: Path) -> None:
    _, down, up = factors(LAYER)
    state = {"lora_unet_nothing.lora_down.weight": down, "lora_unet_nothing.lora_up.weight": up}
    with pytest.raises(ValueError, match="1 of its layers are not in this unet: lora_unet_nothing"):
        changed(saved(tmp_path, state))


def test_the_error_names_the_second_text_encoder_if_the_model_lacks_it(tmp_path: Path) -> None:
    label = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    file = saved(
        tmp_path, {f"{label}.lora_down.weight": torch.ones(2, 16), f"{label}.lora_up.weight": torch.ones(16, 2)}
    )
    with pytest.raises(ValueError, match="changes the network text_encoder_2, but this model has unet, text_encoder:"):
        file.changes(networks_of(tiny_unet(), tiny_text_encoder()))
    both = TextEncoder([tiny_text_tower(), tiny_text_tower()], [Tokenizer(context=16)] * 2)
    assert [*file.changes(networks_of(tiny_unet(), both))["text_encoder_2"]] == ["blocks.0.attention.q"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({f"{KOHYA}.oft_blocks": torch.ones(2, 2)}, r"is no adapter \(its tensors are lora_unet_\S+oft_blocks\)"),
        ({f"{KOHYA}.lora_down.weight": torch.ones(2, 16)}, "holds down, which is not all of a change"),
        (
            {f"{KOHYA}.lora_down.weight": torch.ones(2, 16), f"{KOHYA}.lora_up.weight": torch.ones(16, 3)},
            r"factors \[2, 16\] and \[16, 3\], which cannot be multiplied",
        ),
        (
            {
                f"{KOHYA}.lora_down.weight": torch.ones(2, 16),
                f"{KOHYA}.lora_up.weight": torch.ones(16, 2),
                f"{KOHYA}.diff_b": torch.ones(16),
            },
            r"tensors of an adapter that ldm does not know, and leaves out none \(1: lora_unet_\S+diff_b\)",
        ),
        (
            {f"{KOHYA}.lora_down.weight": torch.ones(2, 16), f"{KOHYA}.lora_up.weight": torch.full((16, 2), torch.nan)},
            "32 of the 32 values of lora_unet_.* are NaN",
        ),
        (
            {f"{KOHYA}.lora_down.weight": torch.tensor(1.0), f"{KOHYA}.lora_up.weight": torch.ones(16, 2)},
            r"holds down \[\] of torch.float32, but needs a floating-point tensor",
        ),
        (
            {f"{KOHYA}.lora_down.weight": torch.ones(2, 16), f"{KOHYA}.lora_up.weight": torch.ones(16, 2).int()},
            r"holds up \[16, 2\] of torch.int32, but needs a floating-point tensor",
        ),
    ],
    ids=["OFT", "half", "ranks", "bias", "NaN", "number", "integers"],
)
def test_invalid_changes_are_refused(state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        changed(saved(tmp_path, state))


def test_two_changes_of_one_layer_under_different_names_are_refused(tmp_path: Path) -> None:
    parts = {
        "lora_{}.weight": "lora_unet_blocks_0_self_attention_to_q",
        "lora.{}.weight": "unet.blocks.0.self_attention.to_q",
    }
    sides = {"down": torch.ones(2, 16), "up": torch.ones(16, 2)}
    state = {
        f"{label}.{part.format(side)}": one.clone() for part, label in parts.items() for side, one in sides.items()
    }
    with pytest.raises(ValueError, match="a layer that is changed under another name already"):
        saved(tmp_path, state).changes(networks_of(tiny_dit(), tiny_text_encoder()))


@pytest.mark.parametrize("metadata", ["{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": NaN}'])
def test_corrupt_metadata_of_peft_is_refused(metadata: str, tmp_path: Path) -> None:
    _, down, up = factors(LAYER)
    file = saved(tmp_path, dict(zip(SPELLINGS["peft"], (down, up), strict=True)), {"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match="to_k has corrupt LoRA settings in its metadata lora_adapter_metadata"):
        changed(file)


def test_other_files_are_not_recognised_as_adapters(tmp_path: Path) -> None:
    save_file(tiny_unet().state_dict(), tmp_path / "unet.safetensors")
    assert not has_adapter(tmp_path / "unet.safetensors") and not has_adapter(tmp_path / "absent")
    with pytest.raises(ValueError, match="is no adapter"):
        open_adapter(tmp_path / "unet.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no adapter: none of"):
        open_adapter(tmp_path)


def test_layers_are_found_by_dotted_and_underscored_names() -> None:
    unet = tiny_unet()
    names = own_names("unet", unet.config, layers(unet))
    assert names[PUBLIC] == names[underscored(PUBLIC)] == LAYER and {*names.values()} == {*layers(unet)}
    assert isinstance(next(iter(changes(unet).values())), LowRankChange)

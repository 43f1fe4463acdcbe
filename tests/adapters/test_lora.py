"""Tests low-rank changes: their outputs, target layers, initial values and merging."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.adapter import from_config
from ldm.adapters.change import LowRankChange
from ldm.adapters.lora import LoRA, remove
from ldm.adapters.low_rank import LowRank
from ldm.adapters.merging import merge, restore
from ldm.adapters.targets import low_rank_layers, targets_of
from ldm.conditioning import Conditioning
from ldm.nn.backbone import Backbone, trainable
from ldm.nn.clip import TextTower
from ldm.nn.dit import DiT
from ldm.nn.unet import UNet
from ldm.weights.native import build
from tests.tiny import tiny_dit, tiny_text_tower, tiny_unet


def without_an_output(layer: nn.Linear) -> nn.Linear:
    """Zeroes the weights of one output, whose norm is then 0."""
    layer.weight.data[3] = 0
    return layer


LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 10),
    "no bias": lambda: nn.Linear(6, 10, bias=False),
    "3x3": lambda: nn.Conv2d(6, 10, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1),
    "1x1": lambda: nn.Conv2d(6, 10, 1),
    "circular": lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular"),
    "zero output": lambda: without_an_output(nn.Linear(6, 10)),
}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"stabilised": True, "alpha": 3},
    "DoRA": {"decomposed": True},
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs(layer: nn.Module) -> Tensor:
    return torch.randn(2, 5, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 7, 8)


def trained(layer: nn.Module, **how: Any) -> LowRank:
    """Returns a layer as after training: no factor is zero, and the magnitude differs from the norm."""
    adapted = LowRank(layer, rank=4, **how).eval()  # type: ignore[arg-type]
    nn.init.normal_(adapted.up)
    if adapted.magnitude is not None:
        adapted.magnitude.data *= torch.rand_like(adapted.magnitude) + 0.5
    return adapted


def output(network: Backbone) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 16)))
    with torch.no_grad():
        return network(x.to(network.dtype), torch.tensor([3.0, 700.0]), Conditioning(text=text.to(network.dtype)))


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_new_layer_is_bit_identical_to_its_base(kind: str, how: str) -> None:
    base = LAYERS[kind]()
    x = inputs(base)
    assert torch.equal(LowRank(base, rank=4, **KINDS[how])(x), base(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", KINDS)
def test_trained_weights_are_float32_for_any_base_dtype(how: str, dtype: torch.dtype) -> None:
    base = nn.Linear(6, 10).to(dtype)
    x, layer = torch.randn(3, 6).to(dtype), LowRank(base, rank=4, **KINDS[how])
    assert torch.equal(layer(x), base(x)) and layer(x).dtype == base.weight.dtype == dtype
    assert {weight.dtype for weight in trainable(layer).values()} == {torch.float32}
    layer(x).float().sum().backward()
    assert layer.up.grad is not None and layer.up.grad.dtype == torch.float32 and layer.up.grad.abs().max() > 0
    assert base.weight.grad is None


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_merged_weight_gives_the_same_outputs_as_the_layer(kind: str, how: str) -> None:
    base = LAYERS[kind]().double()
    layer = trained(base.float(), **KINDS[how])
    x = inputs(base)
    expected = layer(x)
    merge(network := nn.Sequential(base), {"0": [(layer.change, 1.0)]})
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)


def test_the_scale_is_alpha_divided_by_the_rank_or_its_square_root() -> None:
    base = nn.Linear(6, 10)
    layer = trained(base, alpha=2)
    plain = 0.5 * layer.up @ layer.down
    torch.testing.assert_close(layer.change.changed(torch.zeros(10, 6)), plain.detach())
    stabilised = LowRank(base, rank=4, alpha=2, stabilised=True)
    assert stabilised.scale == 2 / 4**0.5 and LowRank(base, rank=4).scale == 1


def test_dropout_applies_to_the_change_and_only_during_training() -> None:
    layer = trained(nn.Linear(6, 10), dropout=0.5)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.up)
    assert torch.equal(layer(x), layer.base(x))


def test_restoring_merged_weights_is_bit_exact() -> None:
    base = nn.Conv2d(6, 10, 3, bias=False).to(memory_format=torch.channels_last).to(torch.bfloat16)
    before, layer = base.weight.detach().clone(), trained(base, decomposed=True)
    originals = merge(network := nn.Sequential(base), {"0": [(layer.change, 0.7), (layer.change, -2.0)]})
    assert not torch.equal(base.weight, before) and base.weight.stride() == before.stride()
    restore(network, originals)
    assert torch.equal(base.weight, before)


def test_the_weighted_sum_of_changes_does_not_depend_on_their_order() -> None:
    base = nn.Linear(6, 10)
    one, two = (trained(base, **how).change for how in ({"decomposed": True}, {"alpha": 2}))
    weight = base.weight.detach().clone()
    expected = weight + 0.5 * (one.changed(weight) - weight) - 1.5 * (two.changed(weight) - weight)
    for weighted in ([(one, 0.5), (two, -1.5)], [(two, -1.5), (one, 0.5)]):
        originals = merge(network := nn.Sequential(base), {"0": weighted})
        torch.testing.assert_close(base.weight.detach(), expected)
        restore(network, originals)
    merge(network, {"0": [(one, 0.0), (two, 0.0)]})
    assert torch.equal(base.weight, weight)


def test_a_change_and_its_opposite_cancel() -> None:
    base = nn.Linear(6, 10)
    weight, change = base.weight.detach().clone(), trained(base).change
    merge(nn.Sequential(base), {"0": [(change, 1.5), (change, -1.5)]})
    torch.testing.assert_close(base.weight.detach(), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1": (4, 6, 10)}, "no linear or convolution layer 1"),
        ({"0": (4, 7, 10)}, r"changes a weight \[10, 7\] of the layer 0, whose weight is \[10, 6\]"),
    ],
)
def test_merging_changes_of_another_network_is_refused(changes: dict[str, tuple[int, ...]], message: str) -> None:
    network = nn.Sequential(nn.Linear(6, 10))
    given = {
        name: [(LowRankChange(torch.randn(rank, inputs), torch.randn(outputs, rank), 1.0), 1.0)]
        for name, (rank, inputs, outputs) in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        merge(network, given)


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("make", [tiny_unet, tiny_dit])
def test_adapting_keeps_the_outputs_and_merging_gives_plain_layers(make: Any, how: str) -> None:
    network, adapter = make(), LoRA(rank=2, targets="all", **KINDS[how])
    before, plain = output(network), {type(module) for module in network.modules()}
    adapter.adapt(network)
    assert torch.equal(output(network), before)
    for layer in low_rank_layers(network).values():
        nn.init.normal_(layer.up, std=0.1)
    changed = output(network)
    assert (changed - before).abs().max() > 1e-2
    adapter.merge(network)
    assert {type(module) for module in network.modules()} == plain
    assert [*network.state_dict()] == [*make().state_dict()]
    torch.testing.assert_close(output(network), changed, rtol=1e-4, atol=1e-5)


def test_removing_an_adapter_restores_the_network() -> None:
    network = tiny_unet()
    LoRA(rank=2).adapt(network)
    remove(network)
    assert all(torch.equal(one, two) for one, two in zip(network.parameters(), tiny_unet().parameters(), strict=True))


def test_only_the_low_rank_parameters_are_trainable() -> None:
    network = tiny_unet()
    LoRA(rank=2, decomposed=True).adapt(network)
    assert {name.rpartition(".")[2] for name in trainable(network)} == {"down", "up", "magnitude"}
    assert {name.rpartition(".")[0] for name in trainable(network)} == set(targets_of(tiny_unet(), "attention"))


@pytest.fixture(scope="module")
def sd15() -> UNet:
    return build({"kind": "unet", "config": {}}, "here")  # type: ignore[return-value]


@pytest.mark.parametrize(("preset", "count"), [("attention", 128), ("transformer", 192), ("all", 278)])
def test_presets_select_the_same_layers_of_sd15_as_other_tools(sd15: UNet, preset: str, count: int) -> None:
    """278 = 192 layers of kohya's LoRA + 86 of its LoCon (22 residual blocks of 3, 14 shortcuts, 6 resampling)."""
    assert len(targets_of(sd15, preset)) == count


def test_rank_16_on_the_attention_of_sd15_has_3_19_million_parameters(sd15: UNet) -> None:
    adapted = build({"kind": "unet", "config": {}}, "here")
    LoRA(rank=16).adapt(adapted)  # type: ignore[arg-type]
    assert sum(weight.numel() for weight in trainable(adapted).values()) == 3_188_736


def test_presets_select_the_corresponding_layers_of_a_dit() -> None:
    dit = DiT(width=16, layers=2, heads=2, context_width=16)
    chosen = {preset: targets_of(dit, preset) for preset in ("attention", "transformer", "all")}
    own = {preset: [name[9:] for name in names if name.startswith("blocks.1.")] for preset, names in chosen.items()}
    attention = [f"{kind}_attention.to_{one}" for kind in ("self", "text") for one in ("q", "k", "v", "out")]
    assert own["attention"] == attention
    assert own["transformer"] == [*attention, "perceptron.0", "perceptron.2"]
    assert own["all"] == [*attention, "perceptron.0", "perceptron.2", "modulation"]
    assert all(name.startswith("blocks.") for names in chosen.values() for name in names)


def test_presets_select_72_layers_of_the_sd15_text_encoder() -> None:
    with torch.device("meta"):
        tower = TextTower()
    assert len(targets_of(tower, "transformer")) == len(targets_of(tower, "all")) == 72
    assert len(targets_of(tower, "attention")) == 48


def test_each_preset_contains_the_smaller_preset(sd15: UNet) -> None:
    sets = [set(targets_of(sd15, preset)) for preset in ("attention", "transformer", "all")]
    assert all(small < large for small, large in pairwise(sets))


def test_a_text_tower_can_be_adapted_trained_and_merged() -> None:
    tower, tokens = tiny_text_tower(), torch.randint(0, 400, (2, 16))
    before = tower(tokens)
    adapter = LoRA(rank=2, targets="transformer")
    adapter.adapt(tower)
    assert torch.equal(tower(tokens), before)
    tower(tokens).sum().backward()
    assert all(layer.up.grad.abs().max() > 0 for layer in low_rank_layers(tower).values())  # type: ignore[union-attr]
    for layer in low_rank_layers(tower).values():
        nn.init.normal_(layer.up, std=0.1)
    changed = tower(tokens)
    adapter.merge(tower)
    torch.testing.assert_close(tower(tokens), changed)


def test_a_preset_that_selects_no_layer_is_refused() -> None:
    network = UNet(width=8, multipliers=(1,), blocks=1, depth=(0,), middle_depth=0, groups=4)
    with pytest.raises(ValueError, match="targets=attention: attention selects no linear or convolution layer"):
        LoRA().adapt(network)


def test_patterns_select_layers_and_their_ranks() -> None:
    network = tiny_unet()
    LoRA(rank=4, targets=["*.to_q", "*.to_v"], ranks={"*.to_v": 2, "*": 3}).adapt(network)
    ranks = {name.rpartition(".")[2]: layer.rank for name, layer in low_rank_layers(network).items()}
    assert ranks == {"to_q": 3, "to_v": 2}


def test_presets_and_patterns_select_their_layers_together() -> None:
    network = tiny_unet()
    both = targets_of(network, ["*.conv1", "attention"])
    assert {*both} == {*targets_of(network, "attention"), *targets_of(network, "*.conv1")} and len(both) == len({*both})
    assert both == [name for name in targets_of(network, "*") if name in both]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"targets": "everything"}, "everything selects no linear .* give attention, transformer, all, or patterns"),
        (
            {"targets": ["*.to_q", "attn2"]},
            "attn2 selects no linear or convolution layer of this unet, .* like time.0, ",
        ),
        ({"ranks": {"*.conv1": 4}}, r"ranks: \*\.conv1 matches none of the layers"),
        ({"rank": 0}, "the rank of an adapter is 0"),
        ({"rank": 4.5}, r"the rank of an adapter is 4\.5, but must be an integer"),
        ({"ranks": {"*": "8"}}, "the rank of an adapter is '8', but must be an integer"),
        ({"alpha": 0.0}, r"alpha is 0\.0, but nothing is learned"),
        ({"alpha": float("nan")}, "alpha is nan, but nothing is learned"),
        ({"alpha": float("inf")}, "alpha is inf, but nothing is learned"),
        ({"alpha": "16"}, "alpha is 16, but nothing is learned unless it is a positive number"),
        ({"targets": []}, "targets is empty: give attention, transformer, all"),
        ({"dropout": 1.0}, r"dropout is 1\.0, but must be in \[0, 1\)"),
        ({"base_dtype": "fp8"}, "base_dtype is fp8, but must be one of bfloat16"),
    ],
)
def test_invalid_settings_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**how).adapt(tiny_unet())


def test_an_adapter_built_from_its_config_is_identical() -> None:
    first, second = tiny_unet(), tiny_unet()
    adapter = LoRA(rank=3, targets=("*.to_q",), ranks={"*.text_attention.*": 2}, seed=5)
    adapter.adapt(first)
    again = from_config(adapter.config)
    assert again.config == adapter.config
    again.adapt(second)
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))


def test_base_weights_are_stored_in_the_configured_dtype() -> None:
    network, adapter = tiny_unet(), LoRA(rank=2, base_dtype="bfloat16")
    adapter.adapt(network)
    assert network.conv_in.weight.dtype == torch.bfloat16 and network.conv_in.bias is not None
    assert all(weight.dtype == torch.float32 for weight in trainable(network).values())
    adapter.merge(network)
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    assert torch.equal(network.conv_in.weight, tiny_unet().conv_in.weight.bfloat16().float())

"""Adapters that train some of the weights, and their configs."""

from typing import Any

import pytest
import torch

from ldm.adapters.adapter import ADAPTERS, from_config
from ldm.adapters.train_only import TrainOnly
from ldm.nn.backbone import Backbone, trainable
from tests.tiny import tiny_dit, tiny_unet


@pytest.mark.parametrize("backbone", [tiny_unet(), tiny_dit()], ids=["unet", "dit"])
def test_only_weights_that_match_a_pattern_require_gradients(backbone: Backbone) -> None:
    TrainOnly(["*.text_attention.*"]).adapt(backbone)
    names = [name for name, _ in backbone.named_parameters() if ".text_attention." in name]
    assert [*trainable(backbone)] == names and 0 < len(names) < len([*backbone.parameters()])


def test_a_weight_that_matches_any_pattern_is_trained() -> None:
    unet = tiny_unet()
    TrainOnly(["conv_out.*", "time.0.weight"]).adapt(unet)
    assert {*trainable(unet)} == {"conv_out.weight", "conv_out.bias", "time.0.weight"}


def test_train_only_does_not_change_the_weights() -> None:
    unet, before = tiny_unet(), {name: weight.clone() for name, weight in tiny_unet().state_dict().items()}
    TrainOnly(["*.text_attention.*"]).adapt(unet)
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())


def test_patterns_that_match_nothing_are_refused_with_the_known_names() -> None:
    with pytest.raises(
        ValueError, match=r"adapter.names=\['attn2'\] matches no weight of this dit: .* time, conv_in, "
    ):
        TrainOnly(["attn2"]).adapt(tiny_dit())


def test_an_adapter_can_be_rebuilt_from_its_config() -> None:
    adapter = TrainOnly(("*.text_attention.*", "conv_out.*"))
    rebuilt = from_config(adapter.config)
    assert isinstance(rebuilt, TrainOnly) and rebuilt.config == adapter.config
    assert adapter.config["name"] in ADAPTERS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "hypernetwork"}, "the adapter is 'hypernetwork', but must be one of train_only"),
        ({}, "the adapter is None, but must be one of train_only"),
        ({"name": "train_only", "rank": 4}, r"the adapter train_only cannot be built with \{'rank': 4\}"),
    ],
)
def test_an_invalid_adapter_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_config(config)

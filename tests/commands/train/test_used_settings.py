from typing import Any

import pytest

from ldm.commands.train.used_settings import is_read

CONFIG: dict[str, Any] = {
    "seed": 0,
    "training": {"network": "${model}", "steps": "${sampler.steps}", "list": ["${in_list}"]},
    "model": {"width": 8, "context": "${text.width}"},
    "text": {"width": 16, "height": 16},
    "sampler": {"steps": 20, "eta": 0.0},
    "data": {"module": {"size": "${..size}", "flip": "${oc.select:extra.flip,0.5}"}, "size": 64, "count": 9},
    "extra": {"flip": 0.1, "noise": "${unused}"},
    "in_list": 1,
    "unused": 3,
}


@pytest.mark.parametrize(
    "key",
    ["seed", "training.steps", "model.width", "text.width", "sampler.steps", "data.size", "extra.flip", "in_list"],
)
def test_settings_that_training_contains_or_refers_to_are_read(key: str) -> None:
    assert is_read(CONFIG, key)


@pytest.mark.parametrize("key", ["model", "text", "sampler", "data", "model.new", "training.network.new"])
def test_groups_with_a_read_setting_and_additions_to_read_groups_are_read(key: str) -> None:
    assert is_read(CONFIG, key)


@pytest.mark.parametrize("key", ["text.height", "sampler.eta", "data.count", "extra.noise", "unused", "nowhere"])
def test_settings_that_no_read_setting_refers_to_are_not_read(key: str) -> None:
    assert not is_read(CONFIG, key)

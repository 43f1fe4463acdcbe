from dataclasses import fields

import pytest

from ldm.pipeline.settings import Settings, SettingsOverrides
from ldm.sampling.driver import SAMPLERS


def test_every_setting_but_the_size_has_a_default() -> None:
    assert Settings(size=(64, 64)).sampler in SAMPLERS


def test_a_call_may_override_every_setting() -> None:
    assert {*SettingsOverrides.__annotations__, "guidance"} == {field.name for field in fields(Settings)}


def test_an_unknown_setting_is_refused_even_if_its_value_is_none() -> None:
    with pytest.raises(TypeError, match="there is no setting stpes; choose from size, sampler, "):
        Settings(size=(64, 64)).overridden({"steps": 3, "stpes": None})

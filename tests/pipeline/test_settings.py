from dataclasses import fields

import pytest

from ldm.pipeline.settings import Settings, SettingsOverrides
from ldm.sampling.driver import SAMPLERS


def test_settings_have_a_size_and_the_rest_by_default() -> None:
    assert Settings(size=(64, 64)).sampler in SAMPLERS


def test_a_call_may_change_every_setting() -> None:
    assert {*SettingsOverrides.__annotations__, "guidance"} == {field.name for field in fields(Settings)}


def test_what_is_no_setting_is_refused_even_if_it_is_left_out() -> None:
    with pytest.raises(TypeError, match="there is no setting stpes; there are size, sampler, "):
        Settings(size=(64, 64)).changed({"steps": 3, "stpes": None})

from dataclasses import fields
from inspect import signature

import numpy as np
import pytest

from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.settings import PER_IMAGE, Settings, SettingsOverrides
from ldm.sampling.driver import SAMPLERS


def test_every_setting_but_the_size_has_a_default() -> None:
    assert Settings(size=(64, 64)).sampler in SAMPLERS


def test_a_call_may_override_every_setting() -> None:
    assert {*SettingsOverrides.__annotations__, "guidance"} == {field.name for field in fields(Settings)}


def test_an_unknown_setting_is_refused_even_if_its_value_is_none() -> None:
    with pytest.raises(TypeError, match="there is no setting colour; choose from size, sampler, "):
        Settings(size=(64, 64)).overridden({"steps": 3, "colour": None})


def test_numbers_of_numpy_are_recorded_as_numbers() -> None:
    settings = Settings(size=(64, 64)).overridden({"steps": np.int64(3), "size": np.array([64, 32])})
    assert type(settings.steps) is int and settings.size == [64, 32]


def test_a_number_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance is 1e\+30, but must be a number below 1e\+30"):
        Settings(size=(64, 64), guidance=1e30)


@pytest.mark.parametrize(("given", "meant"), [("stpes", "steps"), ("guidence", "guidance"), ("sede", "seeds")])
def test_a_misspelt_argument_is_refused_with_a_suggestion(given: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"there is no setting {given}; did you mean {meant}\?"):
        Settings(size=(64, 64)).overridden({given: 3})


def test_suggestions_name_arguments_of_a_call() -> None:
    assert {*PER_IMAGE} <= {*signature(Pipeline.__call__).parameters}

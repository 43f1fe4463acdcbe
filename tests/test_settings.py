from dataclasses import fields

from ldm.sampling.driver import SAMPLERS
from ldm.settings import Changes, Settings


def test_settings_have_a_size_and_the_rest_by_default() -> None:
    assert Settings(size=(64, 64)).sampler in SAMPLERS


def test_a_call_may_change_every_setting() -> None:
    assert {*Changes.__annotations__, "guidance"} == {field.name for field in fields(Settings)}

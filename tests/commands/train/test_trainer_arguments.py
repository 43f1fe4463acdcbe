import inspect
import re
from typing import Any

import pytest
from lightning import Trainer

from ldm.commands.train.trainer_arguments import OURS, PASSED, REPLACEMENTS, check_argument, check_trainer

ENDING = {"max_steps": 5}
SIMPLE = {"_target_": "lightning.pytorch.profilers.SimpleProfiler"}


def test_every_trainer_argument_of_lightning_is_supported_or_refused() -> None:
    known = [*PASSED, *OURS, *REPLACEMENTS]
    assert sorted(known) == sorted(inspect.signature(Trainer).parameters)


@pytest.mark.parametrize("name", PASSED)
def test_a_supported_argument_can_be_set(name: str) -> None:
    check_argument(name)


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_an_unsupported_argument_is_refused_with_the_setting_to_use_instead(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"trainer.{name} is not supported: {REPLACEMENTS[name]}")):
        check_trainer({"_target_": "lightning.Trainer", **ENDING, name: None})


def test_an_unknown_argument_is_refused_with_the_most_similar_one() -> None:
    with pytest.raises(ValueError, match=r"no key trainer\.max_step: did you mean trainer\.max_steps\?"):
        check_trainer({"max_step": 5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": -1.0}, r"gradient_clip_val is -1\.0, but must be positive"),
        ({"gradient_clip_algorithm": "value"}, "has no effect without trainer.gradient_clip_val"),
        ({"gradient_clip_algorithm": "norm", "gradient_clip_val": 0}, "has no effect without"),
        ({"precision": None}, "precision is null, which would leave it to Lightning: choose precision=NAME"),
        ({"strategy": None}, "strategy is null, which would leave it to Lightning: choose strategy=NAME"),
        ({"profiler": "simple"}, "profiler would not write its result anywhere: choose debug=profile"),
        ({"profiler": SIMPLE}, "profiler would not write its result anywhere: choose debug=profile"),
        ({"val_check_interval": "00:00:10:00"}, "must be a number of batches"),
        ({"val_check_interval": {"minutes": 5}}, "must be a number of batches"),
        ({"max_steps": -1}, "a run needs a last step"),
        ({"max_steps": -1, "max_epochs": -1}, "a run needs a last step"),
        ({"max_steps": -1, "max_time": "00:01:00:00"}, "a run needs a last step.*trainer.max_time only interrupts"),
        ({"max_steps": None}, "a run needs a last step"),
        ({"max_steps": 0}, "a run needs a last step"),
        ({"max_epochs": 0}, "a run needs a last step"),
    ],
)
def test_values_that_have_no_effect_or_never_end_the_run_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_trainer(ENDING | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0},
        {"max_steps": -1, "max_epochs": 3},
        {"max_epochs": 3, "max_time": "00:01:00:00"},
        {"val_check_interval": 0.5, "profiler": SIMPLE | {"dirpath": "run"}},
        {"profiler": {"_target_": "mine.Profiler"}},
    ],
)
def test_values_that_lightning_uses_are_accepted(settings: dict[str, Any]) -> None:
    check_trainer(ENDING | settings)

"""Runs train.py in this process, with a minimal network and the first stage and text encoder that ldm ships."""

from pathlib import Path
from unittest.mock import patch

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from ldm.commands.train.messages import sentence
from ldm.commands.train.run import train
from ldm.errors import EXPECTED
from train import CONF

TINY = (
    *("model.width=16", "model.groups=8", "model.blocks=1", "model.heads=2", "sampler.steps=2"),
    *("++data.count=18", "data.batch_size=4", "trainer.limit_val_batches=1", "trainer.accelerator=cpu", "lr=constant"),
)
TINY_DIT = ("model=shapes_dit", "model.width=24", "model.layers=2", "model.heads=2", *TINY[4:])
ALONE = ("metrics=none", "logger=none", "name=test")  # without evaluation and logging


def run(folder: Path, *overrides: str) -> Path:
    """Trains in a folder, and returns the folder."""
    with initialize_config_dir(str(CONF), version_base="1.3"), patch("ldm.commands.train.run.quiet_logging"):
        train(compose("train", overrides=[*overrides, f"run_dir={folder}"]))
    return folder


def refusal(folder: Path, *overrides: str) -> str:
    """Returns the error message of a run that is refused, and checks that its folder is unchanged."""
    before = sorted(folder.rglob("*"))
    with pytest.raises((*EXPECTED, HydraException)) as refused:
        run(folder, *overrides)
    assert sorted(folder.rglob("*")) == before
    return sentence(refused.value)

"""Finds contradictory settings in a run's folder, for `ldm info`."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from ldm.commands.train.consistency import disagreements
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import from_config
from ldm.diffusion.weighting import WEIGHTINGS
from ldm.sampling.compatibility import Setup, contradictions


def contradictions_in(run: Path, model: dict[str, Any]) -> list[str]:
    """Returns the contradictions in how a run's model was trained and is sampled, and between its other settings.

    Nothing in the config is instantiated. Raises ValueError for invalid settings of the weighting.
    """
    file = run / "config.yaml"
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(file))
    except YAMLError as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    schedule, prediction = from_config(model["schedule"]), Prediction(model["prediction"])
    setup = Setup(schedule, prediction, time=model["time"], sampling=model["sampling"], **_trained(config, file))
    return [*contradictions(setup), *disagreements(config)]


def _trained(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns the settings of training that `contradictions` checks, from a run's config."""
    tree = {"training": {}, "weighting": {}} | config
    training, weighting = tree["training"], dict(tree["weighting"])
    name = weighting.pop("_target_", "").rpartition(".")[2]
    known = {key: training[key] for key in ("offset_noise", "caption_dropout") if key in training}
    try:
        return known | ({"weighting": WEIGHTINGS[name](**weighting)} if name in WEIGHTINGS else {})
    except TypeError as error:
        raise ValueError(
            f"the settings of the weighting in {file} do not fit this version of ldm ({error}); fix them there"
        ) from error

"""What `ldm info` says of a run's folder beyond its model: the settings that contradict one another."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import from_config
from ldm.diffusion.weighting import WEIGHTINGS
from ldm.lint import Setup, contradictions


def contradictions_in(run: Path, model: dict[str, Any]) -> list[str]:
    """What the linter says of how the model of a run's folder was trained and is sampled."""
    trained = _trained(run / "config.yaml")
    schedule, prediction = from_config(model["schedule"]), Prediction(model["prediction"])
    return contradictions(Setup(schedule, prediction, time=model["time"], sampling=model["sampling"], **trained))


def _trained(config: Path) -> dict[str, Any]:
    """The settings of training that the linter knows, from a run's config, of which nothing is instantiated."""
    tree = {"training": {}, "weighting": {}} | dict(OmegaConf.to_container(OmegaConf.load(config)))  # type: ignore[arg-type]
    training, weighting = tree["training"], dict(tree["weighting"])
    name = weighting.pop("_target_", "").rpartition(".")[2]
    known = {key: training[key] for key in ("offset_noise", "caption_dropout") if key in training}
    try:
        return known | ({"weighting": WEIGHTINGS[name](**weighting)} if name in WEIGHTINGS else {})
    except TypeError as error:
        raise ValueError(f"{config} names a weighting that this ldm does not have: {error}") from error

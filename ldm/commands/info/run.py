"""What `ldm info` says of a run's folder beyond its model: the settings that contradict one another."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.commands.train.consistency import disagreements
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import from_config
from ldm.diffusion.weighting import WEIGHTINGS
from ldm.sampling.compatibility import Setup, contradictions


def contradictions_in(run: Path, model: dict[str, Any]) -> list[str]:
    """What the linter says of how the model of a run's folder was trained and is sampled, and of its settings."""
    file = run / "config.yaml"
    config: Any = OmegaConf.to_container(OmegaConf.load(file))
    schedule, prediction = from_config(model["schedule"]), Prediction(model["prediction"])
    setup = Setup(schedule, prediction, time=model["time"], sampling=model["sampling"], **_trained(config, file))
    return [*contradictions(setup), *disagreements(config)]


def _trained(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The settings of training that the linter knows, from a run's config, of which nothing is instantiated."""
    tree = {"training": {}, "weighting": {}} | config
    training, weighting = tree["training"], dict(tree["weighting"])
    name = weighting.pop("_target_", "").rpartition(".")[2]
    known = {key: training[key] for key in ("offset_noise", "caption_dropout") if key in training}
    try:
        return known | ({"weighting": WEIGHTINGS[name](**weighting)} if name in WEIGHTINGS else {})
    except TypeError as error:
        raise ValueError(f"{file} names a weighting that this ldm does not have: {error}") from error

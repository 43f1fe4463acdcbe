"""`ldm info`: what a model file, a checkpoint, a run's folder or a cache holds, without reading its tensors."""

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import from_config
from ldm.diffusion.weighting import WEIGHTINGS
from ldm.lint import Setup, contradictions
from ldm.weights.contents import Contents
from ldm.weights.find import READABLE, find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say what a model, a run or a cache of latents is, without reading its tensors."
    parser.add_argument(
        "path",
        metavar="MODEL|RUN|CACHE",
        help=f"{READABLE}; also a part alone, such as an autoencoder, and what ldm encode wrote",
    )


def run(args: argparse.Namespace) -> None:
    lines = describe(args.path)
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


def describe(path: str) -> dict[str, str]:
    """Name → value, for people. Raises FileNotFoundError or ValueError as `find` does."""
    if (folder := Path(path).expanduser()).is_dir():
        from ldm.commands.info_cache import describe_cache, is_cache  # not for a file, which is told in half the time

        if is_cache(folder):
            return describe_cache(folder)
    contents = find(path)
    lines = _networks(contents)
    if not (model := contents.model):
        return lines
    return lines | {
        "weights": "; ".join(contents.notes) or "as saved",
        "schedule": _settings(model["schedule"]),
        "prediction": model["prediction"],
        "network's time": model["time"] or "the schedule's default",
        "size": "x".join(map(str, model["size"])),
        "sampling": _settings(model["sampling"]),
        **{name.replace("_", " "): _source(model[name]) for name in ("first_stage", "text_encoder") if name in model},
        "contradictions": "; ".join(contradictions(setup(path, model))) or "none",
    }


def setup(path: str, model: dict[str, Any]) -> Setup:
    """What the linter looks at: how the model is sampled, and how it was trained if `path` is a run's folder."""
    trained = _trained(Path(path).expanduser() / "config.yaml")
    schedule, prediction = from_config(model["schedule"]), Prediction(model["prediction"])
    return Setup(schedule, prediction, time=model["time"], sampling=model["sampling"], **trained)


def _trained(config: Path) -> dict[str, Any]:
    """The settings of training that the linter knows, from a run's config, of which nothing is instantiated."""
    if not config.is_file():
        return {}
    from omegaconf import OmegaConf  # which only a run's folder needs

    tree = {"training": {}, "weighting": {}} | dict(OmegaConf.to_container(OmegaConf.load(config)))  # type: ignore[arg-type]
    training, weighting = tree["training"], dict(tree["weighting"])
    name = weighting.pop("_target_", "").rpartition(".")[2]
    known = {key: training[key] for key in ("offset_noise", "caption_dropout") if key in training}
    try:
        return known | ({"weighting": WEIGHTINGS[name](**weighting)} if name in WEIGHTINGS else {})
    except TypeError as error:
        raise ValueError(f"{config} names a weighting that this ldm does not have: {error}") from error


def _networks(contents: Contents) -> dict[str, str]:
    built = {kind: network.blueprint for kind, network in contents.networks.items()}
    counts = {kind: sum(p.numel() for p in network.parameters()) for kind, network in built.items()}
    source, held = contents.source, sum(network.tensors.nbytes for network in contents.networks.values())
    lines = {
        "file": f"{source} ({(source.stat().st_size if source.is_file() else held) / 2**20:,.1f} MiB)",
        "kind": contents.form,
        "parameters": f"{sum(counts.values()):,}",
    }
    if len(built) == 1:
        return lines | {"architecture": _settings(_config(*built.values()))}
    return lines | {
        kind: f"{counts[kind]:,} parameters, {_settings(_config(network))}" for kind, network in built.items()
    }


def _config(network: nn.Module) -> dict[str, Any]:
    return network.config  # type: ignore[return-value]


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: Any, most: int = 12) -> str:
    """Long lists, such as the tokens that a small text tower knows, are only counted."""
    if isinstance(value, dict):
        return f"({_settings(value)})"
    return f"[{len(value)} values]" if isinstance(value, list) and len(value) > most else str(value)


def _source(source: dict[str, str]) -> str:
    return f"{source['weights']} ({source['fingerprint'][:12]})"

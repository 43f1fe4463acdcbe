"""`ldm info`: what a model file, a checkpoint or a run's folder holds, without reading its tensors."""

import argparse
from pathlib import Path
from typing import Any

from ldm.weights.model import build, find_model
from ldm.weights.native import locate, read_about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say what a model is, without reading its tensors."
    parser.add_argument("model", help="a run folder, a .ckpt, a .safetensors of ldm, or 'shapes', the default model")


def run(args: argparse.Namespace) -> None:
    lines = describe(args.model)
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


def describe(path: str) -> dict[str, str]:
    """Name → value, for people. Raises FileNotFoundError or ValueError as `find_model` does."""
    part = _part(path)
    if part is not None:
        file, about = part
        return _network(file, about)
    stored = find_model(path)
    model = stored.about["model"]
    return _network(stored.file, stored.about) | {
        "weights": stored.note,
        "schedule": _settings(model["schedule"]),
        "prediction": model["prediction"],
        "network's time": model["time"] or "the schedule's default",
        "size": "x".join(map(str, model["size"])),
        "sampling": _settings(model["sampling"]),
        "first stage": _source(model["first_stage"]),
        "text encoder": _source(model["text_encoder"]),
    }


def _part(path: str) -> tuple[Path, dict[str, Any]] | None:
    """A file of ours that holds one network and not a whole model, such as an autoencoder."""
    if not (path.endswith(".safetensors") and (path.startswith("assets:") or Path(path).is_file())):
        return None
    file = locate(path)
    try:
        about = read_about(file)
    except ValueError:
        return None  # find_model says what is wrong with it
    return (file, about) if "model" not in about else None


def _network(file: Path, about: dict[str, Any]) -> dict[str, str]:
    network = build(about, file)
    return {
        "file": f"{file} ({file.stat().st_size / 2**20:,.1f} MiB)",
        "kind": about["kind"],
        "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
        "architecture": _settings(about["config"]),
    }


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: Any, most: int = 12) -> str:
    """Long lists, such as the tokens that a small text tower knows, are only counted."""
    if isinstance(value, dict):
        return f"({_settings(value)})"
    return f"[{len(value)} values]" if isinstance(value, list) and len(value) > most else str(value)


def _source(source: dict[str, str]) -> str:
    return f"{source['weights']} ({source['fingerprint'][:12]})"

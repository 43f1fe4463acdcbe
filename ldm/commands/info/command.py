"""`ldm info` describes a model file, a checkpoint, a run's folder, a cache or shards, without reading its tensors."""

import argparse
from pathlib import Path
from typing import Any

from ldm.weights.adapters.recognise import has_adapter, has_embedding, is_run_of_adapter
from ldm.weights.info import ContentsInfo, NetworkInfo
from ldm.weights.kinds import ADAPTER
from ldm.weights.recognise import recognise


def run(args: argparse.Namespace) -> None:
    lines = describe(args.path)
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


def describe(path: str) -> dict[str, str]:
    """Returns human-readable lines, name → value. Raises FileNotFoundError or ValueError as `recognise` does."""
    folder = Path(path).expanduser()
    if "://" in path or path.endswith(".tar") or (folder.is_dir() and any(folder.glob("*.tar"))):
        from ldm.commands.info.shards import describe_shards  # here, because it imports torch

        return describe_shards(path)
    if (added := _added(path)) is not None:
        return added
    try:
        contents = recognise(path)
    except FileNotFoundError:
        if not folder.is_dir():
            raise
        from ldm.commands.info.cache import describe_cache, is_cache  # here, because it imports torch

        if not is_cache(folder):
            raise
        return describe_cache(folder)
    lines = _networks(contents)
    if contents.base:
        lines |= _base(contents.base)
    if contents.model:
        lines |= _model(contents)
    if contents.model and (folder / "config.yaml").is_file():
        from ldm.commands.info.run import contradictions_in

        lines |= {"contradictions": "; ".join(contradictions_in(folder, contents.model)) or "none"}
    return lines


def _added(path: str) -> dict[str, str] | None:
    """Describes an adapter or textual inversion; None for other files and for an adapter that names its base."""
    adapter = has_adapter(path)
    if is_run_of_adapter(path) or not (adapter or has_embedding(path)):
        return None
    from ldm.commands.info.adapter import describe_adapter, describe_embedding  # imported here, because it needs torch

    return describe_adapter(path) if adapter else describe_embedding(path)


def _networks(contents: ContentsInfo) -> dict[str, str]:
    counts = {kind: _parameters(network) for kind, network in contents.networks.items()}
    source, nbytes = contents.source, sum(network.tensors.nbytes for network in contents.networks.values())
    lines = {
        "file": f"{source} ({(source.stat().st_size if source.is_file() else nbytes) / 2**20:,.1f} MiB)",
        "kind": contents.description,
        "parameters": f"{sum(counts.values()):,}",
    }
    settings = {kind: _settings(network.config) for kind, network in contents.networks.items()}
    if len(settings) == 1:
        return lines | {"settings" if ADAPTER in settings else "architecture": next(iter(settings.values()))}
    return lines | {kind: f"{counts[kind]:,} parameters, {text}" for kind, text in settings.items()}


def _base(base: dict[str, Any]) -> dict[str, str]:
    """Describes the model that an adapter changes."""
    network = base["network"]
    return {"base": _source(base), "base's network": f"{network['kind']}, {_settings(network['config'])}"}


def _parameters(network: NetworkInfo) -> int:
    return sum(header.size for header in network.tensors.values() if header.is_float)


def _model(contents: ContentsInfo) -> dict[str, str]:
    model = contents.model
    return {
        "weights": "; ".join(contents.notes) or "as saved",
        "schedule": _settings(model["schedule"]),
        "prediction": model["prediction"],
        "network's time": model.get("time") or "the schedule's default",
        "size": "x".join(map(str, model["size"])),
        "sampling": _settings(model["sampling"]),
        **{name.replace("_", " "): _source(model[name]) for name in ("first_stage", "text_encoder") if name in model},
    }


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: Any, most: int = 12) -> str:
    """Formats a value; of long lists, such as the vocabulary of a small text tower, only the length."""
    if isinstance(value, dict):
        return f"({_settings(value)})"
    return f"[{len(value)} values]" if isinstance(value, list) and len(value) > most else str(value)


def _source(source: dict[str, str]) -> str:
    return f"{source['weights']} ({source['fingerprint'][:12]})"

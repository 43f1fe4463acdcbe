"""Checks that settings which follow another setting agree with it."""

from collections.abc import Iterator, Mapping
from typing import Any

# Setting → the setting that it follows.
FOLLOWS = {
    "trainer.precision": "precision.name",
    "trainer.strategy": "strategy.name",
    "optimizer.precision": "trainer.precision",
    "training.compute": "precision.compute",
    "training.backbone": "model",
    "training.adapter": "adapter",
    "training.vae": "model",
    "training.clip": "model",
    **{
        f"training.{group}": group
        for group in (
            *("first_stage", "text_encoder", "schedule", "prediction", "weighting", "times"),
            *("optimizer", "lr", "seed"),
        )
    },
    "times.schedule": "schedule",
    "training.sampling.sampler": "sampler.name",
    "training.sampling.sampler_options": "sampler.options",
    "training.sampling.spacing": "sampler.spacing",
    "training.sampling.spacing_options": "sampler.spacing_options",
    "training.sampling.steps": "sampler.steps",
    "training.sampling.guidance": "guidance.scale",
    "training.sampling.guidance_interval": "guidance.interval",
    "training.sampling.guidance_rescale": "guidance.rescale",
    "adapter.seed": "seed",
    "data.module.seed": "seed",
    "callbacks.metrics.seed": "seed",
    **{
        f"data.module.{name}": f"data.{name}"
        for name in (
            *("batch_size", "global_batch", "limit", "run", "bucketed"),
            *("workers", "readers", "tokenize", "max_bad_share"),
        )
    },
    "callbacks.running.folder": "run_dir",
    "callbacks.running.resume": "resume",
    "callbacks.export.folder": "run_dir",
    "callbacks.metrics.folder": "run_dir",
    "evaluation.folder": "run_dir",
}
# Folder setting → its required place in run_dir, where resume=auto and the other ldm commands look.
INSIDE = {"callbacks.checkpoint.folder": "checkpoints", "callbacks.previews.folder": "samples", "ema.folder": "ema"}


def disagreements(config: Mapping[str, Any]) -> list[str]:
    """Returns one message for each pair of settings of a resolved config that must agree but differ."""
    messages = [text for follower, owner in FOLLOWS.items() for text in _differences(config, follower, owner)]
    return [*messages, *_folders(config), *_size(config)]


def _differences(config: Mapping[str, Any], follower: str, owner: str) -> Iterator[str]:
    """Yields a message for the first setting in which two groups differ."""
    ours, theirs = leaves(config, follower), leaves(config, owner)
    if not ours or not theirs:
        return
    for key in [*ours, *theirs]:
        absent = "not set" if key else "a group of settings"
        mine, other = ours.get(key, absent), theirs.get(key, absent)
        if mine != other:
            yield f"{follower}{key} is {mine} and {owner}{key} is {other}: set only {owner}, which {follower} follows"
            return


def leaves(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns every value at or below a dotted path, by the rest of its path with a leading dot."""
    node: Any = config
    for name in path.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return {}
        node = node[name]
    return dict(_leaves(node, ""))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        yield path, node
        return
    if not node:
        yield path, {}
    for name, value in node.items():
        yield from _leaves(value, f"{path}.{name}")


def _folders(config: Mapping[str, Any]) -> Iterator[str]:
    for key, name in INSIDE.items():
        expected = f"{config.get('run_dir')}/{name}"
        if (folder := leaves(config, key).get("")) not in (None, expected):
            yield f"{key} is {folder}, but must be {name} in run_dir, where other commands look: set only run_dir"


def _size(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields a message if the size of the training images differs from that of sampled images."""
    data, training = (leaves(config, key).get("") for key in ("data.size", "training.size"))
    if data is not None and training is not None and [data, data] != [*training]:
        yield (
            f"data.size is {data} and training.size is {[*training]}, so that the model would train on images of one "
            f"size and sample another: set only training.size=[{data},{data}], which data.size follows"
        )

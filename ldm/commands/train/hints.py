"""Suggests what to set in place of settings that train.py lacks or expects in another form."""

from collections.abc import Sequence
from typing import Any

# Settings for numbers that are often given for a group instead.
NUMBERS = {"lr": "optimizer.lr", "optimizer": "optimizer.lr", "ema": "ema.decay", "guidance": "guidance.scale"}
# Precisions by their names in sample.py and other programs → the options that they may mean.
PRECISIONS = {
    "bf16": "bf16-mixed, or bf16-true, which keeps no weights in float32",
    "bfloat16": "bf16-mixed, or bf16-true, which keeps no weights in float32",
    "16": "16-mixed, or bf16-mixed, whose range is that of float32",
    "fp16": "16-mixed, or bf16-mixed, whose range is that of float32",
}
SIZE = "the size of images is training.size=[HEIGHT,WIDTH]; model.width is the network's width"
# Names of other commands or programs → what to do instead.
ELSEWHERE = {
    "prompt": 'it belongs to sample.py, as in python sample.py "a red circle" model=RUN; images during training are of '
    "callbacks.previews.prompts=[…]",
    "negative": "it belongs to sample.py, as in python sample.py PROMPT negative=… model=RUN",
    "lora": "adapter=lora trains a LoRA; a LoRA in a file is for sample.py, as in python sample.py PROMPT lora=FILE",
    "width": SIZE,
    "height": SIZE,
    "size": SIZE,
    "steps": "set trainer.max_steps for training, or sampler.steps for sampling",
    "negative_prompt": "it belongs to sample.py, as in python sample.py PROMPT negative=… model=RUN",
    "device": "set trainer.accelerator=cpu or gpu, and trainer.devices=N for the number of processes or GPUs",
    "out": "set run_dir, the run's folder",
    "n": "set evaluation.prompts, the number of images that are sampled at the end",
}
EVALUATION = "a run without evaluation has metrics=none, or evaluation.prompts=0, which keeps the settings"
NUMERIC = ("seed", "data", "lr", "model")  # null is not valid for these
OPTIONAL = ("data.global_batch", "data.limit")


def option_hint(group: str, given: str, options: Sequence[str]) -> str | None:
    """Returns what to set in place of a value that is not an option of a group."""
    if given == "None":
        choice = f"choose {group}=none" if "none" in options else f"choose from {', '.join(options)}"
        return f"{group}=null is not an option: {choice}"
    if group == "precision" and given in PRECISIONS:
        return f"precision={given} does not exist: choose {PRECISIONS[given]}"
    try:
        float(given)
    except ValueError:
        return None
    if group not in NUMBERS:
        return None
    return f"{group}={given} does not exist, because {group} is a group of settings: set {NUMBERS[group]}={given}"


def removal_hint(group: str, options: Sequence[str]) -> str:
    """Returns what to set in place of removing a group."""
    instead = f"{group}=none" if "none" in options else f"one of {', '.join(options)}"
    return f"~{group} would remove settings that a run reads: choose {instead}"


def null_hint(key: str, default: Any) -> str | None:
    """Returns why a setting cannot be null, or None if it can."""
    if key == "evaluation":
        return f"evaluation cannot be null: {EVALUATION}"
    if key == "run_dir":
        return "run_dir cannot be null, because the run writes its files there: give a folder, or leave it out"
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if number and key.split(".")[0] in NUMERIC and key not in OPTIONAL:
        return f"{key} cannot be null, because the run needs a number: leave it out for {default}, or give another"
    return None

"""Whether a resumed run still has the settings that it began with."""

import re
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

# Decides no weight: how it was started, where results lie, what is shown and measured on the way, and how the work is
# dealt out. Of the frozen parts the module compares the weights themselves, of the batch this compares the samples of
# a step.
NEUTRAL = (
    *("run_dir", "resume", "accept_changes", "name", "plan"),
    *("callbacks", "logger", "metrics", "evaluation", "debug"),
    *("strategy", "sampler", "guidance", "training.sampling", "first_stage.weights", "text_encoder.weights"),
    "optimizer.precision",  # the trainer's
    *("data.workers", "data.tokenize", "data.module.val", "data.batch_size", "data.global_batch", "trainer"),
)
RENAMED = {"training.unet": "training.backbone", "data.one_in": "data.held_out_every"}  # settings, since version 0.1
DECISIVE = ("trainer.precision", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm")
LENGTH = ("trainer.max_steps", "trainer.max_epochs")  # to which all curves but a constant one are stretched


class SettingsCheck(Callback):
    """Keeps the `settings`, nested plain data, in checkpoints, and compares them with those of a run that is resumed.

    They are those that were given, with references to others as such; `resolved` has the values of these. Raises
    ValueError for changes that would lead elsewhere than the run that was never stopped; `accepted`, they are only
    shown. A run that is to end before the checkpoint is refused, too.
    """

    def __init__(self, settings: dict[str, Any], resolved: dict[str, Any], accepted: bool = False) -> None:
        self.settings, self.resolved, self.accepted = settings, resolved, accepted

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = self.settings

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if -1 < trainer.max_steps < checkpoint["global_step"]:
            raise ValueError(
                f"trainer.max_steps is {trainer.max_steps}, but the checkpoint is of step {checkpoint['global_step']}: "
                "give at least that many, or another checkpoint"
            )
        if "settings" not in checkpoint:
            _tell("the checkpoint is of an older layout without settings, so that they cannot be compared")
            return
        found = differences(checkpoint["settings"], self.settings, self.resolved)
        if found and not self.accepted:
            raise ValueError(
                f"the checkpoint was trained with other settings ({'; '.join(found)}), so that going on would not "
                "lead where the run was bound for: put them back, or accept it with accept_changes=true"
            )
        if found:
            _tell(f"settings changed since the checkpoint of step {checkpoint['global_step']}:", *found)


def differences(old: dict[str, Any], new: dict[str, Any], resolved: dict[str, Any]) -> list[str]:
    """The settings that decide weights and changed.

    One that was added or removed and is null, or refers to another setting, did not change; nor did one that was a
    value and now refers to the same.
    """
    before, after, values = (
        {RENAMED.get(key, key): value for key, value in _flat(old).items()},
        _flat(new),
        _flat(resolved),
    )
    changed = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key) not in (after.get(key), values.get(key)) and not _refers(before.get(key), after.get(key))
    ]
    return [f"{key} {before.get(key)} → {after.get(key)}" for key in changed if decides(key, new)]


def _refers(before: Any, after: Any) -> bool:
    """Whether one is absent and the other only refers to another setting, which is compared itself."""
    given = [value for value in (before, after) if value is not None]
    return len(given) == 1 and isinstance(given[0], str) and re.fullmatch(r"\$\{[\w.]+\}", given[0]) is not None


def decides(key: str, settings: dict[str, Any]) -> bool:
    """Whether another value leads to other weights."""
    if key in LENGTH:
        return not str(settings["lr"]["_target_"]).endswith(".constant")
    return key in DECISIVE or not any(f"{key}.".startswith(f"{neutral}.") for neutral in NEUTRAL)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


@rank_zero_only
def _tell(*lines: str) -> None:
    print(*lines, sep="\n  ", flush=True)

"""Checks that a resumed run has the settings that its checkpoint was trained with."""

import re
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from ldm.callbacks.checkpointing.resuming import batch_split, samples_per_step

# These settings do not affect the trained weights: how the run is started, where results are stored, what is shown and
# measured during training, and how work is distributed. For frozen networks the LightningModule compares the weights
# themselves; for another batch size `align_progress` converts the position in the data, if a step has as many samples.
NEUTRAL = (
    *("run_dir", "resume", "accept_changes", "name", "plan", "rehearsal"),
    *("callbacks", "logger", "metrics", "evaluation", "debug"),
    *("strategy", "sampler", "guidance", "training.sampling", "first_stage.weights", "text_encoder.weights"),
    "optimizer.precision",  # follows trainer.precision
    *("data.workers", "data.tokenize", "data.module.val", "data.batch_size", "data.global_batch", "trainer"),
    *("data.latent_store", "data.module.train.store", "data.reference"),
)
RENAMED = {"training.unet": "training.backbone", "data.one_in": "data.held_out_every"}  # since version 0.1
# The values with which checkpoints were trained that lack these settings.
BEFORE: dict[str, Any] = {"data.split_hash": "crc32", "data.repeats": False}
DECISIVE = ("trainer.precision", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm")
LENGTH = ("trainer.max_steps", "trainer.max_epochs")  # every learning-rate curve except the constant one spans it


class SettingsCheck(Callback):
    """Saves the `settings` (nested plain data) in checkpoints and compares them when a run is resumed.

    `settings` contains interpolations as given, `resolved` their values. Raises ValueError for changes that would make
    the result differ from that of an uninterrupted run; if `accepted`, they are only printed. Also raises ValueError
    if the run would end before the checkpoint's step.
    """

    def __init__(self, settings: dict[str, Any], resolved: dict[str, Any], accepted: bool = False) -> None:
        self.settings, self.resolved, self.accepted = settings, resolved, accepted

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = self.settings

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if -1 < trainer.max_steps < checkpoint["global_step"]:
            raise ValueError(
                f"trainer.max_steps is {trainer.max_steps}, but the checkpoint is from step "
                f"{checkpoint['global_step']}: give at least that many steps, or another checkpoint"
            )
        if "settings" not in checkpoint:
            _print_lines("the checkpoint has an older layout without settings, so that they cannot be compared")
            return
        changes = differences(checkpoint["settings"], self.settings, self.resolved)
        before, now = (samples_per_step(split) for split in (checkpoint.get("dealing", {}), batch_split(trainer)))
        if before is not None and before != now:
            changes.append(f"samples per optimizer step {before} → {now}, see data.batch_size and data.global_batch")
        if changes and not self.accepted:
            raise ValueError(
                f"the checkpoint was trained with other settings ({'; '.join(changes)}), so that the result would "
                "differ from that of an uninterrupted run: restore them, or accept the changes with accept_changes=true"
            )
        if changes:
            _print_lines(f"settings changed since the checkpoint of step {checkpoint['global_step']}:", *changes)


def differences(old: dict[str, Any], new: dict[str, Any], resolved: dict[str, Any]) -> list[str]:
    """Returns "key old → new" for each changed setting that affects the trained weights.

    A setting that was added or removed counts as unchanged if it is null or an interpolation, and so does one whose
    value was replaced by an interpolation of the same value.
    """
    after, values = _flat(new), _flat(resolved)
    before = {key: value for key, value in BEFORE.items() if key in after}
    before |= {RENAMED.get(key, key): value for key, value in _flat(old).items()}
    changed = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key) not in (after.get(key), values.get(key))
        and not _only_refers(before.get(key), after.get(key))
    ]
    return [f"{key} {before.get(key)} → {after.get(key)}" for key in changed if affects_weights(key, new)]


def _only_refers(before: Any, after: Any) -> bool:
    """Returns whether one value is absent and the other is an interpolation of a setting that is itself compared."""
    given = [value for value in (before, after) if value is not None]
    return len(given) == 1 and isinstance(given[0], str) and re.fullmatch(r"\$\{[\w.]+\}", given[0]) is not None


def affects_weights(key: str, settings: dict[str, Any]) -> bool:
    """Returns whether a different value of this setting leads to different trained weights."""
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
def _print_lines(*lines: str) -> None:
    print(*lines, sep="\n  ", flush=True)

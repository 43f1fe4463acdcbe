"""Validates the Trainer arguments under `trainer`, and names the setting that replaces an unsupported one."""

import difflib
from collections.abc import Mapping
from typing import Any

# Passed to the Trainer unchanged.
PASSED = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision"),
    *("max_steps", "min_steps", "max_epochs", "min_epochs"),
    *("limit_val_batches", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "inference_mode"),
    *("gradient_clip_val", "gradient_clip_algorithm", "sync_batchnorm"),
    *("deterministic", "benchmark", "detect_anomaly", "profiler"),
    *("log_every_n_steps", "enable_model_summary"),
)
OURS = ("max_time",)  # enforced by ldm.callbacks.checkpointing.time_limit, not by Lightning
REPLACEMENTS = {
    "accumulate_grad_batches": "set data.global_batch, from which gradient accumulation follows",
    "barebones": "a run always logs and saves; ldm bench train measures training speed",
    "callbacks": "add one as +callbacks.NAME._target_=CLASS",
    "default_root_dir": "set run_dir",
    "enable_autolog_hparams": "the settings are always logged, unless logger=none",
    "enable_checkpointing": "give ~callbacks.checkpoint to train without checkpoints",
    "enable_progress_bar": "give ~callbacks.progress to train without a progress bar",
    "fast_dev_run": "choose debug=fast, a short run with every part of a normal one",
    "limit_predict_batches": "a run predicts nothing; evaluation.prompts is the number of images sampled at the end",
    "limit_test_batches": "a run has no test set; evaluation.prompts is the number of images sampled at the end",
    "limit_train_batches": "set data.limit, which trains on the first samples only",
    "logger": "choose logger=tensorboard, csv, wandb or none",
    "model_registry": "checkpoints are written to run_dir/checkpoints only",
    "overfit_batches": "choose debug=overfit, or set data.limit, which trains on the first samples only",
    "plugins": "choose precision= or strategy=; clusters are detected, and ldm writes the checkpoints",
    "reload_dataloaders_every_n_epochs": "the data set does not change during a run, and is reshuffled each epoch",
    "use_distributed_sampler": "ldm always distributes the samples over the ranks",
}


def check_argument(name: str) -> None:
    """Raises ValueError for an argument that cannot be set under `trainer`, with what to set instead."""
    if name in REPLACEMENTS:
        raise ValueError(f"trainer.{name} is not supported: {REPLACEMENTS[name]}")
    if name not in (*PASSED, *OURS):
        close = difflib.get_close_matches(name, [*PASSED, *OURS], 1)
        hint = f"did you mean trainer.{close[0]}?" if close else f"choose from {', '.join(sorted((*PASSED, *OURS)))}"
        raise ValueError(f"there is no key trainer.{name}: {hint}")


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that would be ignored, on their own or in combination."""
    for name in settings:
        if name != "_target_":
            check_argument(name)
    for name in ("precision", "strategy"):
        if settings.get(name, "") is None:
            raise ValueError(f"trainer.{name} is null, which would leave it to Lightning: choose {name}=NAME")
    given = {name: value for name, value in settings.items() if value is not None}
    clip = given.get("gradient_clip_val")
    if clip is not None and not clip >= 0:
        raise ValueError(f"trainer.gradient_clip_val is {clip}, but must be positive, or null for no clipping")
    if "gradient_clip_algorithm" in given and not clip:
        raise ValueError(
            f"trainer.gradient_clip_algorithm={given['gradient_clip_algorithm']} has no effect without "
            "trainer.gradient_clip_val: give both or neither"
        )
    if isinstance(interval := given.get("val_check_interval"), str | Mapping):
        raise ValueError(
            f"trainer.val_check_interval is {interval}, but must be a number of batches, because otherwise ranks and "
            "resumed runs would not validate at the same steps"
        )
    profiler = given.get("profiler", {"dirpath": None})
    if isinstance(profiler, str) or ("dirpath" not in profiler and profiler["_target_"].startswith("lightning.")):
        raise ValueError(
            "trainer.profiler would not write its result anywhere: choose debug=profile, and for another profiler also "
            "trainer.profiler._target_=lightning.pytorch.profilers.CLASS"
        )
    _check_end(settings.get("max_steps"), settings.get("max_epochs"))


def _check_end(steps: Any, epochs: Any) -> None:
    """Raises ValueError if there is no last step, because learning-rate curves and the progress bar need it."""
    endless = -1, None
    if (steps == 0 or epochs == 0) or (steps in endless and epochs in endless) or steps is None:
        raise ValueError(
            f"trainer.max_steps is {steps} and trainer.max_epochs {epochs}, but a run needs a last step: give "
            "trainer.max_steps, or trainer.max_steps=-1 and trainer.max_epochs; trainer.max_time only interrupts a run "
            "until it is resumed"
        )

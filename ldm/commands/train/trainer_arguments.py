"""Which arguments of Lightning's Trainer a config sets under `trainer`, and what stands in for the others."""

import difflib
from collections.abc import Mapping
from typing import Any

# Passed on as they are.
PASSED = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision"),
    *("max_steps", "min_steps", "max_epochs", "min_epochs"),
    *("limit_val_batches", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "inference_mode"),
    *("gradient_clip_val", "gradient_clip_algorithm", "sync_batchnorm"),
    *("deterministic", "benchmark", "detect_anomaly", "profiler"),
    *("log_every_n_steps", "enable_model_summary"),
)
OURS = ("max_time",)  # which ldm.callbacks.checkpointing.time_limit enforces, not Lightning
ELSEWHERE = {
    "accumulate_grad_batches": "set data.global_batch, which is reached by accumulating gradients",
    "barebones": "a run always logs and saves; ldm bench train measures the speed of training",
    "callbacks": "add one as +callbacks.NAME._target_=CLASS",
    "default_root_dir": "set run_dir",
    "enable_autolog_hparams": "the settings are always logged, unless logger=none",
    "enable_checkpointing": "~callbacks.checkpoint trains without checkpoints",
    "enable_progress_bar": "~callbacks.progress trains without a progress bar",
    "fast_dev_run": "choose debug=fast, a short run that does all that a run does",
    "limit_predict_batches": "a run predicts nothing; evaluation.prompts is the number of images drawn at the end",
    "limit_test_batches": "a run has no test set; evaluation.prompts is the number of images drawn at the end",
    "limit_train_batches": "set data.limit, which trains on the first samples only",
    "logger": "choose logger=tensorboard, csv, wandb or none",
    "model_registry": "checkpoints are written to run_dir/checkpoints only",
    "overfit_batches": "choose debug=overfit, or set data.limit, which trains on the first samples only",
    "plugins": "choose precision= or strategy=; clusters are detected, and checkpoints are written by ldm",
    "reload_dataloaders_every_n_epochs": "the data set of a run does not change, and is shuffled anew each epoch",
    "use_distributed_sampler": "the samples are always dealt out to the ranks by ldm",
}


def check_argument(name: str) -> None:
    """Raises ValueError for an argument that is not set under `trainer`, with what to set instead."""
    if name in ELSEWHERE:
        raise ValueError(f"trainer.{name} is not a setting here: {ELSEWHERE[name]}")
    if name not in (*PASSED, *OURS):
        close = difflib.get_close_matches(name, [*PASSED, *OURS], 1)
        hint = f"did you mean trainer.{close[0]}?" if close else f"there are: {', '.join(sorted((*PASSED, *OURS)))}"
        raise ValueError(f"there is no key trainer.{name}; {hint}")


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that would be ignored, by themselves or beside others."""
    for name in settings:
        if name != "_target_":
            check_argument(name)
    for name in ("precision", "strategy"):
        if settings.get(name, "") is None:
            raise ValueError(f"trainer.{name} is null, which leaves it to Lightning: choose {name}=NAME")
    given = {name: value for name, value in settings.items() if value is not None}
    clip = given.get("gradient_clip_val")
    if clip is not None and not clip >= 0:
        raise ValueError(f"trainer.gradient_clip_val is {clip}, but must be positive, or null for no clipping")
    if "gradient_clip_algorithm" in given and not clip:
        raise ValueError(
            f"trainer.gradient_clip_algorithm={given['gradient_clip_algorithm']} clips nothing without "
            "trainer.gradient_clip_val: give both or neither"
        )
    if isinstance(interval := given.get("val_check_interval"), str | Mapping):
        raise ValueError(
            f"trainer.val_check_interval is {interval}, but must be a number of batches: ranks and resumed runs would "
            "not validate at the same steps"
        )
    profiler = given.get("profiler", {"dirpath": None})
    if isinstance(profiler, str) or ("dirpath" not in profiler and profiler["_target_"].startswith("lightning.")):
        raise ValueError(
            "trainer.profiler would not write its result anywhere: choose debug=profile, and for another profiler "
            "trainer.profiler._target_=lightning.pytorch.profilers.CLASS too"
        )
    _check_end(settings.get("max_steps"), settings.get("max_epochs"))


def _check_end(steps: Any, epochs: Any) -> None:
    """Raises ValueError where there is no last step: learning-rate curves and the progress bar need to know it."""
    endless = -1, None
    if (steps == 0 or epochs == 0) or (steps in endless and epochs in endless) or steps is None:
        raise ValueError(
            f"trainer.max_steps is {steps} and trainer.max_epochs {epochs}, but a run needs a last step: give "
            "trainer.max_steps, or trainer.max_steps=-1 and trainer.max_epochs; trainer.max_time only says after what "
            "time to stop until resume=auto"
        )

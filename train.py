"""Train a model: python train.py [experiment=NAME] [group=option …] [key=value …]; -m sweeps, --help lists groups."""

import logging
import os
import re
import sys
import traceback
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.callbacks.interruption import TIMEOUT
from ldm.config import (
    check_given,
    check_parallel,
    check_settings,
    hyperparameters,
    is_refusal,
    save_run,
    sentence,
    sweep_folder,
    sweep_label,
    waiting,
)
from ldm.overrides import check_overrides
from ldm.report.runs import is_finished

CONF = Path(__file__).parent / "conf"


def train(config: DictConfig) -> None:
    """Builds what the config says and runs it."""
    import torch
    from lightning import seed_everything
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    from ldm.callbacks.beginning import Beginning
    from ldm.callbacks.changes import Changes
    from ldm.callbacks.checkpoint import AtomicCheckpointIO
    from ldm.callbacks.effective import Effective
    from ldm.callbacks.hyperparameters import Hyperparameters
    from ldm.callbacks.time_limit import TimeLimit
    from ldm.training.diffusion import DiffusionTraining

    run_dir = Path(config.run_dir)
    if config.plan:
        from ldm.plan import print_plan

        lint(config)
        return print_plan(dict(OmegaConf.to_container(config, resolve=True)))  # type: ignore[arg-type]
    check_given(config)
    config.precision.name = config.precision.name  # in place of precision=auto, what it came to on this machine
    settings: Any = OmegaConf.to_container(config)  # before it is resolved, so that each is told once
    OmegaConf.resolve(config)
    resolved: Any = OmegaConf.to_container(config)
    lint(config)
    check_parallel(config, torch.cuda.is_available())
    quieten()
    torch.set_float32_matmul_precision("high")
    seed_everything(config.seed, verbose=False)

    limit = [TimeLimit(config.trainer.max_time)] if config.trainer.get("max_time") is not None else []
    module = build(config.training)
    data = build(config.data.module)
    resumed = checkpoint(config.resume, run_dir)

    def begin() -> None:
        save_run(config, run_dir)
        print(f"run folder: {run_dir}" + (f", going on from {resumed}" if resumed else ""), flush=True)

    beginning = Beginning(begin)
    chosen = chosen_callbacks(config)
    if isinstance(module, DiffusionTraining):
        check_drawn_size(config, module, data, chosen)
    told = Hyperparameters(hyperparameters(settings), run_dir)  # last, as the end's metrics are others' work
    trainer = build(
        config.trainer,
        callbacks=[Effective(), beginning, Changes(settings, resolved, config.accept_changes), *limit, *chosen, told],
        logger=[build(node) for node in config.logger],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run_dir),
        max_time=None,  # TimeLimit's: after Lightning's own a run would count as finished
        use_distributed_sampler=False,  # the data module deals samples out to the ranks itself
        enable_checkpointing=any(isinstance(one, Checkpoint) for one in chosen),  # else Lightning adds its own
        enable_progress_bar=any(isinstance(one, ProgressBar) for one in chosen),
    )
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    if resumed and trainer.global_step == beginning.step:
        steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        done = f"{trainer.global_step} steps" if steps else f"{trainer.max_epochs} epochs"
        print(f"{resumed} has done its {done}; raise trainer.max_{'steps' if steps else 'epochs'} to train further")


def build(node: Any, **more: Any) -> Any:
    """The object that a part of the config describes."""
    return instantiate(node, **more, _convert_="all")


def chosen_callbacks(config: DictConfig) -> list[Any]:
    """Those of the groups ema, callbacks and metrics, of which the options none have no target."""
    for name, node in config.callbacks.items():
        if node is not None and not (isinstance(node, DictConfig) and "_target_" in node):
            raise ValueError(f"callbacks.{name} has no _target_, so that it would be ignored: name its class")
    nodes = (config.ema, *config.callbacks.values(), config.get("evaluation"))
    return [build(node) for node in nodes if node and "_target_" in node]


def check_drawn_size(config: DictConfig, module: Any, data: Any, callbacks: list[Any]) -> None:
    """Refuses images, or a schedule, for another size than training.size, which the run draws and evaluates."""
    from ldm.callbacks.evaluation import Evaluation
    from ldm.data.sizes import check_sizes

    (height, width), factor = module.size, module.first_stage.factor
    datasets = {} if data.bucketed else {"data.module.train": data.train.dataset}
    if not data.bucketed:
        datasets |= {f"data.module.val.{name}": dataset for name, dataset in data.val.items()}
    for callback in callbacks:
        if isinstance(callback, Evaluation) and callback.prompts:
            datasets["evaluation.reference"] = callback.reference
    check_sizes(datasets, (height, width), factor)
    latent = height * width // factor**2
    if config.schedule.get("positions", latent) != latent:
        raise ValueError(
            f"schedule.positions is {config.schedule.positions}, but a latent of training.size={[height, width]} has "
            f"{latent} positions: set schedule.positions={latent}"
        )


def lint(config: DictConfig) -> None:
    """Refuses, before any network is built or folder made, settings that contradict one another."""
    from torch import nn, zeros

    from ldm.lint import Setup, check
    from ldm.settings import Settings

    check_settings(config)
    build(config.optimizer)([nn.Parameter(zeros(1))])  # which refuses what it does not take
    evaluation: Any = config.get("evaluation") or {}
    if evaluation.get("prompts") and "_target_" not in evaluation:
        raise ValueError(
            f"evaluation.prompts={evaluation.prompts} asks for pictures at the end, which metrics=none does not "
            "draw: choose metrics=shapes or metrics=pictures, or leave it out"
        )
    if "schedule" not in config.training:
        return
    parts = [build(config[name]) for name in ("schedule", "prediction", "weighting")]
    training: Any = OmegaConf.to_container(config.training, resolve=True)
    known = [one.name for one in fields(Settings) if one.name != "size"]
    if unknown := sorted({*training["sampling"]} - {*known}):
        raise ValueError(f"training.sampling.{unknown[0]} is no setting of sampling; there are: {', '.join(known)}")
    told = {name: training[name] for name in ("time", "sampling", "offset_noise", "caption_dropout")}
    check(Setup(*parts, **told))


def checkpoint(resume: str | None, run_dir: Path) -> str | None:
    """The file to go on from: the run's own for auto, if there is one."""
    from ldm.callbacks.checkpoint_file import newest

    if resume is None and list(run_dir.glob("checkpoints/*.ckpt")):
        raise ValueError(f"{run_dir} holds a run already; go on with resume=auto, or give another run_dir")
    if resume in (None, "auto"):
        return str(found) if (found := newest(run_dir / "checkpoints")) else None
    if not Path(str(resume)).is_file():
        raise FileNotFoundError(f"resume={resume}: there is no such checkpoint; give a .ckpt file, or resume=auto")
    return resume


def quieten() -> None:
    """Keeps advice on settings that are as they should be off the screen, and warnings to one line each."""
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated")  # within Lightning 2.6
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def in_sweep(config: DictConfig) -> Path:
    """Gives the run of a sweep its folder, named by what decides its result, in which it goes on."""
    hydra_config = HydraConfig.get()
    check_given(config)
    run_dir = sweep_folder(config, Path(hydra_config.sweep.dir), sweep_label(hydra_config))
    OmegaConf.update(config, "run_dir", str(run_dir))
    if config.resume is None or [*run_dir.glob("checkpoints/*.ckpt")]:  # another run's checkpoint only begins this one
        OmegaConf.update(config, "resume", "auto")
    # the run's own command, whichever process its launcher runs it in, and what its other ranks are started by
    own = f"run_dir='{run_dir}'", f"resume='{config.resume}'"
    sys.argv = [os.path.relpath(CONF.parent / "train.py"), *hydra_config.overrides.task, *own]
    sys.modules["__main__"].__spec__ = None  # that of a launcher's worker, which Lightning would start the ranks by
    return run_dir


def forget_ranks(environment: dict[str, str]) -> None:
    """Takes back what a run on several ranks leaves in this process, and the next run of a sweep would take for its."""
    if os.environ == environment:
        return
    from torch import distributed

    os.environ.clear()
    os.environ.update(environment)
    if distributed.is_initialized():
        distributed.destroy_process_group()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    sweep, environment = HydraConfig.get().mode == RunMode.MULTIRUN, dict(os.environ)
    try:
        if sweep and is_finished(in_sweep(config)):
            return print(f"{config.run_dir} is finished, and not run again")
        train(config)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        if not sweep or stop.code != TIMEOUT:
            raise
        raise CompactHydraException(f"{config.run_dir}: stopped by trainer.max_time; the same sweep goes on") from None
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") or not is_refusal(error):
            traceback.print_exc()
        told = f"error: {config.run_dir + ': ' if sweep else ''}{sentence(error)}"
        if sweep:  # Hydra runs the other jobs, then tells once more of the first that failed, and exits with 1
            print(told, file=sys.stderr, flush=True)
            raise CompactHydraException(told) from None
        sys.exit(told)
    finally:
        if sweep:
            waiting(Path(config.run_dir)).unlink(missing_ok=True)
            forget_ranks(environment)


if __name__ == "__main__":
    # to Hydra a number is no name of an option
    sys.argv[1:] = [re.sub(r"\b32\b", "fp32", word) if word.startswith("precision=") else word for word in sys.argv[1:]]
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # Hydra wants it at an end
    try:
        check_overrides(sys.argv[1:], CONF)
    except (ValueError, HydraException) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    main()

"""Train a model: python train.py [experiment=NAME] [group=option …] [key=value …]; -m sweeps, --help lists groups."""

import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.config import (
    check_given,
    check_overrides,
    check_parallel,
    hyperparameters,
    is_refusal,
    save_run,
    sentence,
    sweep_folder,
    sweep_label,
    waiting,
)
from ldm.report.runs import is_finished

CONF = Path(__file__).parent / "conf"


def train(config: DictConfig) -> None:
    """Builds what the config says and runs it."""
    import torch
    from lightning import Trainer, seed_everything
    from lightning.pytorch.callbacks import LambdaCallback

    from ldm.callbacks.changes import Changes
    from ldm.callbacks.checkpoint import AtomicCheckpointIO
    from ldm.callbacks.hyperparameters import Hyperparameters

    run_dir = Path(config.run_dir)
    if config.plan:
        from ldm.plan import print_plan

        lint(config)
        return print_plan(dict(OmegaConf.to_container(config, resolve=True)))  # type: ignore[arg-type]
    check_given(config)
    config.precision.name = config.precision.name  # in place of precision=auto, what it came to on this machine
    settings: Any = OmegaConf.to_container(config)  # before it is resolved, so that each is told once
    OmegaConf.resolve(config)
    check_parallel(config, torch.cuda.is_available())
    quieten()
    torch.set_float32_matmul_precision("high")
    seed_everything(config.seed, verbose=False)

    lint(config)
    module = training(config.training)
    data = build(config.data.module)
    resumed = checkpoint(config.resume, run_dir)

    def begin(trainer: Trainer, _: Any) -> None:  # not before: a checkpoint that does not fit is refused by then
        if trainer.is_global_zero:
            save_run(config, run_dir)
            print(f"run folder: {run_dir}" + (f", going on from {resumed}" if resumed else ""), flush=True)

    nodes = (config.ema, *config.callbacks.values(), config.get("evaluation"))
    callbacks = [build(node) for node in nodes if node and "_target_" in node]  # an option none has no target
    told = Hyperparameters(hyperparameters(settings), run_dir)  # last, as the end's metrics are others' work
    trainer = build(
        config.trainer,
        callbacks=[LambdaCallback(on_fit_start=begin), Changes(settings, config.accept_changes), *callbacks, told],
        logger=[build(node) for node in config.logger],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run_dir),
    )
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    if resumed and not trainer.callback_metrics:
        print(f"{resumed} has done its {trainer.global_step} steps; raise trainer.max_steps to train further")


def training(node: DictConfig) -> Any:
    """The module that trains: its network starts from the weights of `start`, if given, and is adapted."""
    parts: dict[str, Any] = {}
    start = node.start if "start" in node else None
    if "backbone" in node:
        from ldm.training.start import start_from

        backbone, adapter = build(node.backbone), build(node.adapter) if node.adapter else None
        base = start_from(backbone, start) if start else None
        if adapter is not None:
            adapter.adapt(backbone)
        parts = {"backbone": backbone, "base": base, "adapter": adapter}
    elif "vae" in node:
        from ldm.training.start import first_stage_from

        parts = {"vae": first_stage_from(build(node.vae), start, node.decoder_only)}
    return build({key: value for key, value in node.items() if key not in {"start", *parts}}, **parts)


def build(node: Any, **more: Any) -> Any:
    """The object that a part of the config describes."""
    return instantiate(node, **more, _convert_="all")


def lint(config: DictConfig) -> None:
    """Refuses, before any network is built or folder made, settings that contradict one another."""
    from torch import nn, zeros

    from ldm.lint import Setup, check

    build(config.optimizer)([nn.Parameter(zeros(1))])  # which refuses what it does not take
    if config.adapter and "backbone" not in config.training:
        raise ValueError("an adapter changes a denoising network, which this experiment does not train: leave it out")
    evaluation = config.get("evaluation", {})
    if evaluation.get("prompts") and "_target_" not in evaluation:
        raise ValueError(
            f"evaluation.prompts={evaluation.prompts} asks for pictures at the end, which metrics=none does not "
            "draw: choose metrics=shapes or metrics=pictures, or leave it out"
        )
    if "schedule" not in config.training:
        return
    parts = [build(config[name]) for name in ("schedule", "prediction", "weighting")]
    training: Any = OmegaConf.to_container(config.training, resolve=True)
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
    OmegaConf.update(config, "resume", config.resume or "auto")
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

"""Refuses configs that contradict themselves, before any network is built or folder made."""

from dataclasses import fields
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from ldm.commands.train.build import build
from ldm.commands.train.consistency import disagreements
from ldm.commands.train.trainer_arguments import check_trainer
from ldm.report.runs import flatten


def check(config: DictConfig) -> None:
    """Refuses, before any network is built or folder made, settings that contradict one another."""
    from torch import nn, zeros

    from ldm.pipeline.settings import Settings
    from ldm.sampling.compatibility import Setup, check

    check_settings(config)
    build(config.optimizer)([nn.Parameter(zeros(1))])  # which refuses what it does not take
    if config.adapter and "backbone" not in config.training:
        raise ValueError("an adapter changes a denoising network, which this experiment does not train: leave it out")
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


def check_given(config: DictConfig) -> None:
    """Refuses a config in which a key that has no default was not given."""
    for key, value in flatten(OmegaConf.to_container(config)).items():
        if value == MISSING:
            raise ValueError(f"{key} has no default; give it as {key}=…")


def check_settings(config: DictConfig) -> None:
    """Refuses arguments of the Trainer that would be ignored, and settings that differ from those that they follow."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    check_trainer(plain["trainer"])
    if found := disagreements(plain):
        raise ValueError("; ".join(found))


def check_parallel(config: DictConfig, gpu: bool) -> None:
    """Refuses what the device, or strategy=fsdp, cannot do."""
    if "largest_batch" in config.callbacks and (config.trainer.accelerator == "cpu" or not gpu):
        raise ValueError(
            "debug=batch_size fills the memory of a GPU, and a process that fills the machine's is killed: use "
            "debug=plan, which computes what fits"
        )
    if str(config.trainer.precision).startswith("16") and (config.trainer.accelerator == "cpu" or not gpu):
        raise ValueError("precision=16-mixed needs a GPU; choose precision=bf16-mixed or precision=fp32")
    check_base_dtype(config)
    if config.precision.compute and "compute" not in config.training:
        raise ValueError("precision=bf16-true is for training=diffusion; choose precision=bf16-mixed")
    if isinstance(config.trainer.strategy, str) or "ModelParallel" not in config.trainer.strategy["_target_"]:
        return
    if "compute" not in config.training:
        raise ValueError("strategy=fsdp is for training=diffusion; choose strategy=ddp")
    if config.optimizer["_target_"].endswith("Muon"):
        raise ValueError("optimizer=muon needs whole matrices, and strategy=fsdp cuts them up; choose optimizer=adamw")
    if (config.get("evaluation") or {}).get("prompts"):
        raise ValueError(
            "with strategy=fsdp no process holds the weights that the evaluation at the end draws with; give "
            "metrics=none, and measure the run with ldm evaluate"
        )


def check_base_dtype(config: DictConfig) -> None:
    """Refuses frozen weights in another type where nothing casts the inputs to it, or where FSDP2 would mix types."""
    dtype = (config.adapter or {}).get("base_dtype")
    if dtype in (None, "float32"):
        return
    if not str(config.trainer.precision).endswith("-mixed"):
        raise ValueError(
            f"adapter.base_dtype={dtype} needs a precision that casts the inputs, not {config.trainer.precision}: "
            "choose precision=bf16-mixed, or 16-mixed on a GPU"
        )
    if not isinstance(config.trainer.strategy, str) and "ModelParallel" in config.trainer.strategy["_target_"]:
        raise ValueError(f"strategy=fsdp takes weights of one type only: leave out adapter.base_dtype={dtype}")


def check_drawn_size(config: DictConfig, module: Any, data: Any, callbacks: list[Any]) -> None:
    """Refuses images, or a schedule, for another size than training.size, which the run draws and evaluates."""
    from ldm.callbacks.images.evaluation import Evaluation
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

"""Checks a config for contradictory settings before any network is built or folder created."""

from dataclasses import fields
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from ldm.commands.train.build import build
from ldm.commands.train.consistency import disagreements
from ldm.commands.train.trainer_arguments import check_trainer
from ldm.report.runs import flatten

MAX_SEED = 2**32 - 1  # of NumPy's global generator, which Lightning seeds, too
START = "${oc.select:training.start}"  # weights that are read from the model that training starts from


def check(config: DictConfig) -> None:
    """Raises ValueError for settings that contradict each other."""
    from torch import nn, zeros

    from ldm.device import preferred_attention
    from ldm.pipeline.settings import Settings
    from ldm.sampling.compatibility import Setup, check

    check_settings(config)
    if not 0 <= config.seed <= MAX_SEED:
        raise ValueError(f"seed is {config.seed}, but must be an integer from 0 to {MAX_SEED}")
    preferred_attention(config.get("attention"))  # raises for an unknown name
    build(config.optimizer)([nn.Parameter(zeros(1))])  # raises for invalid arguments
    if config.adapter and "backbone" not in config.training:
        raise ValueError("an adapter needs a denoising network, but this experiment trains none: choose adapter=none")
    evaluation: Any = config.get("evaluation") or {}
    if evaluation.get("prompts") and "_target_" not in evaluation:
        raise ValueError(
            f"evaluation.prompts={evaluation.prompts} asks for images at the end, but metrics=none generates none: "
            "choose metrics=shapes or metrics=pictures, or leave it out"
        )
    if "schedule" not in config.training:
        return
    parts = [build(config[name]) for name in ("schedule", "prediction", "weighting")]
    training: Any = OmegaConf.to_container(config.training, resolve=True)
    known = [field.name for field in fields(Settings) if field.name != "size"]
    if unknown := sorted({*training["sampling"]} - {*known}):
        raise ValueError(
            f"training.sampling.{unknown[0]} is not a sampling setting: the settings are {', '.join(known)}"
        )
    options = {name: training[name] for name in ("time", "sampling", "offset_noise", "caption_dropout")}
    check(Setup(*parts, **options))


def check_given(config: DictConfig) -> None:
    """Raises ValueError if a key without a default was not given."""
    values = flatten(OmegaConf.to_container(config))
    for key, value in values.items():
        if value == START and values.get("training.start") is None:  # ??? in an experiment does not replace null
            key, value = "training.start", MISSING
        if value == MISSING:
            raise ValueError(f"{key} has no default: give {key}=…")


def check_settings(config: DictConfig) -> None:
    """Raises ValueError for Trainer arguments that would be ignored, and for settings that must agree but differ."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    check_trainer(plain["trainer"])
    if messages := disagreements(plain):
        raise ValueError("; ".join(messages))


def check_parallel(config: DictConfig, gpu: bool) -> None:
    """Raises ValueError for settings that the device or strategy=fsdp does not support."""
    from ldm.device import NO_MPS

    if config.trainer.accelerator == "mps":
        raise ValueError(f"trainer.accelerator=mps is not supported, because {NO_MPS}: set trainer.accelerator=cpu")
    if config.trainer.accelerator in ("gpu", "cuda") and not gpu:
        raise ValueError(
            f"trainer.accelerator={config.trainer.accelerator} needs a GPU, but torch finds none on this machine: "
            "leave it out, or install a build of torch for the GPU"
        )
    if "largest_batch" in config.callbacks:
        check_largest_batch(config.trainer, gpu)
    if str(config.trainer.precision).startswith("16") and (config.trainer.accelerator == "cpu" or not gpu):
        raise ValueError("precision=16-mixed needs a GPU: choose precision=bf16-mixed or precision=fp32")
    check_base_dtype(config)
    if config.precision.compute and "compute" not in config.training:
        raise ValueError("precision=bf16-true requires training=diffusion: choose precision=bf16-mixed")
    if isinstance(config.trainer.strategy, str) or "ModelParallel" not in config.trainer.strategy["_target_"]:
        return
    if "compute" not in config.training:
        raise ValueError("strategy=fsdp requires training=diffusion: choose strategy=ddp")
    if config.optimizer["_target_"].endswith("Muon"):
        raise ValueError("optimizer=muon needs full matrices, but strategy=fsdp shards them: choose optimizer=adamw")
    if (config.get("evaluation") or {}).get("prompts"):
        raise ValueError(
            "strategy=fsdp shards the weights, but the evaluation at the end samples on one process: give "
            "metrics=none, and evaluate the run with ldm evaluate"
        )


def check_largest_batch(trainer: DictConfig, gpu: bool) -> None:
    """Raises ValueError for a search for the largest batch without a GPU, or on several."""
    if trainer.accelerator == "cpu" or not gpu:
        raise ValueError(
            "debug=batch_size needs a GPU, because a process that fills the memory of the machine is killed: use "
            "debug=plan, which computes what fits"
        )
    devices = len(trainer.devices) if isinstance(trainer.devices, ListConfig) else trainer.devices
    if str(devices) != "1" or trainer.num_nodes != 1 or trainer.strategy != "auto":
        raise ValueError(
            "debug=batch_size searches on one GPU, because each GPU of a distributed run has a batch of its own: leave "
            "out strategy, trainer.devices and trainer.num_nodes; for strategy=fsdp use debug=plan"
        )


def check_base_dtype(config: DictConfig) -> None:
    """Raises ValueError for frozen weights of a type that inputs are not cast to, or that FSDP2 would mix."""
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


def check_sampling_size(config: DictConfig, module: Any, data: Any, callbacks: list[Any]) -> None:
    """Raises ValueError if data or schedule are for another size than training.size, the size of sampled images."""
    from ldm.callbacks.images.evaluation import Evaluation
    from ldm.data.sizes import check_sizes
    from ldm.training.diffusion import DiffusionTraining

    if not isinstance(module, DiffusionTraining):  # which alone samples images
        return
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
            f"schedule.positions is {config.schedule.positions}, but latents of training.size={[height, width]} have "
            f"{latent} positions: set schedule.positions={latent}"
        )

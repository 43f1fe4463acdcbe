"""Train a model: python train.py [experiment=NAME] [group=option …] [key=value …]; -m sweeps, --help lists groups."""

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ldm.config import check_overrides, save_run, sentence

CONF = Path(__file__).parent / "conf"
failed: list[str] = []  # of a sweep: what each failing job said


def train(config: DictConfig) -> None:
    """Builds what the config says and runs it."""
    import torch
    from hydra.utils import instantiate
    from lightning import seed_everything

    from ldm.callbacks.checkpoint import AtomicCheckpointIO
    from ldm.lint import contradictions

    run_dir = Path(config.run_dir)
    if config.plan:
        from ldm.plan import print_plan

        return print_plan(OmegaConf.to_container(config, resolve=True))
    OmegaConf.resolve(config)
    import logging

    logging.getLogger("lightning").setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("high")
    seed_everything(config.seed, verbose=False)

    def build(node: Any, **more: Any) -> Any:
        return instantiate(node, **more, _convert_="all")

    if "schedule" in config.training:
        parts = (build(config[name]) for name in ("schedule", "prediction", "weighting"))
        if found := contradictions(*parts, spacing=config.sampler.spacing):
            raise ValueError("; ".join(found))
    module = build(config.training)
    data = build(config.data.module)
    callbacks = [build(node) for node in (config.ema, *config.callbacks.values(), config.get("evaluation")) if node]
    trainer = build(
        config.trainer,
        callbacks=callbacks,
        logger=[build(node) for node in config.logger],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run_dir),
    )
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    save_run(config, run_dir)
    trainer.fit(module, data, ckpt_path=checkpoint(config.resume, run_dir), weights_only=True)


def checkpoint(resume: str | None, run_dir: Path) -> str | None:
    """The file to go on from: the run's own for auto, if there is one."""
    last = run_dir / "checkpoints" / "last.ckpt"
    if resume in (None, "auto"):
        return str(last) if resume and last.is_file() else None
    if not Path(str(resume)).is_file():
        raise FileNotFoundError(f"resume={resume}: there is no such checkpoint; give a .ckpt file, or resume=auto")
    return resume


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep:
        OmegaConf.update(config, "run_dir", HydraConfig.get().runtime.output_dir)
    try:
        train(config)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            traceback.print_exc()
        print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
        if not sweep:
            sys.exit(1)
        failed.append(f"{config.run_dir}: {sentence(error)}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="lightning")
    try:
        check_overrides(sys.argv[1:], CONF)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    main()
    if failed:
        print(f"{len(failed)} jobs of the sweep failed:", *failed, sep="\n  ", file=sys.stderr)
        sys.exit(1)

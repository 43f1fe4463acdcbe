"""Rehearses a run: it is stopped by a signal, resumed and exported, with small networks in place of large ones."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.commands.train.build import build
from ldm.report.runs import is_finished

SMALL_VAE = {"widths": [16, 32, 32, 32], "blocks": 1, "groups": 8}
SMALL_TEXT = {"layers": 2}  # of the full width, which the network reads
SMALLER, SMALLEST = 4, 64  # by what the size of images is divided, and the smallest size and its step in pixels


def rehearse(config: DictConfig, train: Callable[[DictConfig], None]) -> None:
    """Calls `train` until the signal of RehearsedStop, and again to resume.

    With rehearsal=small the model to start from and the frozen parts are small random ones, which are written to the
    run's folder, and images are a quarter of their size; a cache of latents keeps its size and its first stage.
    """
    from ldm.callbacks.checkpointing.rehearsed_stop import STOP

    config = copy.deepcopy(config)
    config.run_dir = str(config.run_dir)  # the default contains the time, and both parts need the same folder
    if config.rehearsal == "small":
        _use_small_model(config)
    try:
        train(copy.deepcopy(config))
        return  # a finished rehearsal that is resumed
    except SystemExit as stop:
        if stop.code != 128 + STOP:
            raise
    config.resume = "auto"
    train(config)
    files = sorted(path.name for path in Path(config.run_dir).glob("*.safetensors"))
    if is_finished(Path(config.run_dir)):
        print(f"rehearsed: stopped by {STOP.name}, resumed, finished and exported {', '.join(files)}", flush=True)


def _use_small_model(config: DictConfig) -> None:
    """Replaces training.start, and the frozen parts that have the sizes of Stable Diffusion, by a small model.

    Images become smaller, too, unless they are those of a cache.
    """
    folder = Path(config.run_dir) / "rehearsal"
    data: Any = OmegaConf.to_container(config.data)
    cached = "cache" in data
    if not cached:
        sizes = (SMALLEST * max(1, side // SMALLER // SMALLEST) for side in config.training.size)
        config.training.size = [*sizes]
    states = cached and "text_encoder" in data["module"]["train"]["dataset"]
    if "config" in config.first_stage and not (cached and _is_given(config.first_stage, "weights")):
        config.first_stage.weights = str(_save_vae(folder, config))
    if "config" in config.text_encoder and not states:
        config.text_encoder.weights = str(_save_text_tower(folder, config))
    if OmegaConf.is_missing(config.training, "start") or config.training.start is not None:
        config.training.start = str(_save_denoiser(folder, config))


def _is_given(node: DictConfig, key: str) -> bool:
    try:
        return node[key] is not None
    except OmegaConfBaseException:  # ???, or an interpolation of it
        return False


def _save_vae(folder: Path, config: DictConfig) -> Path:
    from ldm.nn.vae import VAE

    settings: Any = {**config.first_stage.config, **SMALL_VAE}
    return _save(folder / "vae.safetensors", "vae", _seeded(lambda: VAE(**settings)))


def _save_text_tower(folder: Path, config: DictConfig) -> Path:
    from ldm.nn.clip import TextTower

    settings: Any = {**config.text_encoder.config, **SMALL_TEXT}
    return _save(folder / "text_tower.safetensors", "text_tower", _seeded(lambda: TextTower(**settings)))


def _save_denoiser(folder: Path, config: DictConfig) -> Path:
    """Saves a network to start from; that of an inpainting network reads no mask, unless an adapter is trained."""
    from ldm.weights.model import save_model
    from ldm.weights.parts import first_stage, text_encoder

    model: Any = OmegaConf.to_container(config.model, resolve=True)
    if config.adapter is None and "in_channels" in model:
        model["in_channels"] = model["out_channels"]
    network = _seeded(lambda: build(OmegaConf.create(model)))
    parts: dict[str, Callable[[str], Any]] = {"first_stage": first_stage, "text_encoder": text_encoder}
    sources = {name: part(config[name].weights).source for name, part in parts.items()}
    settings: Any = OmegaConf.to_container(config.training, resolve=True)
    about = {
        "schedule": build(config.schedule).config,
        "prediction": build(config.prediction).name,
        "time": settings["time"],
        "size": settings["size"],
        "sampling": settings["sampling"],
        **sources,
    }
    path = folder / "unet.safetensors"
    save_model(path, network.state_dict(), {"kind": network.kind, "config": network.config, "model": about})
    return path


def _save(path: Path, kind: str, network: Any) -> Path:
    from ldm.weights.native import save_network

    save_network(path, kind, network.config, network.state_dict())
    return path


def _seeded(make: Callable[[], Any]) -> Any:
    """Builds a network with random weights that are the same each time, and on every rank."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()

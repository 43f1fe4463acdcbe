"""The contents of a diffusion run's checkpoint: the trained weights and a description of the model."""

from typing import Any

from torch import Tensor

from ldm.training.trained_model import PREFIX, TrainedModel

OLD_PREFIX = "unet."  # prefix of the network's weights in version 0.1


def reduce_checkpoint(checkpoint: dict[str, Any], model: TrainedModel) -> None:
    """Removes frozen weights from a checkpoint that is about to be saved, and adds the description of the model."""
    frozen = model.frozen()
    checkpoint["state_dict"] = {k: tensor for k, tensor in checkpoint["state_dict"].items() if k not in frozen}
    checkpoint["ldm"] = model.about()
    if model.trains_text:
        checkpoint["ldm"]["model"]["text_encoder"] = {**model.sources["text_encoder"], "trained": True}


def complete_checkpoint(checkpoint: dict[str, Any], model: TrainedModel, state: dict[str, Tensor]) -> None:
    """Adds the frozen weights of `state` to a loaded checkpoint. Raises ValueError if it is of another model."""
    if "ldm" not in checkpoint:
        raise ValueError("the checkpoint is not from a diffusion run: give resume= the last.ckpt of one")
    ours, theirs = _decisive(model.about()), _decisive(checkpoint["ldm"])
    names = dict.fromkeys([*ours, *theirs])
    changed = [f"{n} {theirs.get(n)} → {ours.get(n)}" for n in names if theirs.get(n) != ours.get(n)]
    if changed:
        raise ValueError(
            f"the checkpoint contains a different model than this config builds ({'; '.join(changed)}): resume "
            "with the settings, and the version of ldm, that it was trained with"
        )
    saved = {_renamed(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    checkpoint["state_dict"] = {name: state[name] for name in model.frozen()} | saved


def _renamed(name: str) -> str:
    """Returns the current state dict name of a checkpoint's tensor, also for checkpoints of version 0.1."""
    return PREFIX + name.removeprefix(OLD_PREFIX) if name.startswith(OLD_PREFIX) else name


def _decisive(about: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that must not change when a run resumes: networks, adapter and prediction."""
    model = about["model"]
    parts = {name: model[name]["fingerprint"] for name in ("first_stage", "text_encoder")}
    diffusion = {name: model[name] for name in ("schedule", "prediction", "time")}
    base = {"base": about["base"]["fingerprint"]} if "base" in about else {}
    return {"kind": about["kind"], **about["config"], **base, **diffusion, **parts}

"""Optimizers from optional packages: 8-bit AdamW (bitsandbytes) and Prodigy (prodigyopt)."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim import Optimizer

# Prodigy's state of the step size, which it stores among the hyperparameters of each parameter group.
PRODIGY_STATE = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")


def adamw_8bit(params: Iterable[nn.Parameter], **settings: Any) -> Optimizer:
    """Returns AdamW with 8-bit moments, in blocks of 256 that each have a scale (Dettmers et al. 2022).

    The moments of weights with fewer than 4,096 elements stay in float32.
    """
    module = _module("bitsandbytes.optim", "adamw_8bit", "bitsandbytes", "8bit")
    return _built(module.AdamW8bit, params, settings)


def prodigy(params: Iterable[nn.Parameter], **settings: Any) -> Optimizer:
    """Returns Prodigy, an Adam that estimates its step size (Mishchenko & Defazio 2024), which `lr` multiplies.

    The optimizer's attribute `learned` lists the values in its parameter groups that are state, not hyperparameters.
    """
    optimizer = _built(_module("prodigyopt", "prodigy", "prodigyopt", "prodigy").Prodigy, params, settings)
    if len({group["lr"] for group in optimizer.param_groups}) > 1:
        raise ValueError(
            "optimizer=prodigy has one step size for all weights: set training.text_encoder_lr to optimizer.lr"
        )
    optimizer.learned = PRODIGY_STATE  # type: ignore[attr-defined]
    return optimizer


def _module(name: str, option: str, package: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"optimizer={option} needs the package {package}, which cannot be imported ({error}): "
            f"pip install 'ldm[{extra}]', or choose optimizer=adamw"
        ) from error


def _built(make: Any, params: Iterable[nn.Parameter], settings: dict[str, Any]) -> Optimizer:
    try:
        return make(list(params), **settings)
    except TypeError as error:
        raise ValueError(f"the optimizer cannot be built with {settings}: {error}") from error

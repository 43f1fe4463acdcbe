"""Instantiates the objects that a config describes."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig


def build(node: Any, **more: Any) -> Any:
    """Instantiates a config node."""
    return instantiate(node, **more, _convert_="all")


def build_training(node: DictConfig) -> Any:
    """Builds the LightningModule; its network starts from the weights of `start`, if given, and is adapted."""
    parts: dict[str, Any] = {}
    start = node.start if "start" in node else None
    if "backbone" in node:
        from ldm.adapters.text import train_all
        from ldm.training.start import check_adaptable, start_from
        from ldm.training.trained_model import trains_text_encoder

        backbone, adapter = build(node.backbone), build(node.adapter) if node.adapter else None
        base = start_from(backbone, start) if start else None
        if adapter is not None:
            if start:
                check_adaptable(backbone, start)
            adapter.adapt(backbone)
        text = build(node.text_encoder)
        if trains_text_encoder(adapter, node.text_encoder_lr):
            (train_all if adapter is None else adapter.adapt_text)(text.network)
        parts = {"backbone": backbone, "base": base, "adapter": adapter, "text_encoder": text}
    elif "vae" in node:
        from ldm.training.start import first_stage_from

        parts = {"vae": first_stage_from(build(node.vae), start, node.decoder_only)}
    rest = {key: value for key, value in node.items() if key not in {"start", *parts}}
    return build(rest, _partial_=True)(**parts)  # Hydra would take dataclasses among the parts for configs


def build_callbacks(config: DictConfig) -> list[Any]:
    """Builds the callbacks of the groups ema, callbacks and metrics; the option `none` of a group has no target."""
    for name, node in config.callbacks.items():
        if node is not None and not (isinstance(node, DictConfig) and "_target_" in node):
            raise ValueError(f"callbacks.{name} has no _target_ and would be ignored: set _target_ to its class")
    nodes = (config.ema, *config.callbacks.values(), config.get("evaluation"))
    return [build(node) for node in nodes if node and "_target_" in node]

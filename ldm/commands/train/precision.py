"""Decides on TF32."""

from omegaconf import DictConfig


def uses_tf32(precision: DictConfig) -> bool:
    """Returns whether GPUs may compute float32 products in TF32: if asked for, or if the network is not in float32."""
    float32 = precision.name == "32-true" and precision.compute is None
    return bool(precision.get("tf32", not float32))

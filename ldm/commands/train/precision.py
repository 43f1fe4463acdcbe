"""Registers the resolver ${fast_precision:…} that precision=auto uses, and decides on TF32."""

from omegaconf import DictConfig, OmegaConf


def fast_precision(accelerator: str, plan: bool) -> str:
    """Returns bf16-mixed if the GPU (or the CPU without one) has instructions for it, or in a plan; else float32."""
    if plan:
        return "bf16-mixed"  # every GPU that a plan covers supports it
    from ldm.device import choose_device, has_bf16

    return "bf16-mixed" if has_bf16(choose_device("cpu" if accelerator == "cpu" else "auto")) else "32-true"


def uses_tf32(precision: DictConfig) -> bool:
    """Returns whether GPUs may compute float32 products in TF32: if asked for, or if the network is not in float32."""
    float32 = precision.name == "32-true" and precision.compute is None
    return bool(precision.get("tf32", not float32))


OmegaConf.register_new_resolver("fast_precision", fast_precision, replace=True)

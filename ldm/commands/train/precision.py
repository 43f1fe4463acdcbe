"""Registers the resolver ${fast_precision:…} that precision=auto uses."""

from omegaconf import OmegaConf


def fast_precision(accelerator: str, plan: bool) -> str:
    """Returns bf16-mixed if the GPU (or the CPU without one) has instructions for it, or in a plan; else float32."""
    if plan:
        return "bf16-mixed"  # every GPU that a plan covers supports it
    from ldm.device import choose_device, has_bf16

    return "bf16-mixed" if has_bf16(choose_device("cpu" if accelerator == "cpu" else "auto")) else "32-true"


OmegaConf.register_new_resolver("fast_precision", fast_precision, replace=True)

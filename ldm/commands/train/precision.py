"""The resolver ${fast_precision:…} of precision=auto."""

from omegaconf import OmegaConf


def fast_precision(accelerator: str, plan: bool) -> str:
    """bf16-mixed where the GPU, or without one the CPU, has instructions for it, and in a plan; float32 elsewhere."""
    if plan:
        return "bf16-mixed"  # which every GPU that is planned for has
    from ldm.device import choose_device, has_bf16

    return "bf16-mixed" if has_bf16(choose_device("cpu" if accelerator == "cpu" else "auto")) else "32-true"


OmegaConf.register_new_resolver("fast_precision", fast_precision, replace=True)

"""The resolvers that configs use: ${fast_precision:…} and ${inpainting_channels:…}."""

from omegaconf import OmegaConf


def fast_precision(accelerator: str, plan: bool) -> str:
    """Returns bf16-mixed if the GPU (or the CPU without one) has instructions for it, or in a plan; else float32."""
    if plan:
        return "bf16-mixed"  # every GPU that a plan covers supports it
    from ldm.device import choose_device, has_bf16

    return "bf16-mixed" if has_bf16(choose_device("cpu" if accelerator == "cpu" else "auto")) else "32-true"


def inpainting_channels(latent_channels: int) -> int:
    """Returns the input channels of an inpainting network: noisy latents, latents of the masked image and a mask."""
    return 2 * latent_channels + 1


def register_resolvers() -> None:
    for function in (fast_precision, inpainting_channels):
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)

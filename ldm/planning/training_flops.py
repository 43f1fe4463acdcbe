"""Computes what the utilisation of GPUs is measured by: the FLOPs of training on an image, and a GPU's peak."""

import copy
from typing import Any

from ldm.nn.backbone import Backbone, trainable
from ldm.planning.flops import measure
from ldm.planning.networks import plan_networks
from ldm.planning.settings import AUTOCAST

# Words in the name that torch reports → dense TFLOP/s in bf16 and float32 from NVIDIA's data sheets (half of those
# "with sparsity").
PEAKS = {
    "A100": (312.0, 19.5),
    "H100 HBM3": (989.5, 67.0),  # SXM; torch calls the slower card with another memory "NVIDIA H100 PCIe"
    "H200": (989.5, 67.0),
    "L4": (121.0, 30.3),
    "RTX 4090": (165.2, 82.6),
}
SLOWER = {"NVL", "Laptop", "D", "MIG"}  # words of the names of slower variants


def flops_per_image(config: dict[str, Any]) -> float:
    """Returns the FLOPs of a training step with this resolved config, divided by its images.

    A multiply-add counts as two. Forward and backward passes of all networks that a step calls count, for images of
    training.size, but not the activations that gradient checkpointing computes again: these are model FLOPs, as in
    PaLM's definition of MFU (Chowdhery et al. 2022, appendix B).
    """
    config = copy.deepcopy(config)
    config["data"]["batch_size"] = 1
    low, total = AUTOCAST.get(config["trainer"]["precision"]), 0
    for number, planned in enumerate(plan_networks(config)[0]):
        if planned.forward is None:
            continue
        if isinstance(planned.network, Backbone):
            planned.network.checkpointing = False
        cost = measure(planned.forward, low, grad=number == 0 or bool(trainable(planned.network)))
        total += cost.forward + cost.backward
    return float(total)


def peak_flops(gpu: str, kind: str) -> float | None:
    """Returns the dense peak of a GPU in FLOP/s in bf16, TF32 or float32; None for a GPU that is not in PEAKS."""
    words = {*gpu.replace("-", " ").split()}
    peaks = next((peaks for name, peaks in PEAKS.items() if {*name.split()} <= words), None)
    return None if peaks is None or words & SLOWER else teraflops(peaks, kind) * 1e12


def teraflops(peaks: tuple[float, float], kind: str) -> float:
    """Returns the TFLOP/s of a kind of product, see `kind_of_product`, of a pair in PEAKS."""
    bf16, float32 = peaks
    return {"bf16": bf16, "TF32": bf16 / 2, "float32": float32}[kind]

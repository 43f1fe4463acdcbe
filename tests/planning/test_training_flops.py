import copy

import pytest

from ldm.planning.report import plan
from ldm.planning.training_flops import flops_per_image, peak_flops
from tests.planning.test_report import BATCH, config


def planned_flops(settings):
    """Returns the FLOPs of a step by the plan, from the rows of forward and backward passes."""
    units = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
    rows = [line.split() for line in plan(settings)]
    passes = [row for row in rows if len(row) > 2 and row[1] in ("forward", "backward")]
    return sum(float(row[2]) * units[row[3].removesuffix("FLOP")] for row in passes)


def test_the_flops_of_an_image_are_those_of_the_plan():
    settings = config()
    assert flops_per_image(settings) == pytest.approx(planned_flops(copy.deepcopy(settings)) / BATCH, rel=1e-3)


@pytest.mark.slow
def test_activations_that_are_computed_again_do_not_count():
    plain, checkpointed = config(), config()
    checkpointed["training"]["backbone"]["checkpointing"] = True
    assert flops_per_image(checkpointed) == flops_per_image(plain)
    assert planned_flops(checkpointed) > 1.1 * planned_flops(plain)


@pytest.mark.parametrize(
    ("gpu", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L4", 121.0),
    ],
)
def test_the_peak_of_a_known_gpu_is_halved_in_float32(gpu, tera):
    assert peak_flops(gpu, "bf16") == tera * 1e12
    assert peak_flops(gpu, "TF32") == tera * 1e12 / 2


@pytest.mark.parametrize(
    "gpu", ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA L40S", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4"]
)
def test_another_gpu_has_no_peak(gpu):
    assert peak_flops(gpu, "bf16") is None

import pytest
import torch

from experiments.benchmark.activations import kept_by_compilation, kept_eagerly
from tests.tiny import tiny_unet


@pytest.mark.slow
def test_a_compiled_network_keeps_a_part_of_the_activations() -> None:
    unet = tiny_unet().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    eager = kept_eagerly(unet.config, 8)
    assert 0 < kept_by_compilation(unet, 8) < eager

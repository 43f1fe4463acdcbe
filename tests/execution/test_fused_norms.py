"""Tests where fused normalisation is refused; tests/kernels tests the kernels."""

import pytest
import torch
from torch import nn

from ldm.execution.fused_norms import fuse_norms
from ldm.nn.layers import GroupNorm


def test_a_cpu_is_refused_and_the_network_left_as_it_is() -> None:
    network = nn.Sequential(GroupNorm(2, 4))
    with pytest.raises(ValueError, match=r"^training\.fused_norms needs an NVIDIA GPU .*, but the device is cpu$"):
        fuse_norms(network, torch.device("cpu"))
    assert not network[0].fused


def test_a_network_without_group_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="group normalisation, which a Linear lacks"):
        fuse_norms(nn.Linear(2, 2), torch.device("cuda"))

"""Runs Triton's kernels on a GPU, or, slowly, in Triton's interpreter: TRITON_INTERPRET=1, see .ci/full_size."""

import os
from importlib.util import find_spec

import pytest
import torch

INSTALLED = find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> torch.device:
    if INTERPRETED:
        return torch.device("cpu")
    if not INSTALLED:
        pytest.skip("needs Triton")
    return torch.device("cuda")

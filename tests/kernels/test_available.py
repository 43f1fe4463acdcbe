"""Tests where Triton's kernels are used."""

import pytest
import torch

from ldm.kernels import available


def test_a_gpu_on_which_a_kernel_fails_does_without_triton_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton or the GPU is missing here, whatever the patched tests of them say."""
    if torch.cuda.is_available():
        pytest.skip("needs a kernel that fails")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(available, "find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.warns(UserWarning, match=r"^Triton cannot run kernels on cuda:3, .* \((Module|Assertion|Runtime)"):
        assert not available.can_run.__wrapped__(torch.device("cuda:3"))


def test_a_cpu_does_without_triton() -> None:
    assert not available.can_run(torch.device("cpu"))

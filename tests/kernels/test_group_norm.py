"""Tests the kernels of group normalisation against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nn.layers import GroupNorm, ResBlock

pytestmark = pytest.mark.cuda

SHAPES = [(2, 32, 8, 8, 8), (3, 96, 9, 15, 32), (2, 160, 5, 7, 32), (1, 320, 17, 24, 32)]  # b, c, h, w, groups
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}  # of rounding


def channels_last(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = (5 + 2 * torch.randn(*shape)).to(device, dtype)
    return values.contiguous(memory_format=torch.channels_last)


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double().cpu() - b.detach()).norm() / b.detach().norm())


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("silu", [False, True])
def test_output_and_gradients_are_right(device: torch.device, dtype: torch.dtype, shape: tuple, silu: bool) -> None:
    from ldm.kernels.group_norm import group_norm

    *size, groups = shape
    x = channels_last(*size, dtype=dtype, device=device).requires_grad_()
    weight, bias = (torch.randn(size[1], device=device, requires_grad=True) for _ in range(2))
    gradient = torch.randn(*size).to(device, dtype)
    out = group_norm(x, groups, weight, bias, 1e-5, silu)
    gradients = torch.autograd.grad(out, (x, weight, bias), gradient)
    assert out.dtype == x.dtype and out.is_contiguous(memory_format=torch.channels_last)

    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.group_norm(exact[0], groups, exact[1], exact[2], 1e-5)
    expected = F.silu(expected) if silu else expected
    exact_gradients = torch.autograd.grad(expected, exact, gradient.cpu().double())
    assert relative_error(out, expected) < 8 * UNIT[dtype]
    assert relative_error(gradients[0], exact_gradients[0]) < 8 * UNIT[dtype]
    for ours, theirs in zip(gradients[1:], exact_gradients[1:], strict=True):  # float32 sums in any case
        assert relative_error(ours, theirs) < 2e-6


def test_a_large_mean_does_not_cancel(device: torch.device) -> None:
    from ldm.kernels.group_norm import group_norm

    x = (1000 + torch.randn(2, 64, 16, 12)).to(device).contiguous(memory_format=torch.channels_last)
    ones, zeros = torch.ones(64, device=device), torch.zeros(64, device=device)
    expected = F.group_norm(x.cpu().double(), 32, eps=1e-5)
    assert relative_error(group_norm(x, 32, ones, zeros, 1e-5), expected) < 1e-4  # x itself is known to 3e-5


def test_a_block_with_fused_layers_is_the_same_block(device: torch.device) -> None:
    torch.manual_seed(0)
    block = ResBlock(32, 64, time_width=16, groups=8).to(device)
    torch.nn.init.normal_(block.conv2.weight, std=0.05)
    x, time = channels_last(2, 32, 6, 10, dtype=torch.float32, device=device), torch.randn(2, 16, device=device)
    plain = block(x, time)
    for module in block.modules():
        if isinstance(module, GroupNorm):
            module.fused = True
    torch.testing.assert_close(block(x, time), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one_normalises(device: torch.device) -> None:
    from ldm.kernels.group_norm import group_norm

    x = channels_last(2, 32, 6, 10, dtype=torch.float32, device=torch.device("cuda:1")).requires_grad_()
    weight, bias = torch.ones(32, device=x.device), torch.zeros(32, device=x.device)
    with torch.cuda.device(0):
        out = group_norm(x, 8, weight, bias, 1e-5)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(out, F.group_norm(x, 8, eps=1e-5), rtol=1e-5, atol=1e-5)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 8, 1, 1, 4), (2, 1, 3, 5, 1), (0, 8, 4, 4, 4)], ids=str)
def test_maps_whose_layout_is_ambiguous_or_that_are_empty_are_normalised(device: torch.device, shape: tuple) -> None:
    from ldm.kernels.group_norm import group_norm

    *size, groups = shape
    x = torch.randn(*size, device=device)
    weight, bias = torch.randn(size[1], device=device), torch.randn(size[1], device=device)
    expected = F.group_norm(x.cpu().double(), groups, weight.cpu().double(), bias.cpu().double(), 1e-5)
    torch.testing.assert_close(group_norm(x, groups, weight, bias, 1e-5).cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", ["input", "weights"])
def test_frozen_weights_or_a_frozen_input_get_no_gradient(device: torch.device, trained: str) -> None:
    from ldm.kernels.group_norm import group_norm

    x = channels_last(2, 32, 6, 10, dtype=torch.float32, device=device).requires_grad_(trained == "input")
    weight, bias = (torch.randn(32, device=device, requires_grad=trained == "weights") for _ in range(2))
    gradients = {}
    for name, function in {"fused": group_norm, "plain": F.group_norm}.items():
        at = x if name == "fused" else x.contiguous()  # PyTorch's kernel crashes for such an x without a gradient
        out = function(at, 8, weight, bias, 1e-5)
        leaves = [x] if trained == "input" else [weight, bias]
        gradients[name] = torch.autograd.grad(out.square().sum(), leaves)
    for ours, theirs in zip(gradients["fused"], gradients["plain"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

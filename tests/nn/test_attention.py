import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nn.attention import SHORT, attend


def states(keys: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64).to(dtype) for n in (40, keys, keys)]


@pytest.mark.parametrize("keys", [5, SHORT, SHORT + 1])
def test_attention_written_out_is_torchs(keys: int) -> None:
    """To float32's rounding: torch's own kernel on this size is no more exact."""
    ours, theirs = [tensor.requires_grad_() for tensor in states(keys, torch.float32)], states(keys, torch.float64)
    made = attend(*ours)
    expected = F.scaled_dot_product_attention(*(tensor.requires_grad_() for tensor in theirs))
    torch.testing.assert_close(made.double(), expected, atol=1e-5, rtol=1e-5)
    made.square().sum().backward()
    expected.square().sum().backward()
    for tensor, reference in zip(ours, theirs, strict=True):
        assert tensor.grad is not None and reference.grad is not None
        torch.testing.assert_close(tensor.grad.double(), reference.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_result_has_the_type_of_the_values(dtype: torch.dtype) -> None:
    q, k, v = states(7, dtype)
    assert attend(q, k, v).dtype == dtype


def test_in_float64_nothing_is_rounded_to_float32() -> None:
    q, k, v = states(7, torch.float64)
    expected = (q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v), expected, atol=1e-14, rtol=1e-14)


def test_in_bfloat16_it_stays_near() -> None:
    exact = F.scaled_dot_product_attention(*(tensor.double() for tensor in states(24, torch.bfloat16)))
    error = attend(*states(24, torch.bfloat16)).double() - exact
    assert 0 < error.norm() / exact.norm() < 0.02

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nn.attention import SHORT, attend, repeated


def states(keys: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64).to(dtype) for n in (40, keys, keys)]


@pytest.mark.parametrize("keys", [5, SHORT, SHORT + 1])
def test_in_bfloat16_attention_and_its_gradients_are_the_exact_ones_rounded(keys: int) -> None:
    ours = [tensor.requires_grad_() for tensor in states(keys, torch.bfloat16)]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    made, expected = attend(*ours), F.scaled_dot_product_attention(*theirs)
    made.double().square().sum().backward()
    expected.square().sum().backward()
    grads = [(tensor.grad, reference.grad) for tensor, reference in zip(ours, theirs, strict=True)]
    for found, exact in [(made, expected), *grads]:
        assert found is not None and exact is not None and found.dtype == torch.bfloat16
        assert 0 < (found.double() - exact).norm() / exact.norm() < 0.02


def test_in_other_types_it_is_torchs() -> None:
    q, k, v = states(7, torch.float64)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_a_batch_is_repeated_as_it_lies_in_memory() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    made = repeated(x, torch.empty(6, 1))
    assert torch.equal(made, x.repeat(3, 1, 1, 1)) and made.is_contiguous(memory_format=torch.channels_last)
    assert repeated(x, torch.empty(2, 1)) is x

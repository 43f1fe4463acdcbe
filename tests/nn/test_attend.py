import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nn import attend as module
from ldm.nn.attend import LONG, ROWS, SHORT, WIDE, attend


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_amx", lambda: False)


def states(keys: int, dtype: torch.dtype, queries: int = ROWS, spread: float = 1) -> list[Tensor]:
    """q, k, v of 2 images and 3 heads in the UNet's memory layout; `spread` is the standard deviation of the scores."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, 3, WIDE) for n in (queries, keys, keys)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2) for shape in shapes)
    return [tensor.to(dtype) for tensor in (spread * q, k, v)]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("keys", [5, SHORT, SHORT + 1, LONG])
def test_bfloat16_attention_and_its_gradients_are_exact_up_to_rounding(keys: int) -> None:
    ours = [tensor.requires_grad_() for tensor in states(keys, torch.bfloat16)]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    actual, expected = attend(*ours), F.scaled_dot_product_attention(*theirs)
    actual.double().square().sum().backward()
    expected.square().sum().backward()
    grads = [(tensor.grad, reference.grad) for tensor, reference in zip(ours, theirs, strict=True)]
    for rounded, exact in [(actual, expected), *grads]:
        assert rounded is not None and exact is not None and rounded.dtype == torch.bfloat16
        assert 0 < relative_error(rounded, exact) < 0.02


@pytest.mark.parametrize("queries", [ROWS, 700])
@pytest.mark.parametrize(("spread", "bound"), [(0.5, 0.003), (3, 0.006), (30, 0.015)])
def test_attention_in_blocks_is_exact_up_to_rounding(queries: int, spread: float, bound: float) -> None:
    q, k, v = states(LONG + 7, torch.bfloat16, queries, spread)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with torch.no_grad():
        actual = attend(q, k, v)
    assert actual.shape == q.shape and 0 < relative_error(actual, exact) < bound
    assert not torch.equal(actual, F.scaled_dot_product_attention(q, k, v)), "PyTorch's kernel was called"


def test_attention_in_blocks_does_not_depend_on_the_batch_size() -> None:
    q, k, v = states(LONG, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(attend(q, k, v)[1:], attend(q[1:], k[1:], v[1:]))


def test_adding_a_large_number_to_all_scores_does_not_reduce_precision() -> None:
    q, k, v = states(LONG, torch.bfloat16)
    q, k, v = (F.pad(tensor, (0, 8), value=value) for tensor, value in ((q, 20), (k, 20), (v, 1)))  # + 462 per score
    with torch.no_grad():
        actual = attend(q, k, v)
    assert relative_error(actual, F.scaled_dot_product_attention(q.double(), k.double(), v.double())) < 0.005


def test_other_types_and_cpus_with_amx_use_the_kernel_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = states(LONG, dtype)
        monkeypatch.setattr(module, "has_amx", lambda: True)
        with torch.no_grad():
            assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.nn import attend as module
from ldm.nn.attend import LONG, ROWS, SHORT, WIDE, attend


@pytest.fixture(autouse=True)
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_amx", lambda: False)


def states(keys: int, dtype: torch.dtype, queries: int = ROWS, spread: float = 1) -> list[Tensor]:
    """q, k, v of 2 pictures and 3 heads as the UNet lays them out; the scores' standard deviation is `spread`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, 3, WIDE) for n in (queries, keys, keys)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2) for shape in shapes)
    return [tensor.to(dtype) for tensor in (spread * q, k, v)]


def error(made: Tensor, exact: Tensor) -> float:
    return ((made.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("keys", [5, SHORT, SHORT + 1, LONG])
def test_in_bfloat16_attention_and_its_gradients_are_the_exact_ones_rounded(keys: int) -> None:
    ours = [tensor.requires_grad_() for tensor in states(keys, torch.bfloat16)]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    made, expected = attend(*ours), F.scaled_dot_product_attention(*theirs)
    made.double().square().sum().backward()
    expected.square().sum().backward()
    grads = [(tensor.grad, reference.grad) for tensor, reference in zip(ours, theirs, strict=True)]
    for found, exact in [(made, expected), *grads]:
        assert found is not None and exact is not None and found.dtype == torch.bfloat16
        assert 0 < error(found, exact) < 0.02


@pytest.mark.parametrize("queries", [ROWS, 700])
@pytest.mark.parametrize(("spread", "bound"), [(0.5, 0.003), (3, 0.006), (30, 0.015)])
def test_many_keys_in_bfloat16_without_gradients(queries: int, spread: float, bound: float) -> None:
    q, k, v = states(LONG + 7, torch.bfloat16, queries, spread)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with torch.no_grad():
        made = attend(q, k, v)
    assert made.shape == q.shape and 0 < error(made, exact) < bound
    assert not torch.equal(made, F.scaled_dot_product_attention(q, k, v)), "torch's kernel was called"


def test_many_keys_are_attended_to_alike_at_every_batch_size() -> None:
    q, k, v = states(LONG, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(attend(q, k, v)[1:], attend(q[1:], k[1:], v[1:]))


def test_a_large_score_that_all_keys_share_costs_no_digit() -> None:
    q, k, v = states(LONG, torch.bfloat16)
    q, k, v = (F.pad(tensor, (0, 8), value=value) for tensor, value in ((q, 20), (k, 20), (v, 1)))  # 462 to each score
    with torch.no_grad():
        assert error(attend(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double())) < 0.005


def test_in_other_types_and_where_matrices_are_multiplied_as_such_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = states(LONG, dtype)
        monkeypatch.setattr(module, "has_amx", lambda: True)
        with torch.no_grad():
            assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))

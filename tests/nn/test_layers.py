from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ldm.nn.layers import LARGE, GroupNorm


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """One sums in one way."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pixels", [LARGE // 32 - 1, LARGE // 32, 80])
def test_a_picture_is_normalised_alike_in_every_batch(
    dtype: torch.dtype, layout: torch.memory_format, pixels: int
) -> None:
    x = (3 + torch.randn(5, 8, 32, pixels)).to(dtype).contiguous(memory_format=layout)
    norm, plain = GroupNorm(2, 8).to(dtype), nn.GroupNorm(2, 8).to(dtype)
    with torch.no_grad():
        together = norm(x)
        assert torch.equal(together, torch.cat([norm(x[:1]), norm(x[1:3]), norm(x[3:])]))
        assert together.is_contiguous(memory_format=layout)
        # Sums in another order round to the next number at most: of bfloat16, 2⁻⁷ away; of float32, nearer than atol.
        torch.testing.assert_close(together, plain(x), atol=1e-4, rtol=2**-7)


def test_no_pictures_are_no_pictures() -> None:
    with torch.no_grad():
        assert GroupNorm(2, 8)(torch.empty(0, 8, 4, 4)).shape == (0, 8, 4, 4)


def test_with_gradients_it_is_torchs() -> None:
    x = torch.randn(3, 8, 64, 64)
    assert torch.equal(GroupNorm(2, 8)(x), nn.GroupNorm(2, 8)(x))

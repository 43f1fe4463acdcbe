from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ldm.conditioning import Conditioning
from ldm.nn.layers import LARGE, GroupNorm
from tests.tiny import tiny_unet


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Sets two threads, since with one PyTorch always sums in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pixels", [LARGE // 32 - 1, LARGE // 32, 80])
def test_group_norm_of_an_image_does_not_depend_on_its_batch(
    dtype: torch.dtype, layout: torch.memory_format, pixels: int
) -> None:
    x = (3 + torch.randn(5, 8, 32, pixels)).to(dtype).contiguous(memory_format=layout)
    norm, plain = GroupNorm(2, 8).to(dtype), nn.GroupNorm(2, 8).to(dtype)
    with torch.no_grad():
        together = norm(x)
        assert torch.equal(together, torch.cat([norm(x[:1]), norm(x[1:3]), norm(x[3:])]))
        assert together.is_contiguous(memory_format=layout)
        # Another order of summation changes at most one rounding: by 2⁻⁷ in bfloat16, by less than atol in float32.
        torch.testing.assert_close(together, plain(x), atol=1e-4, rtol=2**-7)


def test_group_norm_of_an_empty_batch_is_an_empty_batch() -> None:
    with torch.no_grad():
        assert GroupNorm(2, 8)(torch.empty(0, 8, 4, 4)).shape == (0, 8, 4, 4)


def test_group_norm_with_gradients_is_that_of_pytorch() -> None:
    x = torch.randn(3, 8, 64, 64)
    assert torch.equal(GroupNorm(2, 8)(x), nn.GroupNorm(2, 8)(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_group_norm_can_train_on_an_input_without_gradient(layout: torch.memory_format) -> None:
    """PyTorch's own layer crashes then, in the channels-last layout: adapter.names=["*norm*"] trains like this."""
    norm, x = GroupNorm(2, 4), torch.randn(2, 4, 3, 3).contiguous(memory_format=layout)
    norm(x).square().sum().backward()
    expected = 2 * nn.functional.group_norm(x, 2, eps=norm.eps)
    assert norm.weight.grad is not None and norm.bias.grad is not None
    torch.testing.assert_close(norm.bias.grad, expected.sum((0, 2, 3)))
    torch.testing.assert_close(norm.weight.grad, (expected.square() / 2).sum((0, 2, 3)))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_group_norm_on_a_gpu_keeps_the_layout(layout: torch.memory_format) -> None:
    """The meta device stands in for a GPU: PyTorch's group normalisation returns the default layout on both."""
    x = torch.empty(2, 8, 4, 4, device="meta").contiguous(memory_format=layout)
    assert GroupNorm(4, 8).to("meta")(x).stride() == x.stride()


@pytest.mark.cuda
def test_a_network_on_a_gpu_computes_all_convolutions_in_channels_last_layout() -> None:
    unet = tiny_unet().to("cuda", memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    others: list[str] = []
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Conv2d):

            def note(_: nn.Module, x: tuple[torch.Tensor], name: str = name) -> None:
                if not x[0].is_contiguous(memory_format=torch.channels_last):
                    others.append(name)

            layer.register_forward_pre_hook(note)
    x = torch.zeros(2, 4, 8, 8, device="cuda")
    unet(x, torch.zeros(2, device="cuda"), Conditioning(text=torch.zeros(2, 5, 16, device="cuda")))
    assert others in ([], ["conv_in"])

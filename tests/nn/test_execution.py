"""Networks run without memory format copies and graph breaks, and can be built on the meta device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.conditioning import Conditioning
from ldm.nn.clip import ImageTower, TextTower
from ldm.nn.dit import DiT
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE

Built = tuple[nn.Module, Callable[..., Tensor], tuple[Any, ...]]  # a network, the function to call and its inputs
TINY_UNET: dict[str, Any] = dict(width=16, multipliers=(1, 2), blocks=1, depth=(0, 1), heads=2, groups=4)


def inputs() -> tuple[Tensor, Tensor, Conditioning]:
    return torch.randn(2, 4, 6, 10), torch.tensor([3.0, 700.0]), Conditioning(text=torch.randn(2, 5, 8))


def unet(**changes: Any) -> Built:
    network = UNet(**TINY_UNET, context_width=8, **changes)
    return network, network, inputs()


def inpainting_unet() -> Built:
    network, run, (x, time, conditioning) = unet(in_channels=9)
    return network, run, (x, time, conditioning.with_hint("inpainting", torch.randn(2, 5, 6, 10)))


def dit(**changes: Any) -> Built:
    network = DiT(width=16, layers=2, heads=2, context_width=8, **changes)
    return network, network, inputs()


def encoder(**changes: Any) -> Built:
    network = VAE(widths=(8, 16), blocks=1, groups=4, **changes)
    return network, network.moments, (torch.randn(2, 3, 16, 24),)


def decoder(**changes: Any) -> Built:
    network = VAE(widths=(8, 16), blocks=1, groups=4, **changes)
    return network, network.decode, (torch.randn(2, 4, 6, 10),)


def text() -> Built:
    network = TextTower(width=16, layers=2, heads=2, context=8, projection=4, token_ids=[3, 9, 49407])
    return network, network.embed, (torch.tensor([[3, 9, 49407], [9, 10, 49407]]),)


def image() -> Built:
    network = ImageTower(16, 8, 16, 2, 2, projection=4)
    return network, network.embed, (torch.randn(2, 3, 16, 16),)


class Copies(TorchDispatchMode):
    """Records operations that only copy a tensor to another memory format or data type."""

    kinds = torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket in self.kinds:
            self.found.append((func, args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("linear_projection", [False, True])
@torch.no_grad()
def test_a_unet_in_channels_last_never_copies_to_another_memory_format(linear_projection: bool) -> None:
    network, run, inputs = unet(linear_projection=linear_projection)
    assert_channels_last(network, run, inputs)


@pytest.mark.parametrize("part", [encoder, decoder])
@torch.no_grad()
def test_an_autoencoder_in_channels_last_never_copies_to_another_memory_format(part: Any) -> None:
    assert_channels_last(*part())


def assert_channels_last(network: nn.Module, run: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
    last = torch.channels_last
    network.to(memory_format=last)  # type: ignore[call-overload]
    wrong = []

    def check(module: nn.Module, _inputs: Any, out: Tensor) -> None:
        if out.ndim == 4 and not out.is_contiguous(memory_format=last):
            wrong.append((type(module).__name__, out.stride()))

    for module in network.modules():
        module.register_forward_hook(check)
    inputs = (inputs[0].contiguous(memory_format=last), *inputs[1:])
    with Copies() as copies:
        out = run(*inputs)
    assert out.is_contiguous(memory_format=last)
    assert not wrong and not copies.found


@pytest.mark.parametrize(
    "build",
    [
        unet,
        lambda: unet(checkpointing=True),
        inpainting_unet,
        dit,
        lambda: dit(checkpointing=True),
        encoder,
        decoder,
        text,
        image,
    ],
    ids=[
        "unet",
        "unet with checkpointing",
        "inpainting unet",
        "dit",
        "dit with checkpointing",
        "encoder",
        "decoder",
        "text tower",
        "image tower",
    ],
)
def test_a_network_compiles_without_graph_breaks(build: Any) -> None:
    network, run, inputs = build()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")  # fullgraph=True makes a graph break an error
    torch.testing.assert_close(compiled(*inputs), run(*inputs))


@pytest.mark.parametrize("build", [unet, dit, encoder, text, image])
def test_a_network_built_on_the_meta_device_works_once_it_has_weights(build: Any) -> None:
    network, _, inputs = build()
    with torch.device("meta"):
        empty = type(network)(**network.config)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(network.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    call = "moments" if isinstance(network, VAE) else "forward"
    assert torch.equal(getattr(empty, call)(*inputs), getattr(network, call)(*inputs))

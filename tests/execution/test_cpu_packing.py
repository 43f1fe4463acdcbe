import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from ldm.execution.cpu_packing import ONEDNN, FoldedUpsample, Packed, PackedConv2d, can_pack, fold, pack, unpack
from ldm.nn.layers import Upsample
from ldm.pipeline.pipeline import Pipeline

TYPES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not can_pack(torch.device("cpu"), dtype), reason="this CPU does not pack it")
    )
    for dtype in (torch.float32, torch.bfloat16)
]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(192, 160, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(160, 192, 3, stride=2, padding=1, bias=False), nn.Conv2d(192, 8, 1)])
        self.linear, self.small = nn.Linear(512, 512), nn.Linear(512, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv, *self.blocks):
            x = layer(x)
        return self.small(self.linear(x.flatten(2)))


def pair(dtype: torch.dtype) -> tuple[Network, Network]:
    torch.manual_seed(0)
    plain = Network().to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    packed = copy.deepcopy(plain)
    pack(packed)
    return plain, packed


@pytest.mark.parametrize("dtype", TYPES)
def test_a_packed_network_computes_the_same_as_the_plain_one(dtype: torch.dtype) -> None:
    plain, packed = pair(dtype)
    kinds = [isinstance(layer, Packed) for layer in (packed.conv, *packed.blocks, packed.linear, packed.small)]
    assert kinds == [True, True, False, True, False]
    x = torch.randn(2, 192, 32, 64).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x), atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", TYPES)
def test_an_unpacked_network_is_the_plain_one_bit_for_bit(dtype: torch.dtype) -> None:
    plain, packed = pair(dtype)
    unpack(packed)
    assert not any(isinstance(layer, Packed) for layer in packed.modules()) and repr(packed) == repr(plain)
    expected = dict(plain.named_parameters())
    assert {name: tensor.dtype for name, tensor in packed.named_parameters()} == dict.fromkeys(expected, dtype)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in packed.named_parameters())


@pytest.mark.parametrize("dtype", TYPES)
def test_the_state_dict_of_a_packed_network_is_that_of_the_plain_one(dtype: torch.dtype) -> None:
    plain, packed = pair(dtype)
    saved, expected = packed.state_dict(), plain.state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in expected)
    other = {name: torch.randn_like(tensor) for name, tensor in expected.items()}
    packed.load_state_dict(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in packed.state_dict().items())
    with pytest.raises(RuntimeError, match=r"linear.weight is \(2, 2\), but must be \(512, 512\)"):
        packed.load_state_dict({**other, "linear.weight": torch.ones(2, 2)})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*linear.weight"):
        packed.load_state_dict({name: tensor for name, tensor in other.items() if name != "linear.weight"})


@pytest.mark.parametrize("dtype", TYPES)
def test_a_packed_network_can_be_copied_pickled_and_cast(dtype: torch.dtype) -> None:
    plain, packed = pair(dtype)
    x = torch.randn(1, 192, 32, 64).to(dtype)
    with torch.no_grad():
        expected = packed(x)
        assert torch.equal(copy.deepcopy(packed)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(packed))(x), expected)
        packed.float()
        torch.testing.assert_close(packed(x.float()), plain.float()(x.float()))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(packed(x.float()).float(), plain(x.float()).float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", TYPES)
def test_packed_layers_refuse_gradients(dtype: torch.dtype) -> None:
    packed = pair(dtype)[1]
    with pytest.raises(RuntimeError, match=r"have no gradients: call it under .* with ldm\.weights\.model\.read_model"):
        packed(torch.randn(1, 192, 32, 64, dtype=dtype, requires_grad=True))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_pipeline_on_the_cpu_is_packed(dtype: torch.dtype) -> None:
    pipeline = Pipeline.load(device="cpu", dtype=dtype)
    assert any(isinstance(layer, Packed) for layer in pipeline.backbone.modules())
    conditioning = pipeline.text_encoder.encode(["a red circle"]).to(dtype=dtype)
    out = pipeline.backbone(torch.randn(1, 8, 8, 8).to(dtype), torch.tensor([500.0]), conditioning)
    assert out.shape == (1, 8, 8, 8) and not out.requires_grad  # without torch.no_grad()


@pytest.mark.parametrize("dtype", TYPES)
def test_a_packed_convolution_has_the_layout_for_every_size_of_its_input(dtype: torch.dtype) -> None:
    plain = nn.Conv2d(192, 192, 3, padding=1, dtype=dtype).requires_grad_(False)
    packed = PackedConv2d(copy.deepcopy(plain))
    for size in [(2, 192, 4, 4), (1, 192, 64, 64), (2, 192, 4, 4), (32, 192, 8, 8)]:
        x = torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(packed(x), plain(x), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)
        best = ONEDNN._reorder_convolution_weight(plain.weight, *packed.arguments, size)
        layouts = [ONEDNN._get_mkldnn_serialized_md(weight) for weight in (packed.packed, best)]
        assert torch.equal(*layouts)
    assert torch.equal(packed.weight, plain.weight)


def upsample(dtype: torch.dtype = torch.float32) -> Upsample:
    torch.manual_seed(0)
    return Upsample(256).to(dtype, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [None, (10, 14), (9, 13)])
def test_folded_upsampling_is_about_as_exact_as_the_plain_one(dtype: torch.dtype, size: tuple[int, int] | None) -> None:
    plain, x = upsample(dtype), torch.randn(2, 256, 5, 7).to(dtype)
    exact = copy.deepcopy(plain).double()(x.double(), size)
    folded = nn.Sequential(copy.deepcopy(plain))
    fold(folded)
    assert isinstance(folded[0], FoldedUpsample)
    error, expected = ((made - exact).norm() / exact.norm() for made in (folded[0](x, size), plain(x, size)))
    assert error < 1.5 * expected


def test_folded_upsampling_follows_its_weights_and_can_be_undone() -> None:
    plain, other = upsample(), upsample()
    other.conv.weight.mul_(2)
    network = nn.Sequential(plain)
    fold(network)
    assert network.state_dict().keys() == nn.Sequential(other).state_dict().keys()
    network.load_state_dict(nn.Sequential(other).state_dict())
    x = torch.randn(1, 256, 6, 6)
    torch.testing.assert_close(network(x), other(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(network))(x), other(x))
    unpack(network)
    assert type(network[0]) is Upsample
    assert torch.equal(network(x), other(x))


def test_folded_upsampling_can_be_cast() -> None:
    network, x = nn.Sequential(upsample()), torch.randn(1, 256, 6, 6)
    expected = copy.deepcopy(network).bfloat16().float()(x)
    fold(network)
    torch.testing.assert_close(network.bfloat16().float()(x), expected)


def test_small_upsampling_is_not_folded() -> None:
    network = nn.Sequential(Upsample(64))
    fold(network)
    assert type(network[0]) is Upsample

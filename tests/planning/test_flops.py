from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ldm.conditioning import Conditioning
from ldm.nn.dit import DiT
from ldm.nn.unet import UNet
from ldm.planning.flops import measure, measure_training

WIDTH = 16


def unet(**options):
    return UNet(width=32, multipliers=[1, 2], blocks=1, depth=[1, 1], heads=2, context_width=WIDTH, groups=8, **options)


def dit(**options):
    return DiT(width=32, layers=4, heads=2, context_width=WIDTH, **options)


each_backbone = pytest.mark.parametrize("make", [unet, dit])


def network_and_call(make, device, size=8, **options):
    """Returns a small network and its call on four latents."""
    with torch.device(device):
        network = make(**options)
        x, time, text = torch.zeros(4, 4, size, size), torch.zeros(4), torch.zeros(4, 77, WIDTH)
    return network, partial(network, x, time, Conditioning(text=text))


def bytes_saved_by_a_real_run(network, run):
    """Returns the bytes that autograd saves for the backward pass on the CPU, without the weights."""
    weights = {parameter.data_ptr() for parameter in network.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    total = sum(size for pointer, size in saved.items() if pointer not in weights)
    out.sum().backward()
    return total


def test_flops_match_a_count_by_hand():
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 6 * 7, 11))
        x = torch.empty(2, 3, 6, 7)
    convolution, linear = 2 * 2 * 6 * 7 * 3 * 5 * 9, 2 * 2 * 5 * 6 * 7 * 11
    cost = measure(partial(network, x))
    assert cost.forward == convolution + linear
    assert cost.backward == convolution + 2 * linear  # the input needs no gradient


def test_bytes_saved_under_autocast_match_a_count_by_hand():
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1))
        x = torch.empty(2, 3, 6, 7)
    halves = x.numel() + 3 * 8 + 2 * 8 * 6 * 7 + 8 * 8  # inputs and weights of the convolutions
    floats = 2 * 8 * 6 * 7 + 2 * (2 * 2)  # input of the norm, its means and standard deviations
    assert measure(partial(network, x), torch.bfloat16).saved == 2 * halves + 4 * floats


@each_backbone
def test_bytes_saved_match_a_real_run(make):
    network, call = network_and_call(make, "cpu")
    assert measure(network_and_call(make, "meta")[1]).saved == pytest.approx(
        bytes_saved_by_a_real_run(network, call), rel=0.02
    )


@each_backbone
def test_attention_saves_no_quadratic_matrix(make):
    small, large = (measure(network_and_call(make, "meta", size)[1]).saved for size in (16, 32))
    assert large < 4.1 * small


@each_backbone
def test_without_gradients_nothing_is_saved(make):
    with_grad, without = (measure(network_and_call(make, "meta")[1], grad=grad) for grad in (True, False))
    assert without.forward == with_grad.forward and without.backward == without.saved == 0


@each_backbone
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_checkpointing_saves_less_and_computes_more(make, low):
    plain, checkpointed = (
        measure_training(*network_and_call(make, "meta", checkpointing=on), low) for on in (False, True)
    )
    assert checkpointed.saved < plain.saved / 2
    assert plain.backward < checkpointed.backward < plain.backward + plain.forward

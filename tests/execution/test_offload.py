import pytest
import torch
from torch import nn

from ldm.conditioning import Conditioning
from ldm.execution.offload import Offload, in_batches
from ldm.nn.unet import UNet
from tests.tiny import tiny_text_tower, tiny_unet

META = torch.device("meta")  # stands for the GPU: nothing that was left on the CPU can be computed with


def places(network: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*network.parameters(), *network.buffers()]}


def call(unet: UNet) -> torch.Tensor:
    text = torch.zeros(1, 3, 16, device=META)
    return unet(torch.zeros(1, 4, 8, 8, device=META), torch.zeros(1, device=META), Conditioning(text=text))


def test_idle_networks_are_lent_to_the_device_as_a_whole_and_come_back_as_they_were() -> None:
    unet, tower = tiny_unet(), tiny_text_tower()
    before = {name: tensor for network in (unet, tower) for name, tensor in network.state_dict(keep_vars=True).items()}
    with Offload(META, "idle").using(unet, tower):
        assert places(unet) == places(tower) == {"meta"}
        assert call(unet).device == META
        tower(torch.zeros(1, 16, dtype=torch.int64, device=META))
    after = {name: tensor for network in (unet, tower) for name, tensor in network.state_dict(keep_vars=True).items()}
    assert all(after[name] is before[name] for name in before)


def test_layers_are_lent_one_at_a_time() -> None:
    unet, lent = tiny_unet(), []

    def note(*_: object) -> None:
        lent.append(sum(parameter.device == META for parameter in unet.parameters()))

    with Offload(META, "sequential").using(unet):
        for layer in unet.modules():
            if not any(layer.children()):
                layer.register_forward_pre_hook(note)
        assert call(unet).device == META
    assert max(lent) == 2 and places(unet) == {"cpu"}  # a weight and a bias
    with pytest.raises(RuntimeError, match="device"):
        call(unet)


def test_a_layer_that_fails_comes_back_too() -> None:
    unet = tiny_unet()
    with pytest.raises(RuntimeError), Offload(META, "sequential").using(unet):
        text = torch.zeros(1, 3, 16)  # on the CPU, where no layer is then
        unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), Conditioning(text=text))
    assert places(unet) == {"cpu"}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_batches_are_halved_until_they_fit_and_stay_so(error: Exception) -> None:
    asked: list[tuple[list[int], int, int, int]] = []

    def work(batch: list[int], first: int, done: int, batches: int) -> torch.Tensor:
        asked.append((batch, first, done, batches))
        if len(batch) > 2:
            raise error
        return torch.tensor(batch)

    with pytest.warns(UserWarning, match="for 5 pictures at a time: drawing fewer") as caught:
        found = list(in_batches([*range(6)], 5, work))
    assert len(caught) == 1 and [batch for batch, _ in found] == [[0, 1], [2, 3], [4, 5]]
    assert asked[0] == ([0, 1, 2, 3, 4], 0, 0, 2) and asked[1:] == [
        ([0, 1], 0, 0, 3), ([2, 3], 2, 1, 3), ([4, 5], 4, 2, 3),
    ]  # fmt: skip


def test_one_picture_that_does_not_fit_ends_with_what_to_set() -> None:
    def work(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning), pytest.raises(MemoryError, match="for one picture: set tile=256, offload=seq"):
        list(in_batches(["a", "b"], 2, work))


def test_other_errors_are_left_alone() -> None:
    def work(*_: object) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(["a", "b"], 2, work))


def test_a_mode_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="offload is 'disk', but must be one of none, idle, sequential"):
        Offload(META, "disk")

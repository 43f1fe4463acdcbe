import pytest
import torch
from torch import nn

from ldm.conditioning import Conditioning
from ldm.execution.offload import Offload, in_batches
from ldm.nn.unet import UNet
from tests.tiny import tiny_text_tower, tiny_unet

META = torch.device("meta")  # in place of a GPU: computing with tensors left on the CPU fails


def devices(network: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*network.parameters(), *network.buffers()]}


def call(unet: UNet) -> torch.Tensor:
    text = torch.zeros(1, 3, 16, device=META)
    return unet(torch.zeros(1, 4, 8, 8, device=META), torch.zeros(1, device=META), Conditioning(text=text))


def test_idle_networks_are_moved_to_the_device_and_restored_after_use() -> None:
    unet, tower = tiny_unet(), tiny_text_tower()
    before = {name: tensor for network in (unet, tower) for name, tensor in network.state_dict(keep_vars=True).items()}
    with Offload(META, "idle").using(unet, tower):
        assert devices(unet) == devices(tower) == {"meta"}
        assert call(unet).device == META
        tower(torch.zeros(1, 16, dtype=torch.int64, device=META))
    after = {name: tensor for network in (unet, tower) for name, tensor in network.state_dict(keep_vars=True).items()}
    assert all(after[name] is before[name] for name in before)


def test_sequential_offload_moves_one_layer_at_a_time() -> None:
    unet, moved = tiny_unet(), []

    def record(*_: object) -> None:
        moved.append(sum(parameter.device == META for parameter in unet.parameters()))

    with Offload(META, "sequential").using(unet):
        for layer in unet.modules():
            if not any(layer.children()):
                layer.register_forward_pre_hook(record)
        assert call(unet).device == META
    assert max(moved) == 2 and devices(unet) == {"cpu"}  # a weight and a bias
    with pytest.raises(RuntimeError, match="device"):
        call(unet)


def test_a_layer_is_restored_after_its_call_fails() -> None:
    unet = tiny_unet()
    with pytest.raises(RuntimeError), Offload(META, "sequential").using(unet):
        text = torch.zeros(1, 3, 16)  # on the CPU, unlike the layers
        unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), Conditioning(text=text))
    assert devices(unet) == {"cpu"}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_batches_are_halved_until_they_fit_and_stay_halved(error: Exception) -> None:
    calls: list[tuple[list[int], int, int, int]] = []

    def work(batch: list[int], first: int, done: int, batches: int) -> torch.Tensor:
        calls.append((batch, first, done, batches))
        if len(batch) > 2:
            raise error
        return torch.tensor(batch)

    with pytest.warns(UserWarning, match="out of memory for a batch of 5 images: continuing") as caught:
        found = list(in_batches([*range(6)], 5, work))
    assert len(caught) == 1 and [batch for batch, _ in found] == [[0, 1], [2, 3], [4, 5]]
    assert calls[0] == ([0, 1, 2, 3, 4], 0, 0, 2) and calls[1:] == [
        ([0, 1], 0, 0, 3), ([2, 3], 2, 1, 3), ([4, 5], 4, 2, 3),
    ]  # fmt: skip


def test_out_of_memory_for_a_single_image_says_what_to_set() -> None:
    def work(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning), pytest.raises(MemoryError, match="for a single image: set tile=256, offload=seq"):
        list(in_batches(["a", "b"], 2, work))


def test_errors_other_than_out_of_memory_are_raised() -> None:
    def work(*_: object) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(["a", "b"], 2, work))


def test_an_unknown_offload_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="offload is 'disk', but must be one of none, idle, sequential"):
        Offload(META, "disk")

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.conditioning import Conditioning
from ldm.execution.offload import Offload, in_batches, is_out_of_memory
from ldm.nn.unet import UNet
from ldm.pipeline.pipeline import Pipeline
from tests.meta_device import META, Waits
from tests.tiny import tiny_text_tower, tiny_unet


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


@pytest.mark.parametrize("mode", ["idle", "sequential"])
@pytest.mark.parametrize("masked", [False, True])
def test_tiled_sampling_with_offloaded_networks_leaves_no_weight_on_the_cpu(
    model: str, mode: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight left on the CPU cannot be combined with images on the device."""
    monkeypatch.setattr("ldm.pipeline.networks.to_uint8", lambda images: images.byte())  # it looks for NaN
    pipeline = Pipeline.load(model.removeprefix("model="), "cpu", offload=mode)
    pipeline.networks.offload = Offload(META, mode)
    source = Image.new("RGB", (32, 32))
    inputs = {"image": source, "mask": Image.new("L", (32, 32), 255)} if masked else {}
    with Waits():
        assert pipeline("a red circle", size=(32, 32), tile=16, **inputs).images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUSOLVER_STATUS_ALLOC_FAILED",
        "NCCL error: Cuda failure 2 'out of memory'",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
    ],
)
def test_messages_of_nvidia_libraries_that_mean_out_of_memory_are_recognised(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


def test_other_errors_of_a_gpu_are_not_taken_for_out_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"))

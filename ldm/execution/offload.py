"""Moves networks between an idle device and the one they run on, and reduces the batch size when out of memory."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.execution.offload_modes import MODES

REMEDY = "set tile=256, offload=sequential, precision=bf16 or a smaller size"

# Parts of the messages of the CPU allocator; of CUDA; of cuBLAS, cuDNN and other NVIDIA libraries; and of cuDNN.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "nable to find an engine to execute")

T = TypeVar("T")


@dataclass(frozen=True)
class Offload:
    """Networks run on `device`. With mode "none" they are also kept there.

    Otherwise they are kept elsewhere and copied to it only while in use: with mode "idle" the complete network, with
    "sequential" each layer for its own call, which takes the least memory and the most time.
    """

    device: torch.device
    mode: str = "none"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"offload is {self.mode!r}, but must be one of {', '.join(MODES)}")

    @property
    def idle_device(self) -> torch.device:
        """Where to keep networks that are not in use."""
        return self.device if self.mode == "none" else torch.device("cpu")

    @contextmanager
    def using(self, *networks: nn.Module) -> Iterator[None]:
        """A context in which the networks can be called with tensors on the device."""
        modules = [module for network in networks for module in network.modules()]
        layers = [module for module in modules if not any(module.children())] if self.mode == "sequential" else []
        with ExitStack() as stack:
            if self.mode != "none":
                stack.enter_context(moved(set(modules) - set(layers), self.device))
            for layer in layers:
                stack.enter_context(moved_during_calls(layer, self.device))
            yield


@contextmanager
def moved(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Moves the modules' own tensors, not their children's, and restores the originals afterwards without a copy."""
    originals = []
    try:
        for module in modules:
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                copy = tensor.detach().to(device)
                originals.append((module, name, tensor))
                setattr(module, name, nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy)
        yield
    finally:
        for module, name, tensor in originals:
            setattr(module, name, tensor)


@contextmanager
def moved_during_calls(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves the layer's tensors to the device for the duration of each of its calls."""
    call = ExitStack()
    before = layer.register_forward_pre_hook(lambda module, _: call.enter_context(moved([module], device)))
    after = layer.register_forward_hook(lambda *_: call.close(), always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def in_batches(
    items: list[T],
    size: int,
    work: Callable[[list[T], int, int, int], Tensor],
    on_warning: Callable[[str], None] = warnings.warn,
) -> Iterator[tuple[list[T], Tensor]]:
    """Yields batches of `size` items with work(batch, index of its first item, batches done, batches in total).

    A batch that is out of memory is halved, and so are all later ones; `on_warning` reports the first time. Raises
    MemoryError, with settings that reduce memory, if a single item is out of memory.
    """
    first = done = 0
    initial_size = size
    while first < len(items):
        batch = items[first : first + size]
        try:
            result = work(batch, first, done, done - (first - len(items)) // size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise MemoryError(f"out of memory for a single image: {REMEDY}") from error
        else:
            yield batch, result
            first, done = first + len(batch), done + 1
            continue
        if size == initial_size:
            on_warning(f"out of memory for a batch of {len(batch)} images: continuing with smaller batches")
        size = len(batch) // 2
        torch.cuda.empty_cache()  # effective only here, after the error, and with it the batch's tensors, is released


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the error means out of memory, for which most libraries have no exception class of their own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)

"""Where networks lie while they work and while they wait, and what to do when memory is out."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

MODES = ("none", "idle", "sequential")
MEND = "set tile=256, offload=sequential, precision=bf16 or a smaller size"

T = TypeVar("T")


@dataclass(frozen=True)
class Offload:
    """Networks work on `device`. With mode none they lie there too; else they wait where they are, idle ones as a
    whole and, with mode sequential, each layer until its turn, which takes least memory and most time."""

    device: torch.device
    mode: str = "none"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"offload is {self.mode!r}, but must be one of {', '.join(MODES)}")

    @property
    def home(self) -> torch.device:
        """Where networks wait."""
        return self.device if self.mode == "none" else torch.device("cpu")

    @contextmanager
    def using(self, *networks: nn.Module) -> Iterator[None]:
        """The networks can be called meanwhile, with tensors on the device."""
        modules = [module for network in networks for module in network.modules()]
        layers = [module for module in modules if not any(module.children())] if self.mode == "sequential" else []
        with ExitStack() as stack:
            if self.mode != "none":
                stack.enter_context(lent(set(modules) - set(layers), self.device))
            for layer in layers:
                stack.enter_context(lent_when_called(layer, self.device))
            yield


@contextmanager
def lent(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """The modules' own tensors (not their children's) on the device; afterwards those of before, never copied back."""
    kept = []
    try:
        for module in modules:
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                moved = tensor.detach().to(device)
                kept.append((module, name, tensor))
                setattr(module, name, nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved)
        yield
    finally:
        for module, name, tensor in kept:
            setattr(module, name, tensor)


@contextmanager
def lent_when_called(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """The layer's tensors on the device during each of its calls only."""
    call = ExitStack()
    before = layer.register_forward_pre_hook(lambda module, _: call.enter_context(lent([module], device)))
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
    """Batches of `size` items with work(batch, its first item, batches before, batches in all).

    Where memory is out it is half as many from there on, which `on_warning` reports once. Raises MemoryError, saying
    what to set, if one item is too many.
    """
    first = done = 0
    given = size
    while first < len(items):
        batch = items[first : first + size]
        try:
            result = work(batch, first, done, done - (first - len(items)) // size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise MemoryError(f"memory does not suffice for one picture: {MEND}") from error
        else:
            yield batch, result
            first, done = first + len(batch), done + 1
            continue
        if size == given:
            on_warning(f"memory does not suffice for {len(batch)} pictures at a time: drawing fewer")
        size = len(batch) // 2
        torch.cuda.empty_cache()  # which counts here, once the error, and so what it held, is gone


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is what torch raises then; on the CPU that has no class of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)

"""Divides the images of a call into batches whose prompts name the same LoRA files."""

from collections.abc import Callable, Iterator
from itertools import groupby

from torch import Tensor

from ldm.execution.offload import in_batches
from ldm.pipeline.loras import TaggedLora, TaggedRequest


def tagged_batches(
    tagged: list[TaggedRequest],
    size: int,
    place: Callable[[tuple[TaggedLora, ...]], None],
    work: Callable[[list[TaggedRequest], int, int, int], Tensor],
    warn: Callable[[str], None],
) -> Iterator[tuple[list[TaggedRequest], Tensor, int]]:
    """Yields batches as `in_batches` does, and the batch size; all images of a batch have the same LoRA.

    `place` is called with the LoRA of the batches that follow, which it merges into the networks.
    """
    runs = [[*run] for _, run in groupby(tagged, lambda one: one.loras)]
    first = before = 0
    for number, run in enumerate(runs):
        place(run[0].loras)
        after = sum(-(-len(later) // size) for later in runs[number + 1 :])

        def placed(batch: list[TaggedRequest], start: int, done: int, batches: int) -> Tensor:
            return work(batch, first + start, before + done, before + batches + after)  # noqa: B023

        for count, (batch, images) in enumerate(in_batches(run, size, placed, warn), start=before + 1):
            if count == before + 1 and len(batch) < min(size, len(run)):
                size = len(batch)  # because more were out of memory
            yield batch, images, size
        first, before = first + len(run), count

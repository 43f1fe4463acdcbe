"""Mixes several data sets into one by fixed weights."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

Sample = dict[str, Any]


class Mixture(Dataset[Sample]):
    """Takes weights[k] of every sum(weights) samples from datasets[k], which restarts when it is exhausted.

    An epoch has `length` samples, and sample ids are indices of the mixture. Each sample is a pure function of (draw,
    index).
    """

    def __init__(self, datasets: Sequence[Dataset[Sample]], weights: Sequence[int], length: int) -> None:
        if len(datasets) != len(weights) or not datasets or min(weights) < 1:
            raise ValueError(
                f"a mixture of {len(datasets)} data sets needs one integer weight >= 1 for each of them, not {weights}"
            )
        self.datasets, self.length = list(datasets), length
        self.turns = [(k, turn, weight) for k, weight in enumerate(weights) for turn in range(weight)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        draw, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < self.length:
            raise IndexError(index)
        block, position = divmod(index + draw * self.length, len(self.turns))
        member, turn, weight = self.turns[position]
        passes, inner = divmod(block * weight + turn, len(self.datasets[member]))  # type: ignore[arg-type]
        return {"bad": [], **self.datasets[member][passes, inner], "id": index}

"""Collects the tokens that occur in the captions of data sets."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset


def tokens_of(
    tokenizer: Callable[[list[str]], Tensor], datasets: Sequence[Dataset[dict[str, Any]]], most: int = 10_000
) -> list[int]:
    """Returns the sorted ids of all tokens in the captions of the first `most` samples of each data set."""
    tokens: set[int] = set()
    for dataset in datasets:
        captions = [dataset[index]["caption"] for index in range(min(most, len(dataset)))]  # type: ignore[arg-type]
        tokens.update(tokenizer(captions).flatten().tolist())
    return sorted(tokens)

"""The tokens that a corpus uses."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset


def tokens_of(
    tokenizer: Callable[[list[str]], Tensor], datasets: Sequence[Dataset[dict[str, Any]]], most: int = 10_000
) -> list[int]:
    """Every token id in the captions of the first `most` samples of each data set, rising."""
    tokens: set[int] = set()
    for dataset in datasets:
        captions = [dataset[index]["caption"] for index in range(min(most, len(dataset)))]  # type: ignore[arg-type]
        tokens.update(tokenizer(captions).flatten().tolist())
    return sorted(tokens)

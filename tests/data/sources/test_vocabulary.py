"""The tokens of data sets are collected from their captions."""

import torch
from torch import Tensor

from ldm.data.sources.shapes import Shapes
from ldm.data.sources.vocabulary import tokens_of


def lengths(captions: list[str]) -> Tensor:
    return torch.tensor([[len(caption), 0] for caption in captions])


def test_tokens_are_sorted_and_unique() -> None:
    data = Shapes(seed=2, length=50)
    expected = sorted({0, *(len(data[index]["caption"]) for index in range(50))})
    assert tokens_of(lengths, [data, data]) == expected


def test_only_the_first_samples_are_read() -> None:
    data = Shapes(seed=2, length=50)
    assert tokens_of(lengths, [data], most=1) == sorted({0, len(data[0]["caption"])})

"""The tokens of a corpus."""

import torch
from torch import Tensor

from ldm.data.sources.shapes import Shapes
from ldm.data.sources.vocabulary import tokens_of


def lengths(captions: list[str]) -> Tensor:
    return torch.tensor([[len(caption), 0] for caption in captions])


def test_every_token_is_listed_once_and_rising() -> None:
    data = Shapes(seed=2, length=50)
    expected = sorted({0, *(len(data[index]["caption"]) for index in range(50))})
    assert tokens_of(lengths, [data, data]) == expected


def test_no_more_samples_are_read_than_asked_for() -> None:
    data = Shapes(seed=2, length=50)
    assert tokens_of(lengths, [data], most=1) == sorted({0, len(data[0]["caption"])})

"""Tests of loading a stored network: dtype, memory format, and how much is in memory at a time."""

import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.weights.contents import open_contents
from ldm.weights.model import read_model
from ldm.weights.native import fingerprint
from ldm.weights.storage.values import chunks
from tests.tiny import save_tiny_model
from tests.weights.foreign import ODD, full_model, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_is_loaded_in_the_requested_dtype_and_memory_format(dtype: torch.dtype) -> None:
    stored = full_model(ODD).network("unet")
    loaded = stored.load(dtype, channels_last=True)
    expected = stored.load().to(dtype)
    assert same(loaded.state_dict(), expected.state_dict())
    convolutions = [weight for weight in loaded.parameters() if weight.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)


def test_a_chunk_is_freed_before_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, alive, reads = full_model(ODD).network("unet"), list[weakref.ref[Tensor]](), [0]

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        assert not any(reference() is not None for reference in alive)
        values = {name: tensor.clone() for name, tensor in stored.tensors.read(names).items()}
        alive[:] = [weakref.ref(tensor) for tensor in values.values()]
        reads[0] += 1
        return values

    monkeypatch.setattr("ldm.weights.contents.chunks", partial(chunks, most=2000))
    replace(stored, tensors=replace(stored.tensors, read=read)).load(torch.float16)
    assert reads[0] > 10


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_weights_that_need_no_cast_are_read_at_once(dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, reads = full_model(ODD).network("unet"), list[list[str]]()

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        reads.append(list(names))
        return stored.tensors.read(reads[-1])

    monkeypatch.setattr("ldm.weights.contents.chunks", partial(chunks, most=2000))
    replace(stored, tensors=replace(stored.tensors, read=read)).load(dtype)
    assert [sorted(names) for names in reads] == [sorted(stored.tensors)]


def test_the_memory_format_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    placed = read_model(path, channels_last=True)
    assert placed.backbone.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert fingerprint(placed.backbone.state_dict()) == open_contents(path).network("unet").fingerprint

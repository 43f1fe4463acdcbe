"""Loading a stored network: where and in what form its tensors come to lie, and what lies in memory meanwhile."""

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
def test_it_is_loaded_straight_into_type_and_layout(dtype: torch.dtype) -> None:
    stored = full_model(ODD).network("unet")
    loaded = stored.load(dtype, channels_last=True)
    expected = stored.load().to(dtype)
    assert same(loaded.state_dict(), expected.state_dict())
    convolutions = [weight for weight in loaded.parameters() if weight.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)


def test_what_was_cast_is_let_go_before_more_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_what_needs_no_cast_is_read_in_one_piece_which_takes_one_mapping_of_the_file(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, reads = full_model(ODD).network("unet"), list[list[str]]()

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        reads.append(list(names))
        return stored.tensors.read(reads[-1])

    monkeypatch.setattr("ldm.weights.contents.chunks", partial(chunks, most=2000))
    replace(stored, tensors=replace(stored.tensors, read=read)).load(dtype)
    assert [sorted(names) for names in reads] == [sorted(stored.tensors)]


def test_a_model_s_network_is_placed_and_its_fingerprint_is_the_same(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    placed = read_model(path, channels_last=True)
    assert placed.backbone.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert fingerprint(placed.backbone.state_dict()) == open_contents(path).network("unet").fingerprint

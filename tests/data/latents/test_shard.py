"""Shards of latents are ordinary safetensors files."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ldm.data.latents.shard import map_shard, write_shard
from tests.data.latents.test_cache import CAPTIONS, moments, write_cache


def test_non_contiguous_arrays_are_stored_correctly(tmp_path: Path) -> None:
    transposed = moments(3).transpose(0, 2, 3, 1)
    write_shard(tmp_path / "a.safetensors", transposed, ["a", "b", "c"], [CAPTIONS] * 3, {})
    assert np.array_equal(map_shard(tmp_path / "a.safetensors").moments, transposed)


def test_a_shard_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    stored = load_file(write_cache(tmp_path) / "s0.safetensors")
    assert np.array_equal(stored["moments"], moments(3))
    assert stored["captions"].tobytes().decode() == "".join(CAPTIONS)


def test_caption_states_keep_their_type_and_are_optional(tmp_path: Path) -> None:
    for kind in ("float16", "float32"):
        states = np.random.default_rng(0).normal(size=(4, 5, 2)).astype(kind)
        write_shard(tmp_path / "a.safetensors", moments(2), ["x", "y"], [["a", "b", "c"], ["d"]], {}, states)
        shard = map_shard(tmp_path / "a.safetensors")
        assert shard.states is not None and shard.states.dtype == kind and np.array_equal(shard.states, states)
        assert [[*shard.caption_numbers(row)] for row in range(2)] == [[0, 1, 2], [3]] and "states" in shard.arrays
    write_shard(tmp_path / "a.safetensors", moments(1), ["x"], [["a"]], {})
    assert map_shard(tmp_path / "a.safetensors").states is None

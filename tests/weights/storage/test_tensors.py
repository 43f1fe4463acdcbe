import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.weights.storage.opening import open_tensors
from ldm.weights.storage.tensors import ITEMSIZE, Header
from ldm.weights.storage.values import (
    CHUNK,
    CODES,
    DTYPES,
    check_finite,
    chunks,
    header,
    in_memory,
    verified,
    write_safetensors,
)

STATE = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.tensor(3), "d": torch.ones(5, dtype=torch.bfloat16)}


def saved(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".safetensors"):
        save_file(STATE, path, {"note": "x"})
    else:
        torch.save({"state_dict": STATE, "note": "x", "optimizer": [torch.ones(1)]}, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt", "w.bin"])
def test_headers_are_read_on_opening_and_values_on_demand(tmp_path: Path, name: str) -> None:
    tensors = open_tensors(saved(tmp_path, name))
    assert dict(tensors) == {key: (CODES[t.dtype], t.shape) for key, t in STATE.items()}
    assert tensors.nbytes == sum(t.nbytes for t in STATE.values())
    assert torch.equal(tensors.read(["a"])["a"], STATE["a"]) and tensors.metadata["note"] == "x"


def test_a_plain_dictionary_of_tensors_is_read_like_a_state_dict(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.bin")
    assert open_tensors(tmp_path / "w.bin").keys() == STATE.keys()


def test_a_checkpoint_in_the_legacy_format_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE}, tmp_path / "w.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(open_tensors(tmp_path / "w.ckpt").read(["d"])["d"], STATE["d"])


def sharded(folder: Path) -> Path:
    save_file({"a": STATE["a"]}, folder / "m-1.safetensors")
    save_file({"b.c": STATE["b.c"], "d": STATE["d"]}, folder / "m-2.safetensors")
    index = folder / "m.safetensors.index.json"
    places = {"a": "m-1.safetensors", "b.c": "m-2.safetensors", "d": "m-2.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    return index


def test_shards_are_read_as_one_file(tmp_path: Path) -> None:
    values = open_tensors(sharded(tmp_path)).read(STATE)
    assert all(torch.equal(values[name], STATE[name]) for name in STATE)


def test_a_missing_shard_and_a_shard_without_its_tensor_are_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    save_file({"a": STATE["a"]}, tmp_path / "m-2.safetensors")
    with pytest.raises(ValueError, match=r"m-2\.safetensors contains b\.c, but it does not"):
        open_tensors(index)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights file .*m-2\.safetensors"):
        open_tensors(index)


@pytest.mark.parametrize("places", [{"a": 5}, ["a"], None])
def test_an_invalid_index_is_named(tmp_path: Path, places: object) -> None:
    index = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"m\.safetensors\.index\.json is not an index of sharded weights"):
        open_tensors(index)


def test_safetensors_reads_what_was_written_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    state = {str(dtype): torch.ones(3, 1).to(dtype) for dtype in DTYPES.values()} | STATE
    write_safetensors(tmp_path / "w.safetensors", in_memory(tmp_path, state), {"note": "ä"})
    back = load_file(tmp_path / "w.safetensors")
    assert back.keys() == state.keys()
    assert all(back[k].dtype == t.dtype and torch.equal(back[k].double(), t.double()) for k, t in state.items())
    header = json.loads((tmp_path / "w.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    places = {name: value["data_offsets"][0] for name, value in header.items() if name != "__metadata__"}
    assert all(places[name] % state[name].itemsize == 0 for name in places)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"note": "ä"}


def test_item_sizes_are_those_of_torch() -> None:
    assert {code: dtype.itemsize for code, dtype in DTYPES.items()} == ITEMSIZE
    assert all(Header(code, ()).is_float == dtype.is_floating_point for code, dtype in DTYPES.items())


def test_tensors_of_an_unsupported_dtype_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1, dtype=torch.complex64)}, tmp_path / "w.bin")
    with pytest.raises(ValueError, match=r"w\.bin has tensors of type torch\.complex64"):
        open_tensors(tmp_path / "w.bin")


def test_tensors_are_cast_and_counted_as_they_are_read() -> None:
    counted: list[int] = []
    half = verified(in_memory(Path("x"), STATE), torch.float16, counted.append)
    values = half.read(["a", "b.c"])
    assert {name: header(t) for name, t in values.items()} == {name: half[name] for name in values}
    assert values["a"].dtype == torch.float16 and values["b.c"].dtype == torch.int64 and counted == [2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nan_and_infinity_are_refused_by_name(bad: float, dtype: torch.dtype) -> None:
    weights = torch.zeros(4, dtype=dtype)
    weights[1] = bad
    with pytest.raises(ValueError, match=r"^f: 1 of the 4 values of w are NaN or infinite"):
        check_finite("w", weights, "f")


def test_large_values_whose_sum_overflows_are_not_refused_as_infinite() -> None:
    check_finite("w", torch.full((9,), torch.finfo(torch.float32).max), "f")
    check_finite("w", torch.full((9,), torch.finfo(torch.float16).max, dtype=torch.float16), "f")


def test_chunks_contain_every_name_once_and_exceed_their_size_by_one_tensor_at_most() -> None:
    meta = {str(n): Header("F32", (n,)) for n in range(50)}
    groups = list(chunks(meta, most=400))
    assert [name for group in groups for name in group] == list(meta)
    assert all(sum(meta[name].nbytes for name in group[:-1]) < 400 for group in groups)
    assert CHUNK > 0


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt"])
@pytest.mark.parametrize("content", [b"", b"text, not weights", b"PK\x03\x04 cut short", b"\xff" * 64])
def test_files_of_other_formats_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not a (readable safetensors file|checkpoint)"):
        open_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="download or export it again"):
        open_tensors(path)


def test_an_unknown_extension_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"w\.gguf is not a weights file that ldm reads"):
        open_tensors(tmp_path / "w.gguf")


def test_a_checkpoint_without_named_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match="holds no named tensors"):
        open_tensors(tmp_path / "w.ckpt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a pointer of Git LFS.*git lfs pull"),
        ("\n<!DOCTYPE html><html></html>", "a web page"),
    ],
)
@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt", "w.bin", "w.safetensors.index.json"])
def test_a_file_often_found_in_place_of_weights_is_identified(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        open_tensors(tmp_path / name)

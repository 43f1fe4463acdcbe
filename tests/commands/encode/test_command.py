"""`ldm encode`: ranks, options, captions and printed messages."""

import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.__main__ import main
from ldm.data.latents.cache import CachedLatents, read_manifest
from ldm.data.latents.shard import map_shard
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.weights.parts import first_stage, text_encoder
from tests.data.tars import image_file, samples, write_tar
from tests.tiny import save_part, tiny_text_tower, tiny_vae


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    write_tar(tmp_path / "x.tar", samples(3) | {"0001.png": b""})
    save_part(tmp_path / "vae.safetensors", "vae", tiny_vae())
    stage = ["--first-stage", str(tmp_path / "vae.safetensors")]
    return ["encode", str(tmp_path / "x.tar"), *stage, "--out", str(tmp_path / "out"), "--size", "8", "--workers", "0"]


def test_the_cache_is_encoded_and_bad_samples_are_reported(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "images/s" in output and "of the encoder alone" in output
    assert "2 latents in 1 shards" in output and "1 samples could not be used" in output
    stage = first_stage(str(tmp_path / "vae.safetensors"))
    assert read_manifest(tmp_path / "out")["settings"]["first_stage"] == stage.source["fingerprint"]
    assert [s["key"] for s in CachedLatents(tmp_path / "out", stage, (8, 8))] == ["0000", "0002"]  # type: ignore[attr-defined]
    assert main(arguments) == 0 and "resuming after 1 of 1 shards" in capsys.readouterr().out


def test_a_truncated_shard_is_named_and_encoded_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "y.tar", samples(2, 3))
    arguments.insert(1, str(tmp_path / "y.tar"))
    assert main(arguments) == 0
    path = tmp_path / "out" / "x.safetensors"
    before = path.read_bytes()
    os.truncate(path, len(before) // 2)
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert "run the same ldm encode again, which encodes only the damaged" in capsys.readouterr().out
    assert main(arguments) == 0 and path.read_bytes() == before
    output = capsys.readouterr().out
    assert "resuming after 1 of 2 shards" in output and "the latents of x.tar are truncated or corrupt" in output
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "wrong", [["--size", "7"], ["--size", "0"], ["--buckets", "7"], ["--batch", "0"], ["--workers", "-1"]]
)
def test_invalid_numbers_are_usage_errors(wrong: list[str], arguments: list[str]) -> None:
    assert main([*arguments, *wrong]) == 2


def test_a_cache_in_the_folder_of_the_shards_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[1] = str(tmp_path)
    assert main(arguments) == 1
    assert f"--out {tmp_path}/out is in the shards {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_cache_does_not_depend_on_the_number_of_workers(arguments: list[str], tmp_path: Path) -> None:
    assert main(arguments) == 0 and main([*arguments, "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    assert [path.name for path in sorted((tmp_path / "two").iterdir())] == sorted(os.listdir(tmp_path / "out"))
    for path in (tmp_path / "two").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_all_captions_at_the_given_places_are_stored(arguments: list[str], tmp_path: Path) -> None:
    recaptioned = {"0000.alt.txt": b"another", "0002.syn.json": b'{"syn_text": ["a third", "a fourth"]}'}
    write_tar(tmp_path / "x.tar", samples(3) | recaptioned)
    assert main([*arguments, "--captions", "txt", "alt.txt", "syn.json:syn_text"]) == 0
    shard = map_shard(tmp_path / "out" / "x.safetensors")
    assert [shard.captions_of(row) for row in range(3)] == [
        ["shade 0", "another"], ["shade 1"], ["shade 2", "a third", "a fourth"]
    ]  # fmt: skip
    assert main(arguments) == 1  # the same folder, with other captions


def test_all_ranks_refuse_a_place_of_captions_only_if_no_shard_has_it(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "x.tar", samples(3) | {"0001.alt.txt": b"another"})
    write_tar(tmp_path / "y.tar", samples(2, 3))

    def codes(*places: str) -> list[int]:
        ranks = []
        for rank in "10":
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "2")
            ranks.append(main(["encode", str(tmp_path / "y.tar"), *arguments[1:], "--captions", *places]))
        return ranks

    assert codes("txt", "syn.txt") == [1, 1] and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.count("and 1 more has no .syn.txt file, but captions=['txt', 'syn.txt']") == 2
    assert codes("txt", "alt.txt") == [0, 0] and read_manifest(tmp_path / "out")["samples"] == 5
    assert map_shard(tmp_path / "out" / "x.safetensors").captions_of(1) == ["shade 1", "another"]


@pytest.fixture
def captioned(arguments: list[str], tmp_path: Path) -> list[str]:
    """Arguments for two samples with one caption and one with three, and for a text encoder."""
    write_tar(tmp_path / "x.tar", samples(3) | {"0001.alt.txt": b"a red circle\nblue"})
    save_part(tmp_path / "text.safetensors", "text_tower", tiny_text_tower())
    return [*arguments, "--captions", "txt", "alt.txt:lines", "--text-encoder", str(tmp_path / "text.safetensors")]


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 1e-3), ("float32", 1e-6)])
@pytest.mark.parametrize("load", ["mapped", "memory"])
def test_each_draw_has_the_states_of_its_caption(
    captioned: list[str], tmp_path: Path, dtype: str, digits: float, load: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*captioned, "--text-dtype", dtype]) == 0 and main(["verify", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    size = 16 * 16 * np.dtype(dtype).itemsize
    assert f"caption states: {size:,} bytes each, 16 tokens x 16 in {dtype}; 0 MB for 3 images" in output
    stage, text = first_stage(str(tmp_path / "vae.safetensors")), text_encoder(str(tmp_path / "text.safetensors"))
    cache = CachedLatents(tmp_path / "out", stage, (8, 8), load=load, seed=3, text_encoder=text)
    without = CachedLatents(tmp_path / "out", stage, (8, 8), seed=3)
    seen = set()
    for draw, row in product(range(8), range(3)):
        sample = cache[draw, row]
        expected = text.network.encode([sample["caption"]]).get("text")[0].detach()
        torch.testing.assert_close(sample["states"].float(), expected, rtol=digits, atol=digits)
        assert sample["caption"] == without[draw, row]["caption"] and "states" not in without[draw, row]
        seen.add(sample["caption"])
    assert seen == {"shade 0", "shade 1", "shade 2", "a red circle", "blue"}


def test_caption_states_of_another_encoder_or_type_are_refused(
    captioned: list[str], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(captioned) == 0 and main(captioned) == 0
    stage, text = first_stage(str(tmp_path / "vae.safetensors")), text_encoder(str(tmp_path / "text.safetensors"))
    save_part(tmp_path / "other.safetensors", "text_tower", tiny_text_tower(seed=9))
    other = text_encoder(str(tmp_path / "other.safetensors"))
    padded = TextEncoder([*text.network.towers], [Tokenizer(context=16, pad=0)])
    for wrong, message in (
        (other, "with text_encoder .*, not "),
        (replace(text, network=padded), "text_pad 49407, not 0"),
    ):
        with pytest.raises(ValueError, match=f"was encoded {message}" if wrong is other else message):
            CachedLatents(tmp_path / "out", stage, (8, 8), text_encoder=wrong)
    assert main([*captioned, "--text-dtype", "float32"]) == 1
    assert main(captioned[: captioned.index("--text-encoder")]) == 1  # the same folder, without states
    assert "was encoded with text_encoder" in capsys.readouterr().err
    assert main([*arguments, "--text-dtype", "float32"]) == 2
    assert main([*arguments, "--out", str(tmp_path / "none")]) == 0
    with pytest.raises(ValueError, match="has no caption states: set data=latents, or encode"):
        CachedLatents(tmp_path / "none", stage, (8, 8), text_encoder=text)


def test_caption_states_that_overflow_are_refused(
    captioned: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tiny_text_tower()
    large.norm.weight.data.mul_(1e6)
    save_part(tmp_path / "text.safetensors", "text_tower", large)
    assert main(captioned) == 1 and "overflow in float16: give --text-dtype float32" in capsys.readouterr().err
    assert main([*captioned, "--text-dtype", "float32"]) == 0


def test_encoding_fails_if_no_sample_is_usable(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "x.tar", samples(3) | {f"{k:04d}.json": b"{}" for k in range(3)})
    assert main([*arguments, "--captions", "json:caption"]) == 1
    assert "none of 3 samples could be used; " in capsys.readouterr().err


@pytest.mark.parametrize("place", ["png", "json:", "lines.txt"])
def test_an_invalid_or_missing_place_of_captions_is_refused(place: str, arguments: list[str], tmp_path: Path) -> None:
    assert main([*arguments, "--captions", "txt", place]) == 1 and not (tmp_path / "out").exists()


def test_buckets_give_a_cache_of_several_sizes_and_the_settings_to_train(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    squares = {f"{key}.png": image_file(9, (9, 9)) for key in "ab"} | {f"{key}.txt": b"" for key in "ab"}
    write_tar(tmp_path / "x.tar", samples(3) | squares)
    assert main([*arguments, "--size", "64", "--buckets", "16"]) == 0
    assert "5 latents in 3 shards" in (output := capsys.readouterr().out) and "data.bucketed=true" in output
    shards = read_manifest(tmp_path / "out")["shards"]
    assert {tuple(shard["size"]): shard["samples"] for shard in shards} == {(48, 80): 3, (64, 64): 2, (80, 48): 0}
    assert main(["verify", str(tmp_path / "out")]) == 0

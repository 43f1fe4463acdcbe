"""`ldm encode`: ranks, refusals, and what it says."""

import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.__main__ import main
from ldm.commands.encode import ranks
from ldm.data.latents.cache import CachedLatents, read_manifest
from ldm.data.latents.shard import map_shard
from ldm.nn.text_encoder import TextEncoder
from ldm.nn.tokenizer import Tokenizer
from ldm.weights.parts import first_stage, text_encoder
from tests.data.tars import picture, samples, write_tar
from tests.tiny import save_part, tiny_text_tower, tiny_vae


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    write_tar(tmp_path / "x.tar", samples(3) | {"0001.png": b""})
    save_part(tmp_path / "vae.safetensors", "vae", tiny_vae())
    stage = ["--first-stage", str(tmp_path / "vae.safetensors")]
    return ["encode", str(tmp_path / "x.tar"), *stage, "--out", str(tmp_path / "out"), "--size", "8", "--workers", "0"]


def test_the_cache_is_of_the_given_first_stage_and_what_was_bad_is_told(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "pictures/s" in told and "of the encoder's own" in told
    assert "2 latents in 1 shards" in told and "1 samples could not be used" in told
    stage = first_stage(str(tmp_path / "vae.safetensors"))
    assert read_manifest(tmp_path / "out")["settings"]["first_stage"] == stage.source["fingerprint"]
    assert [s["key"] for s in CachedLatents(tmp_path / "out", stage, (8, 8))] == ["0000", "0002"]  # type: ignore[attr-defined]
    assert main(arguments) == 0 and "going on after 1 of 1 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [["--size", "7"], ["--size", "0"], ["--buckets", "7"], ["--batch", "0"], ["--workers", "-1"]]
)
def test_numbers_that_make_no_sense_are_usage_errors(wrong: list[str], arguments: list[str]) -> None:
    assert main([*arguments, *wrong]) == 2


def test_a_cache_among_the_shards_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[1] = str(tmp_path)
    assert main(arguments) == 1
    assert f"--out {tmp_path}/out is in the shards {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names", [("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")]
)
def test_torchrun_and_slurm_say_the_rank(
    names: tuple[str, ...], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranks() == (0, 1, 0)
    for name, value in zip(names, "583", strict=True):
        monkeypatch.setenv(name, value)
    assert ranks() == (5, 8, 3)
    monkeypatch.setenv(names[0], "8")
    with pytest.raises(ValueError, match="a rank below"):
        ranks()


def test_workers_make_the_same_cache(arguments: list[str], tmp_path: Path) -> None:
    assert main(arguments) == 0 and main([*arguments, "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    assert [path.name for path in sorted((tmp_path / "two").iterdir())] == sorted(os.listdir(tmp_path / "out"))
    for path in (tmp_path / "two").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_all_captions_at_the_places_given_are_kept(arguments: list[str], tmp_path: Path) -> None:
    recaptioned = {"0000.alt.txt": b"another", "0002.syn.json": b'{"syn_text": ["a third", "a fourth"]}'}
    write_tar(tmp_path / "x.tar", samples(3) | recaptioned)
    assert main([*arguments, "--captions", "txt", "alt.txt", "syn.json:syn_text"]) == 0
    shard = map_shard(tmp_path / "out" / "x.safetensors")
    assert [shard.captions_of(row) for row in range(3)] == [
        ["shade 0", "another"], ["shade 1"], ["shade 2", "a third", "a fourth"]
    ]  # fmt: skip
    assert main(arguments) == 1  # the same folder, with other captions


def test_a_place_of_captions_in_any_ranks_shards_is_one_for_all_and_one_in_none_is_refused_by_all(
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
    assert capsys.readouterr().err.count("and 1 more holds no .syn.txt, which captions=['txt', 'syn.txt']") == 2
    assert codes("txt", "alt.txt") == [0, 0] and read_manifest(tmp_path / "out")["samples"] == 5
    assert map_shard(tmp_path / "out" / "x.safetensors").captions_of(1) == ["shade 1", "another"]


@pytest.fixture
def captioned(arguments: list[str], tmp_path: Path) -> list[str]:
    """Two samples with one caption each and one with three, and the text encoder of their states."""
    write_tar(tmp_path / "x.tar", samples(3) | {"0001.alt.txt": b"a red circle\nblue"})
    save_part(tmp_path / "text.safetensors", "text_tower", tiny_text_tower())
    return [*arguments, "--captions", "txt", "alt.txt:lines", "--text-encoder", str(tmp_path / "text.safetensors")]


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 1e-3), ("float32", 1e-6)])
@pytest.mark.parametrize("load", ["mapped", "memory"])
def test_each_draw_has_the_states_of_the_caption_that_it_has(
    captioned: list[str], tmp_path: Path, dtype: str, digits: float, load: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*captioned, "--text-dtype", dtype]) == 0 and main(["verify", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    size = 16 * 16 * np.dtype(dtype).itemsize
    assert f"states of captions: {size:,} bytes each, 16 tokens x 16 in {dtype}; 0 MB for 3 pictures" in told
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


def test_states_of_another_text_encoder_another_type_or_none_are_refused(
    captioned: list[str], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(captioned) == 0 and main(captioned) == 0
    stage, text = first_stage(str(tmp_path / "vae.safetensors")), text_encoder(str(tmp_path / "text.safetensors"))
    save_part(tmp_path / "other.safetensors", "text_tower", tiny_text_tower(seed=9))
    other = text_encoder(str(tmp_path / "other.safetensors"))
    padded = TextEncoder([*text.network.towers], [Tokenizer(context=16, pad=0)])
    for wrong, told in (
        (other, "with text_encoder .*, not "),
        (replace(text, network=padded), "text_pad 49407, not 0"),
    ):
        with pytest.raises(ValueError, match=f"was encoded {told}" if wrong is other else told):
            CachedLatents(tmp_path / "out", stage, (8, 8), text_encoder=wrong)
    assert main([*captioned, "--text-dtype", "float32"]) == 1
    assert main(captioned[: captioned.index("--text-encoder")]) == 1  # the same folder, without states
    assert "was encoded with text_encoder" in capsys.readouterr().err
    assert main([*arguments, "--text-dtype", "float32"]) == 2
    assert main([*arguments, "--out", str(tmp_path / "none")]) == 0
    with pytest.raises(ValueError, match="holds no states of captions: set data=latents, or encode"):
        CachedLatents(tmp_path / "none", stage, (8, 8), text_encoder=text)


def test_states_that_the_type_does_not_hold_are_refused(
    captioned: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = tiny_text_tower()
    loud.norm.weight.data.mul_(1e6)
    save_part(tmp_path / "text.safetensors", "text_tower", loud)
    assert main(captioned) == 1 and "do not fit in float16: give --text-dtype float32" in capsys.readouterr().err
    assert main([*captioned, "--text-dtype", "float32"]) == 0


def test_samples_of_which_none_can_be_used_are_a_failure(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "x.tar", samples(3) | {f"{k:04d}.json": b"{}" for k in range(3)})
    assert main([*arguments, "--captions", "json:caption"]) == 1
    assert "none of 3 samples could be used: see" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["png", "json:", "lines.txt"])
def test_a_place_without_captions_is_refused(place: str, arguments: list[str], tmp_path: Path) -> None:
    assert main([*arguments, "--captions", "txt", place]) == 1 and not (tmp_path / "out").exists()


def test_buckets_make_a_cache_of_several_sizes_that_says_how_to_train_on_it(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    squares = {f"{key}.png": picture(9, (9, 9)) for key in "ab"} | {f"{key}.txt": b"" for key in "ab"}
    write_tar(tmp_path / "x.tar", samples(3) | squares)
    assert main([*arguments, "--size", "64", "--buckets", "16"]) == 0
    assert "5 latents in 3 shards" in (told := capsys.readouterr().out) and "data.bucketed=true" in told
    shards = read_manifest(tmp_path / "out")["shards"]
    assert {tuple(shard["size"]): shard["samples"] for shard in shards} == {(48, 80): 3, (64, 64): 2, (80, 48): 0}
    assert main(["verify", str(tmp_path / "out")]) == 0

"""Latents in memory, also if read from the disk, equal those of encoding each image individually."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm.files
from ldm.data.latents import store
from ldm.data.latents.in_memory import InMemory
from ldm.data.loading.datamodule import DataModule
from ldm.data.sources.shapes import Shapes
from ldm.weights.parts import Encoder, Frozen
from tests.tiny import tiny_vae
from tests.training.tiny import Images


class Counting:
    """An encoder that counts its images."""

    def __init__(self, weights: str = "a") -> None:
        self.identity = {"first_stage": weights}
        self.images = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        return images.float().mean((2, 3), keepdim=True)


def shapes(folder: Path | None, count: int = 10, encode: Counting | None = None, **settings: Any) -> InMemory:
    setting = None if folder is None else str(folder)
    return InMemory(Shapes(**{"seed": 1, **settings}), encode or Counting(), count, batch_size=4, store=setting)


def samples(latents: InMemory) -> list[tuple[str, int, list[float]]]:
    return [(s["caption"], s["id"], s["moments"].flatten().tolist()) for s in (latents[k] for k in range(len(latents)))]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("loaded", [True, False])
def test_samples_have_their_moments_and_no_image(loaded: bool) -> None:
    data, latents = Shapes(seed=1), shapes(None)
    if loaded:
        latents.load()
    assert len(latents) == 10
    for index in range(10):
        sample, original = latents[3, index], data[index]
        assert "image" not in sample
        assert (sample["caption"], sample["id"]) == (original["caption"], original["id"])
        torch.testing.assert_close(sample["moments"], Counting()(original["image"][None])[0])


def test_a_count_of_zero_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        InMemory(Shapes(), Counting(), count=0)


def test_nothing_is_encoded_before_it_is_needed() -> None:
    encode = Counting()
    data = DataModule(shapes(None, encode=encode), {}, batch_size=2)
    assert encode.images == 0
    next(iter(data.samples_of_each_size()))
    assert encode.images == 4
    data.train_dataloader()
    assert encode.images == 10


def test_a_second_run_reads_the_same_samples_without_encoding_them(tmp_path: Path) -> None:
    first, encode = shapes(tmp_path), Counting()
    first.load()
    second = shapes(tmp_path, encode=encode)
    second.load()
    assert samples(second) == samples(first) == samples(shapes(None)) and encode.images == 0


def test_a_real_first_stage_gives_the_same_bits_from_the_disk(tmp_path: Path) -> None:
    frozen = Frozen(tiny_vae(), {"fingerprint": "f"})
    runs = [InMemory(Shapes(seed=1), Encoder(frozen), 6, batch_size=4, store=str(tmp_path)) for _ in range(2)]
    for latents in runs:
        latents.load()
    assert all(torch.equal(runs[0][k]["moments"], runs[1][k]["moments"]) for k in range(6))


def test_a_change_of_anything_that_determines_the_encoding_changes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [{}, {"seed": 2}, {"split": "held_out"}, {"size": 32}, {"variants": 2}, {"count": 9}]
    for number, settings in enumerate([*variants, {"encode": Counting("b")}], 1):
        shapes(tmp_path, **settings).load()  # type: ignore[arg-type]
        assert len(files(tmp_path)) == number + 1  # plus the lock file
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    shapes(tmp_path).load()
    monkeypatch.setattr(store, "code_digest", lambda: "changed")
    shapes(tmp_path).load()
    assert len(files(tmp_path)) == len(variants) + 1 + 2 + 1


@pytest.mark.parametrize("length", [0, 50, -1, None])
def test_a_damaged_file_is_encoded_again(tmp_path: Path, length: int | None) -> None:
    shapes(tmp_path).load()
    (path,) = tmp_path.glob("*.safetensors")
    intact = path.read_bytes()
    path.write_bytes(intact[:length] if length is not None else intact[:-1] + bytes([intact[-1] ^ 1]))
    again = shapes(tmp_path, encode=(encode := Counting()))
    again.load()
    assert encode.images == 10 and samples(again) == samples(shapes(None)) and path.read_bytes() == intact


def _load(folder: Path, moment: int | None) -> None:
    """Loads in a separate process, which kills itself instead of calling the rename number `moment`."""
    replace = os.replace

    def killed(*paths: Any) -> None:
        if moment is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    ldm.files.os.replace = killed  # type: ignore[attr-defined]
    shapes(folder, count=40).load()


def test_processes_that_run_at_once_or_are_killed_leave_one_complete_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_load, args=(tmp_path, moment)) for moment in (0, None, None, 0, None)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes].count(0) >= 3
    last = shapes(tmp_path, count=40)
    last.load()
    assert samples(last) == samples(shapes(None, count=40))
    shapes(tmp_path, count=39).load()  # removes files left by killed processes
    assert [name for name in files(tmp_path) if name.endswith(".tmp")] == []


def test_the_least_recently_used_files_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (7, 8, 9):
        shapes(tmp_path, count).load()
    by_age = sorted(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    for age, path in enumerate(by_age):
        os.utime(path, (1000 + age, 1000 + age))
    shapes(tmp_path, 7).load()
    shapes(tmp_path, 10).load()
    (path,) = {*tmp_path.glob("*.safetensors")} - {*by_age}
    size = path.stat().st_size
    path.unlink()
    monkeypatch.setattr(store, "LIMIT", 2 * size)  # the header is not counted
    shapes(tmp_path, 10).load()
    left = {path for path in by_age if path.exists()}
    assert left == {by_age[0]} and len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_folder_that_cannot_be_written_only_causes_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    latents = shapes(tmp_path / "file" / "store")
    with pytest.warns(UserWarning, match="every start encodes them again .*: set data.latent_store to"):
        latents.load()
    assert samples(latents) == samples(shapes(None))


def test_a_data_set_without_an_identity_is_not_stored(tmp_path: Path) -> None:
    data = [Shapes(seed=1)[k] for k in range(3)]
    InMemory(data, Counting(), 3, store=str(tmp_path)).load()  # type: ignore[arg-type]
    assert files(tmp_path) == []


def average(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean((2, 3), keepdim=True)


class Drawn(Images):
    """Images in two sizes, whose pixels and captions are determined by (draw, index)."""

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, object]:
        draw, index = key if isinstance(key, tuple) else (0, key)
        image = torch.full((3, 4 + 4 * (index % 2), 4), 10 * draw + index, dtype=torch.uint8)
        return {"image": image, "caption": f"{index % 2}", "id": index}


def test_the_kept_draws_repeat_in_order() -> None:
    latents = InMemory(Drawn(5), average, draws=3, batch_size=4)
    for draw in range(7):
        assert [float(latents[draw, k]["moments"][0, 0, 0]) for k in range(5)] == [
            10 * (draw % 3) + k for k in range(5)
        ]


def test_without_an_encoder_the_images_are_kept() -> None:
    images = InMemory(Drawn(5), draws=2)
    assert torch.equal(images[1, 2]["image"], Drawn(5)[1, 2]["image"])  # type: ignore[arg-type]


def test_each_caption_is_encoded_once() -> None:
    seen: list[str] = []

    def states(captions: list[str]) -> torch.Tensor:
        seen.extend(captions)
        return torch.tensor([[[float(caption)]] for caption in captions])

    latents = InMemory(Drawn(5), average, draws=2, encode_captions=states)
    assert seen == ["0", "1"]
    assert [float(latents[1, k]["states"]) for k in range(5)] == [0, 1, 0, 1, 0]

"""Tests how small data sets are split, repeated and validated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.loading.order import BucketOrder
from ldm.data.sources.folder import Folder
from ldm.data.sources.small import OTHER, Noises, Repeated, SmallSplit, note_of
from tests.training.tiny import Images


def folder(root: Path, count: int, **how: object) -> Folder:
    rng = np.random.default_rng(0)
    for k in range(count):
        height, width = ((16, 16), (16, 32))[k % 2]
        Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)).save(root / f"{k:02}.png")
    return Folder(root, 16, caption="a photo of sks dog", **how)  # type: ignore[arg-type]


def keys(dataset: SmallSplit) -> set[str]:
    return {dataset[k]["key"] for k in range(len(dataset))}


@pytest.mark.parametrize(("count", "held_out"), [(16, 1), (31, 1), (48, 3)])
def test_one_in_sixteen_images_is_held_out_exactly(count: int, held_out: int, tmp_path: Path) -> None:
    data = folder(tmp_path, count)
    train, val = SmallSplit(data, "train"), SmallSplit(data, "held_out")
    assert (len(train), len(val)) == (count - held_out, held_out)
    assert keys(train).isdisjoint(keys(val)) and len(keys(train) | keys(val)) == count
    assert note_of(Noises(val, 4)) == f"{held_out} of {count} images, held out from training"


def test_with_five_images_validation_uses_the_training_images_at_other_noise(tmp_path: Path) -> None:
    data = folder(tmp_path, 5)
    train, val = (SmallSplit(data, part) for part in ("train", "held_out"))  # type: ignore[arg-type]
    assert keys(train) == keys(val) and len(train) == 5
    noises = Noises(val, 3)
    assert note_of(noises) == "all 5 images, which are also trained on, at other noise"
    ids = [noises[k]["id"] for k in range(len(noises))]
    assert len({*ids}) == 15 and min(ids) >= OTHER > len(Repeated(train, 256))
    assert [noises[k]["key"] for k in range(3)] == [val[0]["key"]] * 3


def test_an_epoch_of_a_small_set_repeats_it_in_full_with_different_draws(tmp_path: Path) -> None:
    images = folder(tmp_path, 5, crop="random")
    data = Repeated(images, at_least=12)
    assert len(data) == 15
    samples = [data[draw, k] for draw in range(2) for k in range(15)]
    assert [sample["id"] for sample in samples] == [*range(15)] * 2
    expected = [images[draw, k]["image"] for draw in range(6) for k in range(5)]
    assert all(torch.equal(sample["image"], image) for sample, image in zip(samples, expected, strict=True))


def test_images_of_any_size_train_in_buckets_of_their_aspect_ratio(tmp_path: Path) -> None:
    data = Repeated(SmallSplit(folder(tmp_path, 5, bucketed=True, bucket_step=4), "train"), at_least=20)
    shapes = [tuple(data[k]["image"].shape[1:]) for k in range(len(data))]
    assert len({*shapes}) == 2 and all(height * width <= 256 for height, width in shapes)
    assert all(len({shapes[k] for _, k in batch}) == 1 for batch in BucketOrder(data.buckets, batch_size=2))


def test_a_caption_for_all_images_keeps_existing_captions(tmp_path: Path) -> None:
    data = folder(tmp_path, 2)
    (tmp_path / "00.txt").write_text("a cat")
    captions = [sample["caption"] for sample in (Folder(tmp_path, 16, caption="a photo of sks dog")[k] for k in (0, 1))]
    assert captions == ["a cat", "a photo of sks dog"] and len(data) == 2


def test_an_index_beyond_the_end_is_refused() -> None:
    for data in (Noises(Images(), 2), Repeated(Images(), 20)):
        with pytest.raises(IndexError):
            data[len(data)]

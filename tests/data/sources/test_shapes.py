"""Procedural shapes are a pure function of seed and index, match their captions, and have fixed splits."""

import colorsys
import math
from typing import Any

import numpy as np
import pytest
import torch

from ldm.data.sources.phrasing import parse
from ldm.data.sources.scene import BACKGROUNDS, HUES, SHAPES, UNSEEN
from ldm.data.sources.shapes import Crowds, Placed, Shapes, held_out_prompts, render, signed_distance


def test_a_sample_is_a_pure_function_of_seed_and_index() -> None:
    one, other = Shapes(seed=3)[17], Shapes(seed=3)[17]
    assert torch.equal(one["image"], other["image"]) and one["caption"] == other["caption"]
    assert not torch.equal(one["image"], Shapes(seed=4)[17]["image"])
    assert torch.equal(Crowds(3)[17]["image"], Crowds(3)[17]["image"])


def test_captions_are_parsed_back_to_their_scenes() -> None:
    for index in range(300):
        scene, _ = Shapes(seed=5).scene(index)
        assert parse(scene.caption) == scene


@pytest.mark.parametrize("text", ["a cat", "a circle", "a red circle on a green background", "three red circles"])
def test_text_that_does_not_describe_shapes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"shapes|background"):
        parse(text)


def test_splits_share_no_caption_and_training_has_no_unseen_pair() -> None:
    captions = {
        split: {Shapes(6, split).scene(index)[0].caption for index in range(400)}  # type: ignore[arg-type]
        for split in ("train", "held_out", "unseen")
    }
    assert not captions["train"] & captions["held_out"] and not captions["train"] & captions["unseen"]
    pairs = {(thing.color, thing.shape) for caption in captions["train"] for thing in parse(caption).things}
    assert not pairs & UNSEEN


def test_near_misses_stay_in_their_split() -> None:
    data = Shapes(seed=7, variants=4)
    scenes = [data.scene(index)[0] for index in range(200)]
    assert all(scene.split == "train" for scene in scenes)
    assert any(scenes[index] != scenes[index + 1] for index in range(0, 200, 4))


def test_colours_have_their_hue_and_are_vivid() -> None:
    for index in range(200):
        scene, placed = Shapes(seed=8).scene(index)
        for thing, rendered in zip(scene.things, placed, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in rendered.rgb))
            assert abs((360 * hue - HUES[thing.color] + 180) % 360 - 180) <= 3.001
            assert saturation >= 0.6 and value >= 0.6


def test_things_are_inside_the_image_and_do_not_overlap() -> None:
    for index in range(300):
        scene, placed = Shapes(seed=9).scene(index)
        alone = [render([thing], scene.background).astype(int) - BACKGROUNDS[scene.background] for thing in placed]
        covered = [np.abs(difference).max(-1) > 40 for difference in alone]  # except for the faint tips of stars
        assert not any(mask[[0, -1]].any() or mask[:, [0, -1]].any() for mask in covered)
        assert len(covered) == 1 or not (covered[0] & covered[1]).any()


@pytest.mark.parametrize(("shape", "area"), [("circle", math.pi), ("square", 4 * 0.88**2), ("diamond", 2 * 1.2**2)])
def test_anti_aliasing_keeps_the_area(shape: str, area: float) -> None:
    radius = 11.3
    white = render([Placed(shape, 31.7, 32.4, radius, (255.0, 255.0, 255.0))], "black")
    assert white[..., 0].sum() / 255 == pytest.approx(area * radius**2, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_larger_image_has_the_same_content(shape: str) -> None:
    placed = [Placed(shape, 30.0, 33.0, 12.0, (200.0, 40.0, 90.0))]
    small, large = render(placed, "gray").astype(float), render(placed, "gray", 128).astype(float)
    halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(small - halved).mean() < 1


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="blob"):
        signed_distance("blob", np.zeros(1), np.zeros(1), 1.0)


def test_held_out_prompts_differ_and_are_never_trained_on() -> None:
    prompts = held_out_prompts(128)
    assert len(set(prompts)) == 128
    splits = [parse(prompt).split for prompt in prompts]
    assert splits.count("unseen") == 16 and "train" not in splits


@pytest.mark.parametrize("split", ["test", None])
def test_an_unknown_split_is_refused(split: Any) -> None:
    with pytest.raises(ValueError, match=f"is {split}, but must be one of train, held_out, unseen"):
        Shapes(split=split)

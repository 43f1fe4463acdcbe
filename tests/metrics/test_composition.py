"""The checker of compositions, on ground truth, on what the first stage makes of it, and on deliberate errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.data.shapes import BACKGROUNDS, HUES, RELATIONS, SHAPES, Placed, Scene, Shapes, place, render
from ldm.image import from_uint8, to_uint8
from ldm.metrics.composition import accuracy, check
from ldm.weights.parts import first_stage

NEIGHBOURS = dict(zip(HUES, [*list(HUES)[1:], "red"], strict=True))


def pictures(count: int, split: str = "held_out") -> tuple[Tensor, list[str]]:
    data = Shapes(seed=11, split=split)  # type: ignore[arg-type]
    samples = [data[index] for index in range(count)]
    return torch.stack([sample["image"] for sample in samples]), [sample["caption"] for sample in samples]


def drawn(placed: list[Placed], background: str) -> Tensor:
    return torch.from_numpy(render(placed, background)).permute(2, 0, 1)


@pytest.mark.parametrize("split", ["train", "held_out", "unseen"])
def test_rendered_ground_truth_is_right(split: str) -> None:
    assert accuracy(*pictures(400, split))["accuracy"] >= 0.995


def test_what_the_shipped_first_stage_makes_of_ground_truth_is_right() -> None:
    images, captions = pictures(400)
    vae = first_stage("assets:vae.safetensors").network
    with torch.no_grad():
        decoded = to_uint8(vae.decode(vae.encode(from_uint8(images))).clamp(-1, 1))
    assert accuracy(decoded, captions)["accuracy"] >= 0.995


def test_noise_of_six_levels_does_no_harm() -> None:
    images, captions = pictures(200)
    noise = 6 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert accuracy((images + noise).round().clamp(0, 255).byte(), captions)["accuracy"] >= 0.995


def wrong(scene: Scene, kind: str, rng: np.random.Generator) -> Scene | None:
    """The scene with one error of a kind, or None where it cannot have it."""
    first, *rest = scene.things
    if kind == "color":
        color = NEIGHBOURS[first.color]
        return None if any(thing.color == color for thing in rest) else _with(scene, replace(first, color=color))
    if kind == "shape":
        return _with(scene, replace(first, shape=str(rng.choice([shape for shape in SHAPES if shape != first.shape]))))
    if kind == "size":
        return first.size and _with(scene, replace(first, size={"big": "small", "small": "big"}[first.size]))  # type: ignore[return-value]
    if kind == "relation":
        return scene.relation and replace(
            scene, relation=str(rng.choice([r for r in RELATIONS if r != scene.relation]))
        )  # type: ignore[return-value]
    others = [background for background in BACKGROUNDS if background != scene.background]
    return replace(scene, background=str(rng.choice(others)))


def _with(scene: Scene, first: object) -> Scene:
    return replace(scene, things=(first, *scene.things[1:]))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["color", "shape", "size", "relation", "background"])
def test_one_error_of_each_kind_is_caught_by_its_own_flag(kind: str) -> None:
    rng = np.random.default_rng(0)
    caught = []
    for index in range(200):
        scene = Shapes(seed=12).scene(index)[0]
        if error := wrong(scene, kind, rng):
            caught.append(not getattr(check(drawn(place(error, rng), error.background), scene), kind))
    assert len(caught) >= 80
    assert np.mean(caught) >= 0.995


def test_a_thing_that_is_missing_or_extra_is_caught() -> None:
    for index in range(100):
        scene, placed = Shapes(seed=13).scene(index)
        if scene.relation:
            assert not check(drawn(placed[:1], scene.background), scene).count
            single = Scene(scene.things[:1], None, scene.background)
            assert not check(drawn(placed, scene.background), single).count


def test_a_half_erased_thing_is_no_shape() -> None:
    verdicts = []
    for index in range(100):
        scene, placed = Shapes(seed=14).scene(index)
        image, level = drawn(placed, scene.background).clone(), BACKGROUNDS[scene.background]
        image[:, :, : int(placed[0].x)] = level
        verdicts.append(check(image, scene).ok)
    assert not any(verdicts)


def test_a_blend_of_two_shapes_is_neither() -> None:
    caught = []
    for index in range(100):
        scene, placed = Shapes(seed=15).scene(index)
        if not scene.relation:
            other = replace(placed[0], shape="star" if placed[0].shape != "star" else "square")
            pair = [drawn([thing], scene.background).float() for thing in (placed[0], other)]
            caught.append(not check(((pair[0] + pair[1]) / 2).byte(), scene).ok)
    assert np.mean(caught) >= 0.9  # a circle and a square, say, are the same but for a few faint pixels


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        accuracy(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a red circle on a white background"])

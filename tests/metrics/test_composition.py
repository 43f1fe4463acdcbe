"""Tests of the composition checker on rendered ground truth, on its reconstructions, and on deliberate errors."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ldm.data.sources.scene import BACKGROUNDS, HUES, RELATIONS, SHAPES, Scene, Thing
from ldm.data.sources.shapes import DISTANCES, Placed, Shapes, place, render
from ldm.image import from_uint8, to_uint8
from ldm.metrics.composition import Known, Verdict, accuracy, check, compare, see
from ldm.weights.parts import first_stage

NEIGHBOURS = dict(zip(HUES, [*list(HUES)[1:], "red"], strict=True))


def samples(count: int, split: str = "held_out") -> tuple[Tensor, list[str]]:
    data = Shapes(seed=11, split=split)  # type: ignore[arg-type]
    chosen = [data[index] for index in range(count)]
    return torch.stack([sample["image"] for sample in chosen]), [sample["caption"] for sample in chosen]


def rendered(placed: list[Placed], background: str) -> Tensor:
    return torch.from_numpy(render(placed, background)).permute(2, 0, 1)


@pytest.mark.parametrize("split", ["held_out", *(pytest.param(x, marks=pytest.mark.slow) for x in ("train", "unseen"))])
def test_rendered_ground_truth_satisfies_its_captions(split: str) -> None:
    assert accuracy(*samples(400, split))["accuracy"] >= 0.995


@pytest.mark.slow
def test_reconstructions_of_the_shipped_first_stage_satisfy_their_captions() -> None:
    images, captions = samples(400)
    vae = first_stage("assets:vae.safetensors").network
    with torch.no_grad():
        decoded = to_uint8(vae.decode(vae.encode(from_uint8(images))).clamp(-1, 1))
    assert accuracy(decoded, captions)["accuracy"] >= 0.995


def blurred(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return gaussian_filter(image.astype(np.float32), (0.7, 0.7, 0))


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image + rng.normal(0, 6, image.shape)


def tinted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image + rng.uniform(-8, 8, 3)


def compressed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=85)
    return np.array(Image.open(file))


@pytest.mark.parametrize(
    "harm", [noisy, *(pytest.param(harm, marks=pytest.mark.slow) for harm in (blurred, tinted, compressed))]
)
def test_slightly_degraded_images_still_satisfy_their_captions(
    harm: Callable[[np.ndarray, np.random.Generator], np.ndarray],
) -> None:
    images, captions = samples(200)
    rng = np.random.default_rng(0)
    arrays = np.stack([harm(image, rng) for image in images.permute(0, 2, 3, 1).numpy()])
    damaged = torch.from_numpy(arrays.round().clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2)
    assert accuracy(damaged, captions)["accuracy"] >= 0.995


def wrong(scene: Scene, kind: str, rng: np.random.Generator) -> Scene | None:
    """Returns the scene with one error of a kind, or None if the scene cannot have it."""
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
def test_an_error_of_one_kind_fails_exactly_that_part_of_the_verdict(kind: str) -> None:
    rng = np.random.default_rng(0)
    scenes = [Shapes(seed=12).scene(index)[0] for index in range(150)]
    pairs = [(scene, error) for scene in scenes if (error := wrong(scene, kind, rng))]
    images = torch.stack([rendered(place(error, rng), error.background) for _, error in pairs])
    right = Verdict(color=True, shape=True, size=True, relation=True, background=True, count=True)
    verdicts = [compare(seen, scene) for seen, (scene, _) in zip(see(images), pairs, strict=True)]
    assert len(verdicts) >= 50
    assert np.mean([verdict == replace(right, **{kind: False}) for verdict in verdicts]) >= 0.995


def test_a_missing_or_extra_thing_is_detected() -> None:
    placings = [Shapes(seed=13).scene(index) for index in range(150)]
    placings = [(scene, placed) for scene, placed in placings if scene.relation]
    both = see(torch.stack([rendered(placed, scene.background) for scene, placed in placings]))
    lone = see(torch.stack([rendered(placed[:1], scene.background) for scene, placed in placings]))
    for (scene, _), seen_both, seen_one in zip(placings, both, lone, strict=True):
        extra = compare(seen_both, Scene(scene.things[:1], None, scene.background))
        assert not extra.count and extra.color and extra.shape and extra.size
        missing = compare(seen_one, scene)
        assert not missing.count and not missing.color and not missing.shape and not missing.relation


@pytest.mark.parametrize("opacity", [0.3, 0.5])
def test_a_translucent_ghost_of_another_thing_is_rejected(opacity: float) -> None:
    rejected = []
    for index in range(60):
        scene, placed = Shapes(seed=16).scene(2 * index)
        ghost = Shapes(seed=17).scene(index)[1][0]
        spots = [(x, y) for x in (13, 32, 51) for y in (13, 32, 51)]
        far = [min(np.hypot(x - thing.x, y - thing.y) - 1.2 * thing.radius for thing in placed) for x, y in spots]
        x, y = spots[int(np.argmax(far))]
        haunted = rendered([*placed, replace(ghost, x=x, y=y, radius=8.5)], scene.background)
        blend = (1 - opacity) * rendered(placed, scene.background) + opacity * haunted
        rejected.append(not check(blend.round().byte(), scene).ok)
    assert all(rejected)


def test_a_faded_thing_has_no_colour() -> None:
    for index in range(60):
        scene, placed = Shapes(seed=18).scene(index)
        faint = 0.3 * rendered(placed, scene.background) + 0.7 * rendered([], scene.background)
        assert not check(faint.round().byte(), scene).color


def test_a_half_erased_thing_has_no_shape() -> None:
    verdicts = []
    for index in range(100):
        scene, placed = Shapes(seed=14).scene(index)
        image, level = rendered(placed, scene.background).clone(), BACKGROUNDS[scene.background]
        image[:, :, : int(placed[0].x)] = level
        verdicts.append(check(image, scene).ok)
    assert not any(verdicts)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_blend_of_two_shapes_has_neither_shape(shape: str) -> None:
    images, scenes = [], []
    for index in range(120):
        scene, (placed, *_) = Shapes(seed=15).scene(index)
        if not scene.relation and placed.shape != shape:
            pair = [rendered([thing], scene.background).float() for thing in (placed, replace(placed, shape=shape))]
            images.append(((pair[0] + pair[1]) / 2).byte())
            scenes.append(scene)
    caught = [not compare(seen, scene).ok for seen, scene in zip(see(torch.stack(images)), scenes, strict=True)]
    assert np.mean(caught) >= 0.97  # some small things differ by only a few faint pixels


def bar(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    return np.maximum(np.abs(u) - 1.2 * radius, np.abs(v) - 0.55 * radius)


def test_a_new_shape_and_colour_are_recognised_only_if_they_are_known() -> None:
    known = Known({**DISTANCES, "bar": bar}, {**HUES, "lime": 87})
    scene = Scene((Thing("lime", "bar"),), None, "gray")
    placed = place(scene, np.random.default_rng(0), known.hues)
    image = torch.from_numpy(render(placed, "gray", shapes=known.shapes)).permute(2, 0, 1)[None]
    assert compare(see(image, known)[0], scene).ok
    (thing,) = see(image)[0].things
    assert thing.color in HUES and see(image)[0].misfit > 1


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        accuracy(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a red circle on a white background"])

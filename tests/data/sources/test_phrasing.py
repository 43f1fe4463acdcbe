import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from ldm.data.sources.phrasing import Phrased, left_out, parse, phrase, plain_prompts, twins
from ldm.data.sources.scene import UNSEEN, Scene, Thing, random_scene
from ldm.data.sources.shapes import Shapes


class Names(Dataset[dict[str, object]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, key: tuple[int, int]) -> dict[str, object]:
        return {"caption": ("cat face", "apple")[key[1]], "id": key[1]}


def test_every_phrasing_is_parsed_back_to_what_it_says() -> None:
    rng = np.random.Generator(np.random.Philox(3))
    for trial in range(3000):
        scene = left_out(rng)(random_scene(rng) if trial % 4 else twins(random_scene(rng)))
        assert parse(phrase(scene, rng)) == scene


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("red circle", Scene((Thing("red", "circle"),), None, None)),
        ("A circle that is red.", Scene((Thing("red", "circle"),), None, None)),
        ("two big red circles, grey background", Scene((Thing("red", "circle", "big"),) * 2, None, "gray")),
        (
            "a blue star to the left of a pink ring on black",
            Scene((Thing("blue", "star"), Thing("pink", "ring")), "left of", "black"),
        ),
        ("draw a red ring and a blue star", Scene((Thing("red", "ring"), Thing("blue", "star")), None, None)),
    ],
)
def test_plain_prompts_are_parsed(caption: str, scene: Scene) -> None:
    assert parse(caption) == scene


def test_a_near_miss_differs_in_what_the_caption_says() -> None:
    shapes = Shapes(seed=1, variants=8, phrased=1.0)
    for group in range(100):
        captions = [shapes.described(8 * group + member)[2] for member in range(8)]
        assert not any(parse(captions[0]).describes_the_same(parse(caption)) for caption in captions[1:])


def test_without_a_relation_the_order_of_things_is_irrelevant() -> None:
    one, other = parse("a red ring and a blue star"), parse("blue star and red ring")
    assert one.describes_the_same(other) and not one.describes_the_same(parse("a red star and a blue ring"))
    assert not parse("a red ring above a blue star").describes_the_same(parse("a blue star above a red ring"))


def test_phrasing_leaves_canonical_captions_and_all_scenes_of_single_things_as_they_were() -> None:
    canonical, phrased = Shapes(seed=1), Shapes(seed=1, phrased=0.5)
    changed = 0
    for index in range(100):
        (scene, placed), (same, _, caption) = canonical.scene(index), phrased.described(index)
        if len(scene.things) == 1:
            assert same == scene and torch.equal(canonical[index]["image"], phrased[index]["image"]) and placed
        changed += caption != canonical[index]["caption"]
    assert 25 <= changed <= 75 and canonical.identity != phrased.identity


def test_names_are_phrased_by_seed_draw_and_index() -> None:
    names = Phrased(Names(), seed=2)
    captions = [names[draw, 0]["caption"] for draw in range(100)]
    assert captions == [names[draw, 0]["caption"] for draw in range(100)]
    assert {"cat face", "a cat face", "an emoji of a cat face"} <= set(captions)
    assert any("an apple" in names[draw, 1]["caption"] for draw in range(20)) and len(names) == 2


def test_plain_prompts_are_all_pairs_but_the_unseen() -> None:
    assert len(plain_prompts(UNSEEN)) == 42 and "a red circle" not in plain_prompts(UNSEEN)
    assert "an orange circle" in plain_prompts()

import math

import pytest
import torch

from ldm.pipeline.inputs import Between
from ldm.pipeline.seed_noise import INITIAL, seed_noise, slerp
from ldm.random import normal

CPU, SHAPE = torch.device("cpu"), (4, 16, 16)


def test_noise_is_keyed_by_stream_seed_and_draw() -> None:
    noise = seed_noise("ldm", [7, 2**40], SHAPE, CPU)
    ids = torch.tensor([7, 2**40])
    assert torch.equal(noise(INITIAL), normal(0, "initial noise", ids, 0, SHAPE))
    assert torch.equal(noise(3), normal(0, "step noise", ids, 3, SHAPE))


def test_diffusers_noise_equals_that_of_one_generator_per_image() -> None:
    noise = seed_noise("diffusers", [7, 8], SHAPE, CPU)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    for draw in (INITIAL, 0, 1):
        expected = torch.cat([torch.randn(1, *SHAPE, generator=generator) for generator in generators])
        assert torch.equal(noise(draw), expected)


@pytest.mark.parametrize("kind", ["ldm", "diffusers"])
def test_noise_between_two_seeds_keeps_its_norm_and_reaches_both(kind: str) -> None:
    seeds = [Between(1, 2, share) for share in (0.0, 0.25, 0.5, 1.0)]
    between, first, second = (seed_noise(kind, each, SHAPE, CPU)(INITIAL) for each in (seeds, [1] * 4, [2] * 4))
    torch.testing.assert_close(between[0], first[0])
    torch.testing.assert_close(between[3], second[3])
    assert between.flatten(1).std(1).tolist() == pytest.approx([1.0] * 4, abs=0.05)
    assert torch.cosine_similarity(between[2].flatten(), first[2].flatten(), 0) == pytest.approx(
        math.sqrt(0.5), abs=0.05
    )


def test_slerp_divides_the_angle_and_keeps_equal_endpoints() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    angle = math.radians(30)
    torch.testing.assert_close(slerp(a, b, torch.tensor([1 / 3])), torch.tensor([[math.cos(angle), math.sin(angle)]]))
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.4])), a)


def test_an_unknown_kind_of_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="noise is 'numpy', but must be one of ldm, diffusers"):
        seed_noise("numpy", [1], SHAPE, CPU)

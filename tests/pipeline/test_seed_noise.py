import math

import pytest
import torch

from ldm.pipeline.inputs import Between
from ldm.pipeline.seed_noise import START, noise_of, slerp
from ldm.random import normal

CPU, SHAPE = torch.device("cpu"), (4, 16, 16)


def test_a_seeds_noise_is_that_of_its_stream_and_draw() -> None:
    noise = noise_of("ldm", [7, 2**40], SHAPE, CPU)
    ids = torch.tensor([7, 2**40])
    assert torch.equal(noise(START), normal(0, "initial noise", ids, 0, SHAPE))
    assert torch.equal(noise(3), normal(0, "step noise", ids, 3, SHAPE))


def test_noise_of_diffusers_is_what_a_generator_a_picture_gives_in_order() -> None:
    noise = noise_of("diffusers", [7, 8], SHAPE, CPU)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    for draw in (START, 0, 1):
        expected = torch.cat([torch.randn(1, *SHAPE, generator=generator) for generator in generators])
        assert torch.equal(noise(draw), expected)


@pytest.mark.parametrize("kind", ["ldm", "diffusers"])
def test_between_two_seeds_noise_keeps_its_length_and_goes_from_one_to_the_other(kind: str) -> None:
    seeds = [Between(1, 2, share) for share in (0.0, 0.25, 0.5, 1.0)]
    between, first, second = (noise_of(kind, each, SHAPE, CPU)(START) for each in (seeds, [1] * 4, [2] * 4))
    torch.testing.assert_close(between[0], first[0])
    torch.testing.assert_close(between[3], second[3])
    assert between.flatten(1).std(1).tolist() == pytest.approx([1.0] * 4, abs=0.05)
    assert torch.cosine_similarity(between[2].flatten(), first[2].flatten(), 0) == pytest.approx(
        math.sqrt(0.5), abs=0.05
    )


def test_slerp_goes_by_equal_angles_and_stays_where_both_ends_are_the_same() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    angle = math.radians(30)
    torch.testing.assert_close(slerp(a, b, torch.tensor([1 / 3])), torch.tensor([[math.cos(angle), math.sin(angle)]]))
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.4])), a)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="noise is 'numpy', but must be one of ldm, diffusers"):
        noise_of("numpy", [1], SHAPE, CPU)

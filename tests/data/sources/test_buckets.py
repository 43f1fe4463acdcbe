import pytest

from ldm.data.sources.buckets import bucket_sizes, nearest


def test_the_buckets_of_512_pixels_have_the_expected_sizes() -> None:
    assert bucket_sizes(512, 64) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]


@pytest.mark.parametrize(("side", "step"), [(512, 8), (768, 64), (1024, 128), (64, 64)])
def test_buckets_are_the_widest_sizes_with_at_most_the_pixels_of_the_square(side: int, step: int) -> None:
    sizes = bucket_sizes(side, step)
    assert (side, side) in sizes
    for height, width in sizes:
        assert height % step == width % step == 0 and height * width <= side * side < height * (width + step)
        assert 0.5 <= width / height <= 2


def test_the_nearest_bucket_is_chosen_by_aspect_ratio() -> None:
    sizes = bucket_sizes(512, 64)
    assert nearest(1000, 1000, sizes) == (512, 512)
    assert nearest(4000, 3000, sizes) == (448, 576) and nearest(300, 400, sizes) == (576, 448)
    assert nearest(10, 1000, sizes) == (640, 384)


@pytest.mark.parametrize("step", [0, -64, 100])
def test_a_step_that_does_not_divide_the_side_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"steps of {step} pixels include no square of 512"):
        bucket_sizes(512, step)

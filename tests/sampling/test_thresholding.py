import pytest
import torch

from ldm.sampling.thresholding import dynamic, static
from tests.closed_form import states

X = states(5)


def identity(x, t):
    return x


def test_static_thresholding_clamps_x0():
    clamped = static(identity, 0.5)(X, 1.0)
    assert torch.equal(clamped, X.clamp(-0.5, 0.5)) and clamped.abs().max() == 0.5


def test_dynamic_thresholding_scales_each_image_by_its_own_quantile():
    bright = X * torch.tensor([1, 2, 3, 4, 5]).view(-1, 1, 1, 1)
    inside = dynamic(identity, share=0.5)(bright, 1.0)
    assert inside.abs().amax((1, 2, 3)).tolist() == pytest.approx([1.0] * 5)
    for image, result in zip(bright, inside, strict=True):
        bound = max(float(image.abs().flatten().sort().values[1:3].mean()), 1.0)
        torch.testing.assert_close(result, image.clamp(-bound, bound) / bound)


def test_dynamic_thresholding_keeps_values_within_the_limit():
    x = X / X.abs().max()
    torch.testing.assert_close(dynamic(identity)(x, 1.0), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: static(identity, 0.0), "limit of thresholding is 0.0, but must be a number above 0"),
        (lambda: dynamic(identity, limit=float("inf")), "limit of thresholding is inf"),
        (
            lambda: dynamic(identity, share=1.5),
            "share of thresholding is 1.5, but must be a number above 0 and at most 1",
        ),
    ],
)
def test_invalid_thresholds_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

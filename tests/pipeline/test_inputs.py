import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.image import to_pil
from ldm.pipeline.inputs import Between, ImageRequest, image_requests

PIXELS = torch.arange(2 * 3 * 2 * 4, dtype=torch.uint8).view(2, 3, 2, 4)


def test_a_value_that_is_not_a_list_applies_to_every_image() -> None:
    assert image_requests(["a", "b"], "c", 7, [1.0, 2.0]) == [
        ImageRequest("a", "c", 7, 1.0),
        ImageRequest("b", "c", 7, 2.0),
    ]
    assert image_requests("a", "", range(2), 1.0) == [ImageRequest("a", "", 0, 1.0), ImageRequest("a", "", 1, 1.0)]
    assert image_requests("a", ["b", "c"], None, 1.0) == [
        ImageRequest("a", "b", 0, 1.0),
        ImageRequest("a", "c", 1, 1.0),
    ]


def test_images_may_be_tensors_or_pil_images() -> None:
    of_tensor, of_list = (image_requests("a", "", None, 1.0, image) for image in (PIXELS, to_pil(PIXELS)))
    assert [request.image.tobytes() for request in of_tensor] == [request.image.tobytes() for request in of_list]
    shared = image_requests(["a", "b"], "", None, 1.0, PIXELS[0], torch.ones(1, 2, 4, dtype=torch.bool))
    assert shared[0].image is shared[1].image and shared[1].mask.convert("L").getextrema() == (255, 255)


@pytest.mark.parametrize("seeds", [np.array([3, 5]), torch.tensor([3, 5]), [np.int64(3), torch.tensor(5)]])
def test_numbers_of_numpy_and_torch_become_numbers_of_python(seeds: Any) -> None:
    requests = image_requests("a", "", seeds, np.float32(1.5))
    assert json.dumps([[request.seed, request.guidance] for request in requests]) == "[[3, 1.5], [5, 1.5]]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": []}, "there are 0 prompts: give lists of equal length, at least 1"),
        ({"prompts": ["a"], "seeds": [1, 2]}, "there are 1 prompts, 2 seeds"),
        ({"prompts": 3}, "a prompt is 3, which is not text"),
        ({"prompts": ["a", None]}, "a prompt is None, which is not text"),
        ({"negative": b"x"}, "a negative is b'x', which is not text"),
        ({"seeds": [-1]}, "a seed is -1, but must be an integer between 0 and 9223372036854775807"),
        ({"seeds": 2**63}, "but must be an integer between 0 and 9223372036854775807"),
        ({"seeds": 0.5}, "a seed is 0.5"),
        ({"seeds": True}, "a seed is True"),
        ({"guidance": float("nan")}, "a guidance scale is nan, but must be a finite number"),
        ({"guidance": "high"}, "a guidance scale is 'high'"),
        ({"image": "cat.png"}, r"the image is 'cat.png', but must be a PIL image or a uint8 tensor \(3, h, w\)"),
        ({"image": np.zeros((9, 99, 3), np.uint8)}, r"is a uint8 NumPy array of shape \(9, 99, 3\), but must"),
        ({"image": [None]}, "the image is None, but must be a PIL image"),
        ({"image": torch.zeros(3, 4, 4)}, r"the image is a torch.float32 tensor of shape \(3, 4, 4\)"),
        ({"image": PIXELS, "prompts": ["a"]}, "there are 1 prompts, 2 images"),
        (
            {"image": PIXELS, "mask": torch.zeros(1, 0, 0, dtype=torch.bool)},
            r"mask is a torch.bool tensor of shape \(1, 0",
        ),
        ({"image": PIXELS, "mask": torch.ones(3, 2, 4)}, r"the mask is a torch.float32 tensor .* \(1, h, w\)"),
        ({"mask": Image.new("L", (4, 4))}, "a mask was given without an image"),
    ],
)
def test_invalid_inputs_are_refused_in_one_sentence(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_requests(**({"prompts": "a", "negative": "", "seeds": None, "guidance": 1.0} | call))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "half"])
def test_a_share_outside_0_to_1_is_refused(share: Any) -> None:
    with pytest.raises(ValueError, match=r"share between two prompts or seeds is .*, but must be from 0 to 1"):
        Between(1, 2, share)

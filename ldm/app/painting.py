"""Converts between the value of Gradio's image editor and a source image with its mask."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

from PIL import Image, ImageChops

from ldm.image import to_rgb

COLOR, OPACITY = "#ff2e63", 0.6  # of the brush; translucent, so that the image stays visible


def sources_of(painting: Mapping[str, Any] | None) -> dict[str, Image.Image]:
    """Returns the image as "init", on a white background, and the painted area, unless empty, as "mask"."""
    layers = (painting or {}).get("layers") or []
    masks = [layer.getchannel("A").point(lambda alpha: min(255, round(alpha / OPACITY))) for layer in layers]
    masks = [mask for mask in masks if mask.getbbox() is not None]
    image = painting and painting["background"]
    if not image:
        if masks:
            raise ValueError("the mask has no source image; add an image first, or clear the mask")
        return {}
    init = {"init": to_rgb(image)}
    return init | ({"mask": reduce(ImageChops.lighter, masks)} if masks else {})


def painting_of(sources: Mapping[str, Image.Image]) -> dict[str, Any] | None:
    """Returns the value of the editor for these sources; the inverse of `sources_of`."""
    if "init" not in sources:
        return None
    composite = init = sources["init"].convert("RGBA")
    layers = []
    if "mask" in sources:
        layers = [Image.new("RGBA", init.size, COLOR)]
        layers[0].putalpha(sources["mask"].convert("L").resize(init.size).point(lambda share: share * OPACITY))
        composite = Image.alpha_composite(init, layers[0])
    return {"background": init, "layers": layers, "composite": composite}

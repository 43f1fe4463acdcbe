"""The painting of Gradio's editor ↔ a picture to start from, and its mask."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

from PIL import Image, ImageChops

COLOUR, OPACITY = "#ff2e63", 0.6  # of the brush, so that one sees what one paints over


def sources_of(painting: Mapping[str, Any] | None) -> dict[str, Image.Image]:
    """The picture as "init", on white where it is transparent, and where it is painted, if it is, as "mask"."""
    layers = (painting or {}).get("layers") or []
    masks = [layer.getchannel("A").point(lambda alpha: min(255, round(alpha / OPACITY))) for layer in layers]
    masks = [mask for mask in masks if mask.getbbox() is not None]
    picture = painting and painting["background"]
    if not picture:
        if masks:
            raise ValueError("you painted without a picture to start from; drop one in first, or clear the painting")
        return {}
    white = Image.new("RGBA", picture.size, "white")
    init = {"init": Image.alpha_composite(white, picture).convert("RGB")}
    return init | ({"mask": reduce(ImageChops.lighter, masks)} if masks else {})


def painting_of(sources: Mapping[str, Image.Image]) -> dict[str, Any] | None:
    """For the editor, undone by `sources_of`."""
    if "init" not in sources:
        return None
    composite = init = sources["init"].convert("RGBA")
    layers = []
    if "mask" in sources:
        layers = [Image.new("RGBA", init.size, COLOUR)]
        layers[0].putalpha(sources["mask"].convert("L").resize(init.size).point(lambda share: share * OPACITY))
        composite = Image.alpha_composite(init, layers[0])
    return {"background": init, "layers": layers, "composite": composite}

"""The controls of the page, and the request that their values make."""

import secrets
from collections.abc import Mapping
from functools import reduce
from typing import Any

import gradio as gr
from gradio.components import Component
from PIL import Image, ImageChops

from ldm.app.service import Request, Service
from ldm.editing import STRENGTH
from ldm.items import MAX_SEED
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.spacing import SPACINGS
from ldm.settings import Settings

BRUSH, OPACITY = "#ff2e63", 0.6  # so that one sees what one paints over
NAMES = (
    "prompt", "editor", "strength", "model", "negative", "steps", "guidance", "sampler", "spacing", "height", "width",
    "seed", "count",
)  # fmt: skip
MOST = {"steps": 200, "guidance": 30, "side": 2048, "count": 9}


def starting() -> dict[str, Component]:
    """The picture to start from, if any, and its mask."""
    editor = gr.ImageEditor(
        show_label=False,
        type="pil",
        format="png",
        sources=["upload", "clipboard"],
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=8, colors=[(BRUSH, OPACITY)], color_mode="fixed"),
        placeholder="Drop a picture here, then paint\nover what shall be drawn anew",
        elem_id="editor",
    )
    strength = gr.Slider(0.05, 1, STRENGTH, step=0.05, label="Strength", info="low: changes little; 1: nearly all")
    return {"editor": editor, "strength": strength}


def settings(service: Service) -> dict[str, Component]:
    model = next(iter(service.models))
    own = values_of(service.settings(model))
    found: dict[str, Component] = {
        "model": gr.Dropdown(list(service.models), value=model, label="Model", elem_id="model"),
        "negative": gr.Textbox(label="Negative prompt", placeholder="what the picture shall not show"),
    }
    with gr.Row():
        found["steps"] = gr.Slider(
            1, MOST["steps"], own["steps"], step=1, label="Steps", elem_id="steps", info="more is finer"
        )
        found["guidance"] = gr.Slider(0, MOST["guidance"], own["guidance"], label="Guidance", info="1 is none")
    with gr.Row():
        found["sampler"] = gr.Dropdown(list(SAMPLERS), value=own["sampler"], label="Sampler", elem_id="sampler")
        found["spacing"] = gr.Dropdown(list(SPACINGS), value=own["spacing"], label="Spacing of the steps")
    with gr.Row():
        for name in ("height", "width"):
            found[name] = gr.Number(
                own[name],
                elem_id=name,
                label=f"{name.capitalize()} in pixels",
                precision=0,
                minimum=8,
                maximum=MOST["side"],
                step=8,
                min_width=90,
            )
    with gr.Row():
        found["seed"] = gr.Textbox(label="Seed", placeholder="random", elem_id="seed", min_width=120)
        found["count"] = gr.Slider(1, MOST["count"], 1, step=1, label="Pictures", min_width=120, elem_id="count")
    return found


def values_of(own: Settings) -> dict[str, Any]:
    """A model's own settings, by control."""
    height, width = own.size
    shared = {name: getattr(own, name) for name in ("steps", "guidance", "sampler", "spacing")}
    return shared | {"height": height, "width": width}


def request_of(values: Mapping[str, Any], restored: Mapping[str, Any]) -> Request:
    """What the controls ask for; settings that have none are as they were restored.

    Raises ValueError for a seed that is none and for painting without a picture.
    """
    sources = sources_of(values["editor"])
    call = {name: values[name] for name in ("negative", "steps", "guidance", "sampler", "spacing")}
    call["size"] = (values["height"], values["width"])
    if sources:
        call["strength"] = values["strength"]
    stale = {f"{name}_options" for name in ("sampler", "spacing") if restored.get(name) != values[name]}
    call = {name: value for name, value in restored.items() if name not in stale} | call
    first = first_seed(values["seed"])
    return Request(values["model"], values["prompt"], list(range(first, first + values["count"])), call, sources)


def first_seed(text: str) -> int:
    """The number, or a random one for no text."""
    if not text.strip():
        return secrets.randbelow(2**32)
    if not text.strip().isdecimal() or int(text) > MAX_SEED - MOST["count"]:
        raise ValueError(
            f"the seed is {text!r}, but must be a whole number from 0 up, or empty for a new one each time"
        )
    return int(text)


def sources_of(painting: dict[str, Any] | None) -> dict[str, Image.Image]:
    """The editor's picture, on white where it is transparent, and where it is painted, if it is."""
    masks = [_mask_of(layer) for layer in (painting or {}).get("layers") or []]
    masks = [mask for mask in masks if mask.getbbox() is not None]
    if not painting or painting["background"] is None:
        if masks:
            raise ValueError("you painted without a picture to start from; drop one in first, or clear the painting")
        return {}
    picture = painting["background"]
    white = Image.new("RGBA", picture.size, "white")
    init = {"init": Image.alpha_composite(white, picture).convert("RGB")}
    return init | ({"mask": reduce(ImageChops.lighter, masks)} if masks else {})


def _mask_of(layer: Image.Image) -> Image.Image:
    return layer.getchannel("A").point(lambda value: min(255, round(value / OPACITY)))


def painting_of(sources: Mapping[str, Image.Image]) -> dict[str, Any] | None:
    """For the editor, undone by `sources_of`."""
    if "init" not in sources:
        return None
    init = sources["init"].convert("RGBA")
    layers = []
    if "mask" in sources:
        layers = [Image.new("RGBA", init.size, BRUSH)]
        layers[0].putalpha(sources["mask"].convert("L").resize(init.size).point(lambda value: value * OPACITY))
    composite = init
    for layer in layers:
        composite = Image.alpha_composite(composite, layer)
    return {"background": init, "layers": layers, "composite": composite}

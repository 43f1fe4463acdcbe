"""The settings on the page, and the request that they make."""

import secrets
from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from ldm.app.painting import sources_of
from ldm.app.service import Request
from ldm.pipeline.inputs import MAX_SEED
from ldm.pipeline.settings import Settings
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.spacing import SPACINGS

OWN = ("steps", "guidance", "sampler", "spacing")  # controls that are settings as they are
NAMES = ("prompt", "editor", "strength", "model", "negative", "height", "width", "seed", "count", *OWN)
MOST = {"steps": 200, "guidance": 30, "side": 2048, "count": 9}


def settings(models: list[str], own: Settings) -> dict[str, Component]:
    """Laid out where it is called, with the first model's own values."""
    found: dict[str, Component] = {
        "model": gr.Dropdown(models, value=models[0], label="Model", elem_id="model"),
        "negative": gr.Textbox(label="Negative prompt", placeholder="what the picture shall not show"),
    }
    with gr.Row():
        found["steps"] = gr.Slider(
            1, MOST["steps"], own.steps, step=1, label="Steps", info="more are finer", elem_id="steps"
        )
        found["guidance"] = gr.Slider(0, MOST["guidance"], own.guidance, label="Guidance", info="1 is none")
    with gr.Row():
        found["sampler"] = gr.Dropdown(list(SAMPLERS), value=own.sampler, label="Sampler", elem_id="sampler")
        found["spacing"] = gr.Dropdown(list(SPACINGS), value=own.spacing, label="Spacing of the steps")
    with gr.Row():
        for name, pixels in zip(("height", "width"), own.size, strict=True):
            found[name] = gr.Number(
                pixels, label=f"{name.capitalize()} in pixels", precision=0, minimum=8, maximum=MOST["side"], step=8,
                min_width=90, elem_id=name,
            )  # fmt: skip
    with gr.Row():
        found["seed"] = gr.Textbox(label="Seed", placeholder="random", min_width=120, elem_id="seed")
        found["count"] = gr.Slider(1, MOST["count"], 1, step=1, label="Pictures", min_width=120, elem_id="count")
    return found


def values_of(own: Settings) -> dict[str, Any]:
    """A model's own settings, by control."""
    height, width = own.size
    return {name: getattr(own, name) for name in OWN} | {"height": height, "width": width}


def request_of(values: Mapping[str, Any], restored: Mapping[str, Any]) -> Request:
    """What the controls ask for; settings that have none are as they were restored.

    Raises ValueError for a seed that is none and for painting without a picture.
    """
    sources = sources_of(values["editor"])
    call = {name: values[name] for name in ("negative", *OWN)} | {"size": (values["height"], values["width"])}
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

"""Creates the controls of the page and turns their values into a request."""

import math
import secrets
from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from ldm.app.adapters import Offered, loras_of, rows
from ldm.app.painting import sources_of
from ldm.app.service import Request
from ldm.pipeline.inputs import MAX_SEED
from ldm.pipeline.prompts import SYNTAXES
from ldm.pipeline.settings import Settings
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.spacing import SPACINGS

PLAIN = ("steps", "guidance", "sampler", "spacing", "prompt_syntax")  # controls of the setting of the same name
NAMES = (
    *("prompt", "editor", "strength", "model", "negative", "height", "width", "seed", "count", *PLAIN),
    *("loras", "embeddings"),
)
ASPECTS = {"square": 1.0, "landscape 3:2": 3 / 2, "portrait 2:3": 2 / 3, "wide 16:9": 16 / 9, "tall 9:16": 9 / 16}
MAXIMUM = {"steps": 200, "guidance": 30, "side": 2048, "count": 9}


def create(models: list[str], defaults: Settings) -> dict[str, Component]:
    """Adds the controls to the current layout, with the default settings of the first model."""
    components: dict[str, Component] = {
        "model": gr.Dropdown(models, value=models[0], label="Model", elem_id="model"),
        "negative": gr.Textbox(label="Negative prompt", placeholder="what the images should not show"),
    }
    with gr.Row():
        components["steps"] = gr.Slider(
            1,
            MAXIMUM["steps"],
            defaults.steps,
            step=1,
            label="Steps",
            info="more steps are more accurate",
            elem_id="steps",
        )
        components["guidance"] = gr.Slider(
            0, MAXIMUM["guidance"], defaults.guidance, label="Guidance", info="1 is no guidance"
        )
    with gr.Row():
        components["sampler"] = gr.Dropdown(list(SAMPLERS), value=defaults.sampler, label="Sampler", elem_id="sampler")
        components["spacing"] = gr.Dropdown(list(SPACINGS), value=defaults.spacing, label="Time step spacing")
    components["aspect"] = gr.Dropdown(
        list(ASPECTS),
        value=None,
        label="Aspect ratio",
        elem_id="aspect",
        info="sets height and width, with the model's area",
    )
    with gr.Row():
        for name, pixels in zip(("height", "width"), defaults.size, strict=True):
            components[name] = gr.Number(
                pixels, label=f"{name.capitalize()} in pixels", precision=0, minimum=8, maximum=MAXIMUM["side"], step=8,
                min_width=90, elem_id=name,
            )  # fmt: skip
    with gr.Row():
        components["seed"] = gr.Textbox(label="Seed", placeholder="random", min_width=120, elem_id="seed")
        components["count"] = gr.Slider(1, MAXIMUM["count"], 1, step=1, label="Images", min_width=120, elem_id="count")
    components["prompt_syntax"] = gr.Dropdown(
        list(SYNTAXES), value=defaults.prompt_syntax, label="Prompt syntax", elem_id="prompt_syntax",
        info="a1111 reads (word:1.2), [word], BREAK and <lora:NAME:0.8> as AUTOMATIC1111's web UI does",
    )  # fmt: skip
    return components


def create_adapters(offered: Offered) -> dict[str, Component]:
    """Adds the table of LoRA files, the choice of textual inversions, and a place to drop either."""
    return {
        "loras": gr.Dataframe(
            rows([*offered["lora"]], {}), headers=["LoRA", "Weight"], datatype=["str", "number"], type="array",
            column_count=2, static_columns=[0], interactive=True, max_height=240,
            buttons=[], label="Weight 0 is none", elem_id="loras",
        ),
        "embeddings": gr.Dropdown(
            [*offered["embedding"]], value=[], multiselect=True, allow_custom_value=True, label="Textual inversions",
            elem_id="embeddings", info="their token can then be used in prompts",
        ),
        "added": gr.File(
            label="Drop a LoRA or a textual inversion", file_types=[".safetensors", ".pt", ".bin"], height=110,
            elem_id="added",
        ),
    }  # fmt: skip


def sides(aspect: str, size: tuple[int, int]) -> tuple[int, int]:
    """Returns a height and a width of this aspect, and of nearly the area of `size`, that all networks accept."""
    side = math.sqrt(size[0] * size[1])
    step, ratio = 64 if side >= 512 else 16, math.sqrt(ASPECTS[aspect])
    height, width = (max(step, step * round(length / step)) for length in (side / ratio, side * ratio))
    return height, width


def values_of(settings: Settings) -> dict[str, Any]:
    """Returns settings as values of the controls, by name."""
    height, width = settings.size
    return {name: getattr(settings, name) for name in PLAIN} | {"height": height, "width": width}


def request_of(values: Mapping[str, Any], restored: Mapping[str, Any]) -> Request:
    """Returns the request of the controls; settings without a control keep their restored values.

    Raises ValueError for an invalid seed or a mask without a source image.
    """
    sources = sources_of(values["editor"])
    call = {name: values[name] for name in ("negative", *PLAIN)} | {"size": (values["height"], values["width"])}
    if sources:
        call["strength"] = values["strength"]
    stale = {f"{name}_options" for name in ("sampler", "spacing") if restored.get(name) != values[name]}
    call = {name: value for name, value in restored.items() if name not in stale} | call
    first = first_seed(values["seed"])
    seeds = list(range(first, first + values["count"]))
    added = loras_of(values["loras"]), list(values["embeddings"] or [])
    return Request(values["model"], values["prompt"], seeds, call, sources, *added)


def first_seed(text: str) -> int:
    """Parses a seed; returns a random one for empty text."""
    if not text.strip():
        return secrets.randbelow(2**32)
    if not text.strip().isdecimal() or int(text) > MAX_SEED - MAXIMUM["count"]:
        raise ValueError(f"the seed is {text!r}, but must be an integer >= 0, or empty for a random seed")
    return int(text)

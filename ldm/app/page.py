"""Defines the page: its layout and what its buttons do."""

import re
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from html import escape
from itertools import count
from math import ceil, sqrt
from pathlib import Path
from textwrap import shorten
from typing import Any

import gradio as gr

from ldm.app import controls
from ldm.app.adapters import Row, rows
from ldm.app.painting import COLOR, OPACITY, painting_of
from ldm.app.restoring import restore
from ldm.app.service import Finished, Service, Step
from ldm.errors import EXPECTED, sentence
from ldm.image import load_image, read_metadata
from ldm.pipeline.source_images import STRENGTH
from ldm.progress import clock

Updates = dict[Any, Any]  # component: its new value

CSS = """
#stage .grid-wrap, #gallery .grid-wrap { min-height: 0; max-height: none; }
#stage .grid-container { max-width: 65vh; margin: auto; }
#message { min-height: 1.5em; }
"""  # shows all images of a request at once
TAGLINE = "Images from text by latent diffusion, generated on this machine."
WELCOME = "Write a prompt and press Generate"
WAITING = "Waiting: the model is being loaded or in use by another request"
STOPPED = "Stopped"


@contextmanager
def errors_shown() -> Iterator[None]:
    """Shows an error as one sentence on the page, and an unexpected one also with its traceback on the terminal."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, EXPECTED):
            traceback.print_exception(error)
        text = escape(sentence(error), quote=False)  # the message may quote an untrusted file
        raise gr.Error(text, print_exception=False) from error


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        gr.Warning(escape(warning, quote=False))


class Page:
    """The page. `parts` maps names to components; `blocks` is the Gradio app to serve."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.numbers, self.stopped = count(1), set[int]()  # each press of Generate has a number
        with gr.Blocks(title="ldm", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            # The restored call, the files of the displayed images, and the number of the last press of Generate.
            self.parts: Updates = {"restored": gr.State({}), "shown": gr.State([]), "number": gr.State(0)}
            self.parts["history"] = gr.BrowserState([])  # file names of this browser's images, newest first
            gr.HTML(f"<h1>ldm</h1>{TAGLINE}", elem_id="title")
            with gr.Row(equal_height=True):
                self._prompt_row()
            prompts = service.examples(next(iter(service.models)))
            self.parts["examples"] = gr.Dataset(
                label="Examples of what this model understands", components=[self.parts["prompt"]],
                samples=[[prompt] for prompt in prompts], visible=bool(prompts), elem_id="examples",
            )  # fmt: skip
            with gr.Row():
                with gr.Column(scale=6, min_width=320):
                    self._gallery_column()
                with gr.Column(scale=4, min_width=320):
                    self._settings_column()
            self._connect()

    def _prompt_row(self) -> None:
        self.parts["prompt"] = gr.Textbox(
            label="Prompt", max_lines=6, scale=10, min_width=320, autofocus=True, elem_id="prompt"
        )
        self.parts["generate"] = gr.Button("Generate", variant="primary", scale=2, min_width=120, elem_id="generate")
        self.parts["stop"] = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")

    def _gallery_column(self) -> None:
        plain: dict[str, Any] = {"show_label": False, "interactive": False, "allow_preview": False, "buttons": []}
        plain |= {"height": "auto", "fit_columns": False, "object_fit": "contain", "format": "png"}
        self.parts["stage"] = gr.Gallery(columns=1, elem_id="stage", **plain | {"buttons": ["fullscreen"]})
        self.parts["message"] = gr.HTML(WELCOME, elem_id="message")
        with gr.Row(visible=False) as self.parts["actions"]:
            self.parts["reuse"] = gr.Button("Reuse settings", size="sm", min_width=120, elem_id="reuse")
            self.parts["from"] = gr.Button("Use as source image", size="sm", min_width=120, elem_id="from")
            self.parts["vary"] = gr.Button("Vary", size="sm", min_width=80, elem_id="vary")
            self.parts["lock"] = gr.Button("Lock seed", size="sm", min_width=80, elem_id="lock")
            self.parts["download"] = gr.DownloadButton("Download", size="sm", min_width=80, elem_id="download")
            self.parts["delete"] = gr.Button("Delete", size="sm", min_width=80, elem_id="delete")
        self.parts["gallery"] = gr.Gallery(visible=False, columns=6, elem_id="gallery", **plain)
        self.parts["drop"] = gr.File(
            label="Restore a PNG's settings (ldm, A1111)", file_types=[".png"], height=150, elem_id="drop"
        )

    def _settings_column(self) -> None:
        with gr.Accordion("Source image", open=False, elem_id="start") as self.parts["start"]:
            self.parts["editor"] = gr.ImageEditor(
                show_label=False, type="pil", format="png", sources=["upload", "clipboard"], transforms=(),
                layers=False, brush=gr.Brush(default_size=8, colors=[(COLOR, OPACITY)], color_mode="fixed"),
                placeholder="Drop an image here, then paint\nover the area to replace", elem_id="editor",
            )  # fmt: skip
            self.parts["strength"] = gr.Slider(
                0.05, 1, STRENGTH, step=0.05, label="Strength", info="near 0 changes little, 1 nearly all"
            )
        with gr.Accordion("Settings"):
            models = list(self.service.models)
            self.parts |= controls.create(models, self.service.settings(models[0]))
        with gr.Accordion("LoRA and textual inversions", open=False, elem_id="adapters") as self.parts["adapters"]:
            self.parts |= controls.create_adapters(self.service.adapters.offered())

    def _connect(self) -> None:
        parts, every = self.parts, list(self.parts.values())
        named = {parts[name] for name in (*controls.NAMES, "restored", "number")}
        pressed = [parts["generate"].click, parts["prompt"].submit]
        numbered: dict[str, Any] = {"fn": self.start, "outputs": [parts["number"], parts["message"]], "queue": False}
        varied = parts["vary"].click(self.vary, parts["shown"], every, show_progress="hidden")
        # "multiple" accepts a press while another request is still stopping.
        queued: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "multiple"}
        for started in (
            gr.on(pressed, **numbered, show_progress="hidden"),
            varied.success(**numbered, show_progress="hidden"),
        ):
            finished = started.then(self.generate, named, every, **queued)
            finished.then(self.add_to_gallery, [parts["shown"], parts["history"]], every, **queued)
        parts["stop"].click(self.stop, parts["number"], parts["message"], queue=False, show_progress="hidden")
        for event, handler, name in (
            (parts["model"].input, self.choose, "model"),
            (parts["drop"].upload, self.restore, "drop"),
            (parts["reuse"].click, self.use_settings, "shown"),
            (parts["from"].click, self.start_from, "shown"),
            (parts["lock"].click, self.lock_seed, "shown"),
            (parts["examples"].click, self.use_example, "examples"),
            (parts["gallery"].select, self.show, "history"),
            (self.blocks.load, self.gallery, "history"),
        ):
            event(handler, parts[name], every, show_progress="hidden")
        kept = [parts["shown"], parts["history"]]
        parts["delete"].click(self.delete, kept, every, show_progress="hidden")
        sized = [parts["aspect"], parts["model"]]
        parts["aspect"].input(self.set_aspect, sized, every, show_progress="hidden")
        listed = [parts["loras"], parts["embeddings"]]
        parts["added"].upload(self.add_file, [parts["added"], *listed], every, show_progress="hidden")
        self.blocks.load(self.list_files, listed, listed, show_progress="hidden")

    def start(self) -> tuple[int, str]:
        """Assigns a number to a request, before it waits in the queue."""
        return next(self.numbers), WAITING

    def stop(self, number: int) -> str:
        """Stops that request after its current step, or before its first."""
        self.stopped.add(number)
        return STOPPED

    def generate(self, given: Updates) -> Iterator[Updates]:
        """Shows the images while they are sampled."""
        value = {name: given[self.parts[name]] for name in (*controls.NAMES, "restored", "number")}
        began: float | None = None
        try:
            with errors_shown(), closing(self._sample(value)) as events:
                for event in events:
                    if value["number"] in self.stopped:
                        yield {self.parts["message"]: STOPPED}  # replaces a step that arrived after Stop was pressed
                        break
                    if isinstance(event, Step):
                        began = began or time.monotonic()
                        yield self._on_stage(event.estimates, _progress(event, time.monotonic() - began))
                    else:
                        yield self._display(event.paths)
                        warn(event.warnings)
        except gr.Error as error:
            yield {self.parts["message"]: error.message}
            raise

    def _sample(self, value: dict[str, Any]) -> Generator[Step | Finished, None, None]:
        return self.service.sample(controls.request_of(value, value["restored"]))

    def add_to_gallery(self, shown: list[Path], history: list[str]) -> Updates:
        """Adds the displayed images to the start of the gallery."""
        return self.gallery([path.name for path in shown if path.name not in history] + history)

    def gallery(self, history: list[str]) -> Updates:
        paths = self._paths(history)
        gallery = gr.Gallery([str(path) for path in paths], visible=bool(paths), selected_index=None)
        return {self.parts["history"]: [path.name for path in paths], self.parts["gallery"]: gallery}

    def show(self, history: list[str], event: gr.SelectData) -> Updates:
        return self._display([self._paths(history)[event.index]])

    def _paths(self, history: list[str]) -> list[Path]:
        """Returns the files of those names that are images of this service; a browser may send any name."""
        paths = [self.service.out / name for name in history if re.fullmatch(r"\d{4,}\.png", name)]
        return [path for path in paths if path.is_file()]

    def _display(self, paths: list[Path]) -> Updates:
        record = read_metadata(paths[0])
        seed, last = record["seed"], record["seed"] + len(paths) - 1
        seeds = f"seed {seed}" if len(paths) == 1 else f"seeds {seed} to {last}"
        prompt = shorten(record["prompt"], 200, placeholder=" …") or "no prompt"
        text = f"{prompt} · {seeds} · {record['steps']} steps of {record['sampler']}"
        stage = self._on_stage([str(path) for path in paths], text)
        download = gr.DownloadButton(value=str(paths[0]), visible=len(paths) == 1)
        return stage | {
            self.parts["shown"]: paths, self.parts["actions"]: gr.Row(visible=True), self.parts["download"]: download
        }  # fmt: skip

    def _on_stage(self, images: Sequence[Any], text: str) -> Updates:
        columns = max(1, ceil(sqrt(len(images))))
        return {self.parts["stage"]: gr.Gallery(images, columns=columns), self.parts["message"]: escape(text)}

    @errors_shown()
    def choose(self, model: str) -> Updates:
        """Sets the controls to the default settings of a model."""
        values = controls.values_of(self.service.settings(model))
        prompts = self.service.examples(model)
        listed = gr.Dataset(samples=[[prompt] for prompt in prompts], visible=bool(prompts))
        own = {self.parts["restored"]: {}, self.parts["examples"]: listed, self.parts["aspect"]: None}
        return {self.parts[name]: value for name, value in values.items()} | own

    @errors_shown()
    def use_settings(self, shown: list[Path]) -> Updates:
        found = restore(shown[0], self.service.models, self.service.out.parent, self.service.adapters)
        warn(found.warnings)
        gr.Info("Settings restored.", duration=3)
        return {self.parts[name]: value for name, value in found.controls.items()} | {
            self.parts["restored"]: found.call,
            self.parts["editor"]: painting_of(found.sources),
            self.parts["start"]: gr.Accordion(open=bool(found.sources)),
            self.parts["adapters"]: gr.Accordion(open=any(weight for _, weight in found.controls["loras"])),
        }

    def vary(self, shown: list[Path]) -> Updates:
        """Restores the settings of the displayed image, with a random seed."""
        return self.use_settings(shown) | {self.parts["seed"]: ""}

    def lock_seed(self, shown: list[Path]) -> Updates:
        """Sets the seed of the displayed image."""
        with errors_shown():
            return {self.parts["seed"]: str(read_metadata(shown[0])["seed"])}

    def use_example(self, example: list[str]) -> Updates:
        return {self.parts["prompt"]: example[0]}

    @errors_shown()
    def set_aspect(self, aspect: str, model: str) -> Updates:
        height, width = controls.sides(aspect, self.service.settings(model).size)
        return {self.parts["height"]: height, self.parts["width"]: width}

    def delete(self, shown: list[Path], history: list[str]) -> Updates:
        """Deletes the displayed images from the disk and from the gallery."""
        with errors_shown():
            for path in self._paths([path.name for path in shown]):
                path.unlink()
        updates = self.gallery(history) | self._on_stage([], "Deleted")
        return updates | {self.parts["shown"]: [], self.parts["actions"]: gr.Row(visible=False)}

    def restore(self, png: str) -> Iterator[Updates]:
        yield {self.parts["drop"]: None}  # another file can be dropped even if this one is refused
        yield self.use_settings([Path(png)])

    def add_file(self, upload: str, table: list[Row], embeddings: list[str]) -> Iterator[Updates]:
        """Adds a dropped file to the lists and chooses it, a LoRA with weight 1."""
        yield {self.parts["added"]: None}  # another file can be dropped even if this one is refused
        with errors_shown():
            kind, name = self.service.adapters.add(upload)
        if kind == "lora":
            yield {self.parts["loras"]: [[name, 1.0], *(row for row in table if row[0] not in ("", name))]}
        else:
            chosen = [*dict.fromkeys([*(embeddings or []), name])]
            yield {self.parts["embeddings"]: self._embeddings(chosen)}

    def list_files(self, table: list[Row], embeddings: list[str]) -> tuple[list[Row], gr.Dropdown]:
        """Lists the files that are now in the folder, when the page is loaded, and keeps what was chosen."""
        weights = {name: weight for name, weight in table if name and weight}
        names = dict.fromkeys([*self.service.adapters.offered()["lora"], *weights])
        return rows([*names], weights), self._embeddings(embeddings or [])

    def _embeddings(self, chosen: list[str]) -> gr.Dropdown:
        names = dict.fromkeys([*self.service.adapters.offered()["embedding"], *chosen])
        return gr.Dropdown([*names], value=chosen)

    def start_from(self, shown: list[Path]) -> Updates:
        painting = painting_of({"init": load_image(shown[0])})
        return {self.parts["editor"]: painting, self.parts["start"]: gr.Accordion(open=True)}


def _progress(step: Step, seconds: float) -> str:
    """Returns the number of the step, and the time left by the speed since the first one."""
    left = f", {clock(seconds / (step.done - 1) * (step.total - step.done))} left" if step.done > 1 else ""
    return f"Step {step.done} of {step.total}{left}"

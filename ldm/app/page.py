"""The page: what is where, and what its buttons do."""

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from html import escape
from itertools import count
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.app import controls
from ldm.app.painting import COLOUR, OPACITY, painting_of
from ldm.app.restoring import restored
from ldm.app.service import Service, Step
from ldm.errors import EXPECTED, sentence
from ldm.image import load_image, read_metadata
from ldm.pipeline.source_images import STRENGTH

Changes = dict[Any, Any]  # component → its new value

CSS = """
#stage .grid-wrap, #gallery .grid-wrap { min-height: 0; max-height: none; }
#stage .grid-container { max-width: 65vh; margin: auto; }
#told { min-height: 1.5em; }
"""  # all of the pictures being drawn can be seen at once
WELCOME = "Write a prompt and press Draw"
WAITING = "Getting ready: the model is being loaded, or draws for someone else"
STOPPED = "Stopped"


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """An error is told in the page and, if nobody expected it, in full on the terminal."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, EXPECTED):
            traceback.print_exception(error)
        text = escape(sentence(error), quote=False)  # which may quote a file that came from anyone
        raise gr.Error(text, print_exception=False) from error


def warn(remarks: list[str]) -> None:
    for remark in remarks:
        gr.Warning(escape(remark, quote=False))


class Page:
    """What is on the page, by name in `parts`; `blocks` is what Gradio serves."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.numbers, self.stopped = count(1), set[int]()  # each press of Draw has a number
        with gr.Blocks(title="ldm", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            # The call that was restored, the pictures on the stage, and the number of the last press of Draw.
            self.parts: Changes = {"restored": gr.State({}), "shown": gr.State([]), "number": gr.State(0)}
            self.parts["made"] = gr.BrowserState([])  # the names of this browser's pictures, the latest first
            with gr.Row(equal_height=True):
                self._above()
            with gr.Row():
                with gr.Column(scale=6, min_width=320):
                    self._pictures()
                with gr.Column(scale=4, min_width=320):
                    self._settings()
            self._connect()

    def _above(self) -> None:
        self.parts["prompt"] = gr.Textbox(
            label="Prompt", max_lines=6, scale=10, min_width=320, autofocus=True, elem_id="prompt"
        )
        self.parts["draw"] = gr.Button("Draw", variant="primary", scale=2, min_width=120, elem_id="draw")
        self.parts["stop"] = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")

    def _pictures(self) -> None:
        plain: dict[str, Any] = {"show_label": False, "interactive": False, "allow_preview": False, "buttons": []}
        plain |= {"height": "auto", "fit_columns": False, "object_fit": "contain", "format": "png"}
        self.parts["stage"] = gr.Gallery(columns=1, elem_id="stage", **plain)
        self.parts["told"] = gr.HTML(WELCOME, elem_id="told")
        with gr.Row(visible=False) as self.parts["actions"]:
            self.parts["again"] = gr.Button("Use its settings", size="sm", min_width=120, elem_id="again")
            self.parts["from"] = gr.Button("Start from it", size="sm", min_width=120, elem_id="from")
        self.parts["gallery"] = gr.Gallery(visible=False, columns=6, elem_id="gallery", **plain)
        self.parts["drop"] = gr.File(
            label="Drop a PNG of ldm to restore its settings", file_types=[".png"], height=150, elem_id="drop"
        )

    def _settings(self) -> None:
        with gr.Accordion("Start from a picture", open=False, elem_id="start") as self.parts["start"]:
            self.parts["editor"] = gr.ImageEditor(
                show_label=False, type="pil", format="png", sources=["upload", "clipboard"], transforms=(),
                layers=False, brush=gr.Brush(default_size=8, colors=[(COLOUR, OPACITY)], color_mode="fixed"),
                placeholder="Drop a picture here, then paint\nover what shall be drawn anew", elem_id="editor",
            )  # fmt: skip
            self.parts["strength"] = gr.Slider(
                0.05, 1, STRENGTH, step=0.05, label="Strength", info="low: changes little; 1: nearly all"
            )
        with gr.Accordion("Settings"):
            models = list(self.service.models)
            self.parts |= controls.settings(models, self.service.settings(models[0]))

    def _connect(self) -> None:
        parts, every = self.parts, list(self.parts.values())
        named = {parts[name] for name in (*controls.NAMES, "restored", "number")}
        pressed = [parts["draw"].click, parts["prompt"].submit]
        begun = gr.on(pressed, self.begin, None, [parts["number"], parts["told"]], queue=False, show_progress="hidden")
        queued: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "multiple"}  # while another is ending, too
        drawn = begun.then(self.draw, named, every, **queued)
        drawn.then(self.keep, [parts["shown"], parts["made"]], every, **queued)
        parts["stop"].click(self.stop, parts["number"], parts["told"], queue=False, show_progress="hidden")
        for event, act, given in (
            (parts["model"].input, self.choose, "model"),
            (parts["drop"].upload, self.restore, "drop"),
            (parts["again"].click, self.use_settings, "shown"),
            (parts["from"].click, self.start_from, "shown"),
            (parts["gallery"].select, self.look, "made"),
            (self.blocks.load, self.gallery, "made"),
        ):
            event(act, parts[given], every, show_progress="hidden")

    def begin(self) -> tuple[int, str]:
        """Gives a drawing its number, before it waits for its turn."""
        return next(self.numbers), WAITING

    def stop(self, number: int) -> str:
        """Ends that drawing after its current step, or before its first one."""
        self.stopped.add(number)
        return STOPPED

    def draw(self, given: Changes) -> Iterator[Changes]:
        """Shows the pictures while they are drawn."""
        value = {name: given[self.parts[name]] for name in (*controls.NAMES, "restored", "number")}
        try:
            with in_a_sentence(), closing(self.service.draw(controls.request_of(value, value["restored"]))) as told:
                for one in told:
                    if value["number"] in self.stopped:
                        yield {self.parts["told"]: STOPPED}  # in place of a step that came after the button's answer
                        break
                    if isinstance(one, Step):
                        yield self._on_stage(one.estimates, f"Step {one.done} of {one.total}")
                    else:
                        yield self._shown(one.paths)
                        warn(one.remarks)
        except gr.Error as error:
            yield {self.parts["told"]: error.message}
            raise

    def keep(self, shown: list[Path], made: list[str]) -> Changes:
        """Puts what was drawn first into the gallery."""
        return self.gallery([path.name for path in shown if path.name not in made] + made)

    def gallery(self, made: list[str]) -> Changes:
        paths = self._paths(made)
        shown = gr.Gallery([str(path) for path in paths], visible=bool(paths), selected_index=None)
        return {self.parts["made"]: [path.name for path in paths], self.parts["gallery"]: shown}

    def look(self, made: list[str], event: gr.SelectData) -> Changes:
        return self._shown([self._paths(made)[event.index]])

    def _paths(self, made: list[str]) -> list[Path]:
        """Those of the names that are pictures of this service: a browser may send any."""
        paths = [self.service.out / name for name in made if re.fullmatch(r"\d{4,}\.png", name)]
        return [path for path in paths if path.is_file()]

    def _shown(self, paths: list[Path]) -> Changes:
        record = read_metadata(paths[0])
        seeds = str(record["seed"]) if len(paths) == 1 else f"{record['seed']} and the next {len(paths) - 1}"
        text = f"{record['prompt']} · seed {seeds} · {record['steps']} steps of {record['sampler']}"
        stage = self._on_stage([str(path) for path in paths], text)
        return stage | {self.parts["shown"]: paths, self.parts["actions"]: gr.Row(visible=True)}

    def _on_stage(self, pictures: Sequence[Any], text: str) -> Changes:
        columns = ceil(sqrt(len(pictures)))
        return {self.parts["stage"]: gr.Gallery(pictures, columns=columns), self.parts["told"]: escape(text)}

    @in_a_sentence()
    def choose(self, model: str) -> Changes:
        """The model's own settings."""
        own = controls.values_of(self.service.settings(model))
        return {self.parts[name]: value for name, value in own.items()} | {self.parts["restored"]: {}}

    @in_a_sentence()
    def use_settings(self, shown: list[Path]) -> Changes:
        found = restored(shown[0], self.service.models, self.service.out.parent)
        warn(found.remarks)
        gr.Info("Settings restored.", duration=3)
        return {self.parts[name]: value for name, value in found.controls.items()} | {
            self.parts["restored"]: found.call,
            self.parts["editor"]: painting_of(found.sources),
            self.parts["start"]: gr.Accordion(open=bool(found.sources)),
        }

    def restore(self, png: str) -> Iterator[Changes]:
        yield {self.parts["drop"]: None}  # there is room for another, also where this one is refused
        yield self.use_settings([Path(png)])

    def start_from(self, shown: list[Path]) -> Changes:
        painting = painting_of({"init": load_image(shown[0])})
        return {self.parts["editor"]: painting, self.parts["start"]: gr.Accordion(open=True)}

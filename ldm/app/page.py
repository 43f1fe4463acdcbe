"""The page: what is where, and what its buttons do."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr

from ldm.app import controls, stage
from ldm.app.background import in_background
from ldm.app.restoring import restored
from ldm.app.service import Service, Step
from ldm.commands.edge import EXPECTED, sentence
from ldm.image import load_image, read_metadata

Changes = dict[Any, Any]  # component → its new value

WELCOME = stage.invitation("Write a prompt and press Draw", "You will see the picture come out of the noise.")
WAITING = stage.invitation("Getting ready", "The model is being loaded, or draws for someone else.")
STOPPED = stage.invitation("Stopped", "The pictures that were finished are below.")


class Page:
    """What is on the page, by name in `parts`; `blocks` is what Gradio serves."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.numbers, self.stopped = count(1), set[int]()  # each press of Draw has a number
        with gr.Blocks(title="ldm", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            # The call of the picture that was restored; the paths of this visit; those of them that are on the stage.
            self.parts: Changes = {"restored": gr.State({}), "made": gr.State([]), "shown": gr.State([])}
            self.parts["number"] = gr.State(0)  # of the last press of Draw
            self._above()
            with gr.Row():
                with gr.Column(scale=6, min_width=320):
                    self._pictures()
                with gr.Column(scale=4, min_width=320):
                    self._settings()
            self._connect()

    def _above(self) -> None:
        with gr.Row(equal_height=True):
            self.parts["prompt"] = gr.Textbox(
                label="Prompt", lines=1, max_lines=6, scale=10, min_width=320, autofocus=True, elem_id="prompt"
            )
            self.parts["draw"] = gr.Button("Draw", variant="primary", scale=2, min_width=120, elem_id="draw")
            self.parts["stop"] = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")

    def _pictures(self) -> None:
        self.parts["stage"] = gr.HTML(WELCOME, elem_id="stage")
        with gr.Row(visible=False) as self.parts["actions"]:
            self.parts["again"] = gr.Button("Use its settings", size="sm", min_width=120, elem_id="again")
            self.parts["from"] = gr.Button("Start from it", size="sm", min_width=120, elem_id="from")
        self.parts["gallery"] = gr.Gallery(
            show_label=False,
            visible=False,
            columns=6,
            fit_columns=False,
            object_fit="contain",
            allow_preview=False,
            buttons=[],
            elem_id="gallery",
        )
        self.parts["drop"] = gr.File(
            label="Drop a PNG of ldm to restore its settings",
            file_types=[".png"],
            height=150,
            elem_id="drop",
        )

    def _settings(self) -> None:
        with gr.Accordion("Start from a picture", open=False, elem_id="start") as self.parts["start"]:
            self.parts |= controls.starting()
        with gr.Accordion("Settings"):
            self.parts |= controls.settings(self.service)

    def _connect(self) -> None:
        parts, every = self.parts, list(self.parts.values())
        named = {parts[name] for name in controls.NAMES} | {parts["restored"], parts["made"], parts["number"]}
        pressed = [parts["draw"].click, parts["prompt"].submit]
        begun = gr.on(pressed, self.begin, None, [parts["number"], parts["stage"]], queue=False, show_progress="hidden")
        begun.then(self.draw, named, every, show_progress_on=parts["stage"])
        parts["stop"].click(self.stop, parts["number"], parts["stage"], queue=False, show_progress="hidden")
        for event, act, given in (
            (parts["model"].input, self._guarded(self.choose), "model"),
            (parts["drop"].upload, self._guarded(self.restore), "drop"),
            (parts["again"].click, self._guarded(self.use_settings), "shown"),
            (parts["from"].click, self._guarded(self.start_from), "shown"),
            (parts["gallery"].select, self.look, "made"),
        ):
            event(act, parts[given], every, show_progress="hidden")

    def _guarded(self, act: Callable[[Any], Changes]) -> Callable[[Any], Changes]:
        def guarded(given: Any) -> Changes:
            try:
                return act(given)
            except Exception as error:
                return self._trouble(error)

        return guarded

    def _trouble(self, error: Exception) -> Changes:
        """In one sentence where everyone looks, and if nobody expected it in full on the terminal."""
        if not isinstance(error, EXPECTED):
            traceback.print_exception(error)
        return {self.parts["stage"]: stage.invitation("That did not work", sentence(error)), self.parts["drop"]: None}

    def begin(self) -> tuple[int, str]:
        """Gives a drawing its number, before it waits for its turn."""
        return next(self.numbers), WAITING

    def stop(self, number: int) -> str:
        """Ends that drawing after its current step, or before its first one."""
        self.stopped.add(number)
        return STOPPED

    def draw(self, given: Changes) -> Iterator[Changes]:
        """Shows the picture while it is drawn, and at the end puts it first into the gallery."""
        values, number = {name: given[self.parts[name]] for name in controls.NAMES}, given[self.parts["number"]]
        try:
            request = controls.request_of(values, given[self.parts["restored"]])
            with closing(in_background(partial(self.service.draw, request))) as told:
                for one in told:
                    if number in self.stopped:
                        yield {self.parts["stage"]: STOPPED}
                        break
                    if isinstance(one, Step):
                        yield {self.parts["stage"]: stage.drawing(one.estimates, one.done, one.total)}
                    else:
                        yield self._shown(one.paths, one.paths + given[self.parts["made"]])
                        warn(one.remarks)
        except Exception as error:
            yield self._trouble(error)

    def _shown(self, paths: list[Path], made: list[Path]) -> Changes:
        record = read_metadata(paths[0])
        seeds = str(record["seed"]) if len(paths) == 1 else f"{record['seed']} and the next {len(paths) - 1}"
        text = f"{record['prompt']} · seed {seeds} · {record['steps']} steps of {record['sampler']}"
        return {
            self.parts["stage"]: stage.drawn(paths, text),
            self.parts["shown"]: paths,
            self.parts["made"]: made,
            self.parts["gallery"]: gr.Gallery([str(path) for path in made], visible=True, selected_index=None),
            self.parts["actions"]: gr.Row(visible=True),
        }

    def look(self, made: list[Path], event: gr.SelectData) -> Changes:
        return self._shown([made[event.index]], made)

    def choose(self, model: str) -> Changes:
        """The model's own settings."""
        own = controls.values_of(self.service.settings(model))
        return {self.parts[name]: value for name, value in own.items()} | {self.parts["restored"]: {}}

    def use_settings(self, shown: list[Path]) -> Changes:
        return self._restored(shown[0])

    def restore(self, png: str) -> Changes:
        return self._restored(Path(png)) | {self.parts["drop"]: None}

    def _restored(self, png: Path) -> Changes:
        found = restored(png, self.service.models, self.service.out.parent)
        warn(found.remarks)
        gr.Info("Settings restored.", duration=3)
        return {self.parts[name]: value for name, value in found.controls.items()} | {
            self.parts["restored"]: found.call,
            self.parts["editor"]: controls.painting_of(found.sources),
            self.parts["start"]: gr.Accordion(open=bool(found.sources)),
        }

    def start_from(self, shown: list[Path]) -> Changes:
        painting = controls.painting_of({"init": load_image(shown[0])})
        return {self.parts["editor"]: painting, self.parts["start"]: gr.Accordion(open=True)}


def warn(remarks: list[str]) -> None:
    for remark in remarks:
        gr.Warning(escape(remark, quote=False))  # which may quote a file that came from anyone

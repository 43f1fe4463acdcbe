"""Measures on one GPU what the recipes, the plan and the README claim, in at most 470 seconds.

    python -m experiments.benchmark.gpu --out DIR [--stages NAME,NAME…] [--seconds N]
    python -m experiments.benchmark.gpu --out DIR --size tiny --device cpu     a rehearsal without a GPU

Writes one line of JSON per stage to stdout and to DIR/gpu.jsonl as soon as the stage ends, and the goals last. Stages
run in processes of their own, one at a time and in the order of their worth. A stage that fails, or exceeds its time
limit, reports what it measured until then, and the next one runs; a stage whose limit exceeds the remaining time is
skipped. This module does not import torch. Stages need torch and NumPy only, unless `Stage.needs` names more packages.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

Line = dict[str, Any]
SECONDS = 470.0
PATIENCE = 20  # limits of a rehearsal, whose machine may be busy, relative to those of a measurement
RESULTS = "gpu.jsonl"


@dataclass(frozen=True)
class Stage:
    """The function `where` (module:name in gpu_stages) and its limit in `seconds`, which includes starting a process.

    Consecutive stages of one `group` share a process. A stage that comes `after` another one is skipped unless that one
    succeeded in the same process.
    """

    where: str
    group: str
    seconds: float
    needs: tuple[str, ...] = ()
    after: str | None = None


LIGHTNING = ("lightning", "transformers", "safetensors")
STAGES = {
    "machine": Stage("machine:machine", "eager", 60),
    "noise": Stage("kernels:noise", "eager", 35),
    "regressions": Stage("regressions:regressions", "eager", 25),
    "attention": Stage("kernels:attention", "eager", 25),
    "eager": Stage("training:eager", "eager", 40, ("safetensors",)),
    "drawing": Stage("drawing:drawing", "eager", 45),
    "compiled": Stage("training:compiled", "compiled", 200, ("safetensors",)),
    "profile": Stage("training:profile", "compiled", 25, after="compiled"),
    "graph": Stage("training:graph", "compiled", 30, after="compiled"),
    "trainer": Stage("trainer:trainer", "trainer", 60, LIGHTNING),
    "drawing_compiled": Stage("drawing:drawing_compiled", "drawing", 90),
    "best": Stage("training:best", "best", 100, ("safetensors",)),
    "lora": Stage("training:lora", "more", 30, ("safetensors",)),
    "layers": Stage("kernels:layers", "more", 30),
    "checkpoint": Stage("trainer:checkpoint", "resume", 80, LIGHTNING),
    "batch_size": Stage("trainer:batch_size", "resume", 20, LIGHTNING),
    "cuda_tests": Stage("trainer:cuda_tests", "resume", 45, ("pytest", *LIGHTNING)),
    "peers": Stage("drawing:peers", "peers", 30, ("diffusers",)),
}
TRAINED = ("compiled", "graph", "best")


class Worker:
    """A process that runs the stages whose names it reads, and writes parts of their lines as JSON."""

    def __init__(self, command: list[str], group: str) -> None:
        self.group = group
        self.succeeded: list[str] = []
        self.usable = True
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lines: Queue[str] = Queue()
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def run(self, name: str, seconds: float) -> Line:
        """Returns the line of a stage, with an "error" if it failed, ended the process or exceeded its seconds."""
        line: Line = {}
        try:
            for part in self._parts(name, time.monotonic() + seconds):
                line |= part
        except Empty:
            line["error"] = f"stopped after the limit of {seconds:g} seconds"
            self.stop()
        except (EOFError, BrokenPipeError):
            self.stop()
            line.setdefault("error", f"the process ended with exit code {self.process.returncode}")
        if "error" not in line:
            self.succeeded.append(name)
        self.usable &= "CUDA error" not in line.get("error", "")  # after which every call fails
        return line

    def _parts(self, name: str, end: float) -> Iterator[Line]:
        """Yields what the process writes until the end of the stage; raises Empty at the time `end`."""
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        while part := self._line(end):
            yield part

    def _line(self, end: float) -> Line:
        text = self._lines.get(timeout=max(0.0, end - time.monotonic()))
        if not text:
            raise EOFError
        line: Line = json.loads(text)
        return line

    def stop(self) -> None:
        """Kills the process and those that it started, such as compilers."""
        self.usable = False
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(
    names: list[str], command: list[str], seconds: float, stages: dict[str, Stage], emit: Callable[[Line], None]
) -> dict[str, Line]:
    """Runs the stages by name within `seconds`, passes the line of each to `emit`, and returns them by stage.

    `command` starts a worker.
    """
    end, done = time.monotonic() + seconds, dict[str, Line]()
    worker: Worker | None = None
    try:
        for name in names:
            stage, began = stages[name], time.monotonic()
            if worker is not None and not (worker.usable and worker.group == stage.group):
                worker.stop()
                worker = None
            reason = refusal(stage, [] if worker is None else worker.succeeded, end - began)
            if reason is None:
                worker = worker or Worker(command, stage.group)
                line = worker.run(name, stage.seconds)
            else:
                line = {"skipped": reason}
            done[name] = {"stage": name, "took": round(time.monotonic() - began, 1)} | line
            emit(done[name])
    finally:
        if worker is not None:
            worker.stop()
    return done


def refusal(stage: Stage, before: list[str], left: float) -> str | None:
    """Returns why a stage is skipped, or None if it runs; `before` are the stages that succeeded in its process."""
    if missing := [name for name in stage.needs if find_spec(name) is None]:
        return f"needs {', '.join(missing)}"
    if stage.after is not None and stage.after not in before:
        return f"needs what {stage.after} leaves in the same process"
    if stage.seconds > left:
        return f"may take {stage.seconds:g} seconds, but {max(0.0, left):.0f} are left"
    return None


def goals(done: dict[str, Line]) -> Line:
    """Compares the measurements with the goals, of which those that were not measured are null."""
    speed = max((done[name].get("images_per_second", 0.0) for name in TRAINED if name in done), default=0.0) or None
    seconds = [line["fastest_seconds"] for line in done.values() if "fastest_seconds" in line]
    parts = [part for line in done.values() for part in (line, *line.values()) if isinstance(part, dict)]
    peaks = [part["peak_over_plan"] for part in parts if "peak_over_plan" in part]
    furthest = max(peaks, key=lambda ratio: abs(ratio - 1), default=None)
    share, drawn = share_of_products(done, speed), min(seconds, default=None)
    return {
        "stage": "goals",
        "images_per_second": {"measured": speed, "goal": 150, "reached": speed and speed >= 150},
        "share_of_matmul_rate": {"measured": share, "goal": 0.45, "reached": share and share >= 0.45},
        "seconds_for_50_steps": {"measured": drawn, "goal": 0.6, "reached": drawn and drawn <= 0.6},
        "peak_over_plan": {
            "measured": furthest,
            "goal": [0.85, 1.15],
            "reached": furthest and 0.85 <= furthest <= 1.15,
        },
    }


def share_of_products(done: dict[str, Line], speed: float | None) -> float | None:
    """Returns the share of the rate of matrix products, measured in the same run, that training reaches."""
    flops = next((line["flops_per_image"] for line in done.values() if "flops_per_image" in line), None)
    rate = done.get("machine", {}).get("matmul_flops_per_second", {}).get("bfloat16")
    return speed * flops / rate if speed and flops and rate else None


def work(size: str, device: str, folder: Path) -> None:
    """Runs the stages whose names come from stdin, as the process of a `Worker`."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that whatever else is printed does not mix with the lines
    from experiments.benchmark.gpu_stages.context import Context

    context = Context.of(size, device, folder)
    for name in map(str.strip, sys.stdin):
        for part in parts_of(name, context):
            print(json.dumps(part), file=lines, flush=True)
        print("{}", file=lines, flush=True)


def parts_of(name: str, context: Any) -> Iterator[Line]:
    """Yields the measurements of a stage as they are made, and its error if it fails."""
    from experiments.benchmark.gpu_stages.context import load, release

    try:
        yield from load(STAGES[name].where)(context)
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {str(error)[:1000]}", "at": place(error)}
    if context.not_run:
        yield {"not_run": sorted(context.not_run)}
        context.not_run.clear()
    release(context)


def place(error: BaseException) -> list[str]:
    """Returns the places of the innermost frames of the error's traceback."""
    import traceback

    return [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-6:]]


def emitter(file: Path) -> Callable[[Line], None]:
    """Returns a function that prints a line and appends it to the file."""

    def emit(line: Line) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        with file.open("a") as results:
            results.write(text + "\n")

    return emit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results and the trace")
    parser.add_argument("--stages", default=",".join(STAGES), help="stages to run, in this order (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of all stages together (470)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: networks for a rehearsal")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.size, args.device, args.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `run` stops the worker
    names, patience = args.stages.split(","), PATIENCE if args.size == "tiny" else 1
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"there is no stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / RESULTS).unlink(missing_ok=True)
    emit = emitter(args.out / RESULTS)
    stages = {name: replace(stage, seconds=patience * stage.seconds) for name, stage in STAGES.items()}
    command = [sys.executable, "-m", "experiments.benchmark.gpu", "--worker", "--out", str(args.out)]
    command += ["--size", args.size, "--device", args.device]
    emit(goals(run(names, command, patience * args.seconds, stages, emit)))


if __name__ == "__main__":
    main()

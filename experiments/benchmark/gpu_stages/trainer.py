"""Measures the Trainer: speed, memory, synchronisations, checkpoints and resuming; runs tests that need a GPU."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning import Callback

from experiments.benchmark.checkpoint import Timed
from experiments.benchmark.gpu import Line
from experiments.benchmark.gpu_stages.context import SIZES, Context, synchronisations
from experiments.benchmark.gpu_stages.runs import EVERY, STEPS, fit, measures, module, short_run
from experiments.benchmark.gpu_stages.step import planned
from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.monitoring.largest_batch import LargestBatch

ROOT = Path(__file__).parents[3]
SKIPPED = 3  # steps before the measurement
SHARE = 0.1  # of the GPU's memory, in which the largest batch is searched
KILLED_AT = STEPS - 1


class Watch(Callback):
    """Times `steps` steps, and lists the synchronisations of the next one."""

    def __init__(self, context: Context, steps: int) -> None:
        self.context, self.end = context, SKIPPED + steps
        self.stack = ExitStack()
        self.clock, self.seconds = 0.0, 0.0
        self.peak: int | None = None
        self.waits: list[str] | None = None

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == SKIPPED:
            self.context.synchronize()
            self.context.forget_peak()
            self.clock = time.perf_counter()
        if trainer.global_step == self.end:
            self.context.synchronize()
            self.seconds = (time.perf_counter() - self.clock) / (self.end - SKIPPED)
            self.peak = self.context.peak()
            if self.context.gpu_only("counts of synchronisations"):
                self.waits = self.stack.enter_context(synchronisations())
        if trainer.global_step == self.end + 1:
            self.stack.close()


def trainer(context: Context) -> Iterator[Line]:
    """Yields what `training.eager` does, of the Trainer with the callbacks of a run."""
    batch = context.size.batch
    plan = planned(context.size, batch)
    watch = Watch(context, context.size.steps)
    with tempfile.TemporaryDirectory() as folder:
        training = module(context, context.size.unet)
        fit(context, training, batch, watch.end + 2, [watch, *measures(Path(folder))])
    yield {"batch": batch, "seconds_per_step": watch.seconds, "images_per_second": batch / watch.seconds}
    if watch.peak is not None:
        yield {"peak_bytes": watch.peak, "peak_over_plan": watch.peak / sum(plan["planned_bytes"].values())}
    yield {"synchronisations_of_a_step": watch.waits, **plan}


def checkpoint(context: Context) -> Iterator[Line]:
    """Yields how long training waits for checkpoints, and how far killed and resumed runs differ from others."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's default on Hopper, which determinism needs
    with tempfile.TemporaryDirectory() as name:
        saving = Timed(Path(name), EVERY)
        training = module(context, context.size.saved)
        fit(context, training, 2, 3 * EVERY, [EMA(), saving])
        size = (Path(name) / "last.ckpt").stat().st_size
    yield {"bytes": size, "seconds_of_waiting": saving.waits, "seconds_of_writing": saving.writes}
    del training
    for deterministic in (False, True) if context.gpu_only("kernels that are not deterministic") else (True,):
        yield {"deterministic" if deterministic else "default": resumed(context, deterministic)}


def resumed(context: Context, deterministic: bool) -> Line:
    """Compares the weights of two equal runs, and of a run that was killed and resumed."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / kind for kind in ("first", "second", "killed")]
        first, second = (short_run(context, Checkpoint(folder, EVERY), deterministic) for folder in folders[:2])
        code = killed(context, folders[2], deterministic)
        resume = folders[2] / "last.ckpt"
        third = short_run(context, Checkpoint(folders[2], EVERY), deterministic, resume=resume)
    torch.use_deterministic_algorithms(False)
    return {
        "exit_code_of_the_killed_run": code,
        "largest_difference_of_equal_runs": largest_difference(first, second),
        "largest_difference_after_resuming": largest_difference(first, third),
    }


def killed(context: Context, folder: Path, deterministic: bool) -> int:
    """Returns the exit code of a process that trains and kills itself."""
    name = next(name for name, size in SIZES.items() if size is context.size)
    arguments = ["--folder", str(folder), "--size", name, "--device", context.device.type]
    arguments += ["--kill-at", str(KILLED_AT), *(["--deterministic"] if deterministic else [])]
    program = [sys.executable, "-m", "experiments.benchmark.gpu_stages.runs"]
    return subprocess.run([*program, *arguments], cwd=ROOT, check=False).returncode


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def batch_size(context: Context) -> Iterator[Line]:
    """Yields the largest batch of a small network that debug=batch_size finds in a share of the GPU's memory."""
    if context.gpu_only("running out of memory"):
        torch.cuda.set_per_process_memory_fraction(SHARE)
    search = LargestBatch(mode="binsearch", init_val=1, steps_per_trial=2, max_trials=20 if context.on_gpu else 2)
    try:
        fit(context, module(context, context.size.small), 1, 1, [search])
    finally:
        if context.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    yield {"largest_batch": search.optimal_batch_size, "share_of_memory": SHARE}


def cuda_tests(context: Context) -> Iterator[Line]:
    """Yields the result of the tests marked cuda, which are skipped without a GPU."""
    context.gpu_only("tests marked cuda")
    options = ["-o", "addopts=", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *context.size.tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    yield {"exit_code": done.returncode, "summary": done.stdout.strip().splitlines()[-1:]}
    if done.returncode:
        yield {"output": done.stdout[-4000:], "stderr": done.stderr[-1000:]}

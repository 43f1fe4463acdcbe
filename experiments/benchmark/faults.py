"""Compares the results of runs that are killed repeatedly with those of an uninterrupted run.

    ldm bench faults --kills 50 --json FILE

A tiny UNet is trained by train.py's own code, with accumulation, EMA, validation, previews and a checkpoint every
second step, and killed with SIGKILL, at random times and at random calls of the functions in MOMENTS. It is resumed
with resume=auto until it is done. The bytes of weights, EMA, optimizer state, logged values, previews and the exported
network are compared. One more run is killed and resumed with different numbers of processes over gloo, where weights
may differ by rounding, and its samples are compared step by step.
"""

import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train
from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing import checkpoint, checkpoint_file
from ldm.callbacks.images import previews
from ldm.progress import Progress
from ldm.report.runs import read_scalars
from ldm.training.diffusion import DiffusionTraining
from ldm.training.muon import Muon

STEPS = 12
RUN = (
    *("model.width=16", "model.groups=8", "model.blocks=1", "model.heads=2", "sampler.steps=2", "metrics=none"),
    *("++data.count=18", "data.batch_size=4", "data.global_batch=8", "lr=constant", "lr.warmup=0", "ema.decay=0.5"),
    *(f"trainer.max_steps={STEPS}", "trainer.val_check_interval=6", "trainer.limit_val_batches=2"),
    *("trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_train_steps=2"),
    *("callbacks.previews.every_n_train_steps=4", "callbacks.previews.prompts=[a red circle]", "name=faults"),
    "precision=fp32",
)
# The only values that differ between identical runs.
TIMED = ("train/images_per_second", "train/data_wait", "train/flops_per_second", "train/mfu")
# The functions in which a run is killed: owner, name, and number of calls in two steps.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "in a batch": (DiffusionTraining, "training_step", 4),
    "in an optimizer step": (Muon, "step", 2),
    "in an EMA update": (EMA, "update", 2),
    "in a validation": (DiffusionTraining, "validation_step", 2),
    "in a preview": (previews, "save_png", 1),
    "copying the state": (checkpoint.AtomicCheckpointIO, "_copy", 1),
    "writing a checkpoint": (checkpoint_file, "write", 1),
    "naming it the last": (checkpoint, "_also_as", 1),
    "deleting an old one": (checkpoint.Checkpoint, "_prune", 1),
}


def measure(kills: int = 50, seed: int = 0) -> dict[str, Any]:
    """Runs all kills and comparisons, in forks of this process, because imports take longer than the runs."""
    rng, progress = random.Random(seed), Progress(kills, "kills", "faults: ")
    counts: Counter[str] = Counter()
    differing, compared, runs = 0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.monotonic()
        run(folder / "straight")
        seconds = time.monotonic() - began
        straight = results(folder / "straight")
        while counts.total() < kills:
            runs += 1
            for moment in killed(folder / str(runs), rng, seconds, min(5, kills - counts.total())):
                counts[moment] += 1
                progress.step()
            wrong, size = difference(straight, results(folder / str(runs)))
            differing, compared = differing + wrong, compared + size
        other = with_other_ranks(folder / "ranks", folder / "straight", rng)
    survived = {"kills": counts.total(), "at": dict(counts), "runs": runs}
    return {**survived, "bytes": compared, "bytes_differing": differing, "with_other_ranks": other}


def killed(folder: Path, rng: random.Random, seconds: float, most: int) -> Iterator[str]:
    """Trains in `folder` to the end, and yields the moment of each kill."""
    for _ in range(most):
        if rng.random() < 0.3:
            status, moment = run(folder, after=rng.uniform(0.1, 1.0) * seconds), "at a random time"
        else:
            moment = rng.choice(list(MOMENTS))
            owner, function, calls = MOMENTS[moment]
            status = run(folder, fault=partial(kill_in, owner, function, rng.randint(1, 2 * calls)))
        if status == 0:
            return
        yield moment
    if status := run(folder):
        raise RuntimeError(f"the run in {folder} could not be resumed: exit code {status}")


def with_other_ranks(folder: Path, straight: Path, rng: random.Random) -> dict[str, Any]:
    """Kills a run on one process, then on two, finishes it on one, and compares weights, losses and samples.

    Of a repeated step the last samples count, so that both skipped and repeated samples are detected.
    """
    for ranks, calls in ((1, 13), (2, 9)):  # killed in the sixth step, then at most five steps later
        run(folder, fault=partial(kill_in, DiffusionTraining, "training_step", calls - rng.randint(0, 2)), ranks=ranks)
    run(folder)
    ours, theirs = (checkpoint_file.read(path / "checkpoints" / checkpoint_file.LAST) for path in (folder, straight))
    pairs = [(ours[part][name], theirs[part][name]) for part in ("state_dict", "ema") for name in theirs[part]]
    losses = [read_scalars(path)["train/loss"].values for path in (folder, straight)]
    dealt, wanted = samples(folder), samples(straight)
    return {
        "steps_on_two_ranks": len(
            {line.split()[0] for file in folder.parent.glob("ranks.samples.*.1") for line in file.open()}
        ),
        "largest_difference_of_weights": max(float((a - b).abs().max()) for a, b in pairs),
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "steps_with_other_samples": sum(dealt.get(step) != held for step, held in wanted.items()),
    }


def run(
    folder: Path, *overrides: str, after: float | None = None, fault: Callable[[], None] = lambda: None, ranks: int = 1
) -> int:
    """Returns the exit code of a training in processes of its own, which are killed `after` that many seconds."""
    port, launch = free_port(), time.time_ns()
    fork = multiprocessing.get_context("fork")
    arguments = folder, overrides, fault, ranks, port, launch
    processes = [fork.Process(target=work, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    processes[-1].join(after)
    for process in processes:
        if after is not None:
            process.kill()
        process.join()
    status = processes[-1].exitcode
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the training in {folder} failed:\n{Path(f'{folder}.log').read_text()[-2000:]}")
    return status


def work(
    rank: int, folder: Path, overrides: tuple[str, ...], fault: Callable[[], None], ranks: int, port: int, launch: int
) -> None:
    """Runs one process of a training, with its output in a file."""
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)  # the same sums in the same order in every run
    if ranks > 1:
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "RANK": rank}
        os.environ.update({k: str(v) for k, v in names.items()} | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"})
        overrides = (*overrides, "strategy=ddp", f"trainer.devices={ranks}", "data.batch_size=2")
    note_samples(Path(f"{folder}.samples.{launch}.{rank}"))
    if rank == ranks - 1:
        fault()
    sys.argv = ["train.py", f"--config-path={train.CONF}", *RUN, f"run_dir={folder}", "resume=auto", *overrides]
    train.main()


def kill_in(owner: Any, function: str, call: int) -> None:
    """Kills the process in the given call of the function; `write` leaves half of a temporary file."""
    original, left = getattr(owner, function), [call]

    def fatal(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if function == "write":
                args[0].parent.mkdir(parents=True, exist_ok=True)
                args[0].with_name(f".{args[0].name}.00000000.tmp").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, function, fatal)


def note_samples(file: Path) -> None:
    """Records the samples of each step in a file while this process trains."""
    original = DiffusionTraining.training_step

    def recording(self: DiffusionTraining, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        pairs = zip(batch["draw"].tolist(), batch["id"].tolist(), strict=True)
        with file.open("a") as lines:
            lines.write("".join(f"{self.global_step} {epoch} {id}\n" for epoch, id in pairs))
        return original(self, batch, index)

    DiffusionTraining.training_step = recording  # type: ignore[assignment, method-assign]


def results(folder: Path) -> dict[str, Tensor]:
    """Returns all results of a run by name, as bytes, except those that depend on the clock."""
    saved = checkpoint_file.read(folder / "checkpoints" / checkpoint_file.LAST)
    tensors = {f"weights {name}": tensor for name, tensor in saved["state_dict"].items()}
    tensors |= {f"EMA {name}": tensor for name, tensor in saved["ema"].items()}
    for number, state in saved["optimizer_states"][0]["state"].items():
        tensors |= {f"optimizer {number} {name}": torch.as_tensor(value) for name, value in state.items()}
    for name, curve in read_scalars(folder).items():
        if name not in TIMED:
            tensors[f"log {name}"] = torch.tensor([curve.steps, curve.values], dtype=torch.float64)
    for file in [*folder.glob("samples/*.png"), *folder.glob("*.safetensors")]:
        tensors[f"file {file.name}"] = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    return {name: tensor.contiguous().flatten().view(torch.uint8) for name, tensor in tensors.items()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[int, int]:
    """Returns the number of differing bytes, and of all bytes; a result that only one run has differs completely."""
    wrong, size = 0, sum(map(len, ours.values()))
    for name in ours.keys() | theirs.keys():
        mine, other = ours.get(name, torch.empty(0)), theirs.get(name, torch.empty(0))
        count = int((mine != other).sum()) if len(mine) == len(other) else max(len(mine), len(other))
        if count:
            warnings.warn(f"{name}: {count} bytes differ", stacklevel=2)
        wrong += count
    return wrong, size


def samples(folder: Path) -> dict[int, Counter[tuple[int, int]]]:
    """Returns by step the (epoch, id) that all ranks last trained on, because a resumed run repeats some steps."""
    launches: dict[str, dict[int, Counter[tuple[int, int]]]] = {}
    for file in sorted(folder.parent.glob(f"{folder.name}.samples.*")):
        steps = launches.setdefault(file.suffixes[-2], {})
        for line in file.read_text().splitlines():
            step, epoch, id = map(int, line.split())
            steps.setdefault(step, Counter())[epoch, id] += 1
    return {step: pairs for _, steps in sorted(launches.items()) for step, pairs in steps.items()}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

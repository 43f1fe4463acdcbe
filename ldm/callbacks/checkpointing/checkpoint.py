"""Saves a run's state periodically and when it is asked to stop, in the background of training."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ldm.callbacks.checkpointing import checkpoint_file
from ldm.callbacks.checkpointing.checkpoint_file import STEP
from ldm.callbacks.checkpointing.interruption import Interruption, stop_cause, write_stderr
from ldm.callbacks.checkpointing.resuming import align_progress, batch_split, run_missed_validation, validation_due
from ldm.callbacks.checkpointing.time_limit import time_limit
from ldm.callbacks.find import find
from ldm.callbacks.full_disk import tolerate_full_disk
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.callbacks.steps import is_final_batch, stepped
from ldm.files import leftovers

POLL_SECONDS = 1.0


class AtomicCheckpointIO(CheckpointIO):
    """Writes checkpoints atomically; reads only tensors and plain data, after verifying them."""

    def __init__(self) -> None:
        self.held: tuple[Path, dict[str, Any]] | None = None  # destination and checkpoint
        self._holding: str | None = None
        self._buffers: list[Tensor] = []

    @contextmanager
    def holding(self, copy: bool = True) -> Iterator[None]:
        """Saves only copy the state to `held` inside the context, so that training continues while it is written.

        copy=False holds the state itself, for when nothing is trained before it is written.
        """
        self._holding = "copy" if copy else "itself"
        try:
            yield
        finally:
            self._holding = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if self._holding:
            self.held = Path(path), self._copy(checkpoint) if self._holding == "copy" else checkpoint
        else:
            checkpoint_file.write(path, checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return checkpoint_file.read(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)

    def _copy(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Copies the tensors into the buffers of the last copy, because allocating memory takes longer than copying."""
        old, buffers = iter(self._buffers), []

        def copy(tensor: Tensor) -> Tensor:
            buffer = next(old, None)
            if buffer is None or (buffer.shape, buffer.stride(), buffer.dtype) != (
                tensor.shape,
                tensor.stride(),
                tensor.dtype,
            ):
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            buffers.append(buffer.copy_(tensor, non_blocking=True))
            return buffer

        held: dict[str, Any] = apply_to_collection(checkpoint, Tensor, lambda tensor: copy(tensor.detach()))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._buffers = buffers
        return held


class Checkpoint(lightning_callbacks.Checkpoint):
    """Saves `folder`/last.ckpt every `every_n_train_steps` steps, before validation, at the end and when stopped.

    The newest `keep` checkpoints are also kept as step_N.ckpt, and those of every `keep_every`-th step permanently.
    The state is copied at the end of a batch, where resuming is exact, and written in the background once the step is
    logged, by all ranks if the strategy shards it. If the disk is full, a checkpoint is skipped with a warning, but the
    last one fails the run. On Ctrl-C, SIGTERM or SIGUSR1 on any rank, and when a TimeLimit expires, the step is
    finished and saved, and the process exits with 128 + the signal number, or with TIMEOUT; several GPUs agree on this
    about once per second. Requires the plugin AtomicCheckpointIO. Lightning runs checkpoint callbacks last, so that the
    EMA already includes the step.
    """

    def __init__(
        self, folder: str | Path, every_n_train_steps: int = 1000, keep: int = 2, keep_every: int | None = None
    ) -> None:
        if every_n_train_steps < 1 or keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"callbacks.checkpoint.every_n_train_steps is {every_n_train_steps}, keep {keep} and keep_every "
                f"{keep_every}, but each must be 1 or more, or keep_every null"
            )
        self.path = Path(folder) / checkpoint_file.LAST
        self.every_n_train_steps, self.keep, self.keep_every = every_n_train_steps, keep, keep_every
        self.interruption = Interruption()
        self._copied = self._written = 0  # the steps of the last copy and of the last written file
        self._unsaved = False  # the last copy of this rank was not written, because the disk was full
        self._exit_code = 0  # set when any rank is asked to stop
        self._polled = 0, 0.0  # step and time at which ranks last agreed on the exit code
        self._next_poll = 0  # the step at which they will do so next
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["dealing"] = batch_split(trainer)

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        align_progress(trainer, checkpoint)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._copied = self._written = trainer.global_step
        self._exit_code = 0
        self._polled, self._next_poll = (trainer.global_step, time.monotonic()), 0
        if trainer.is_global_zero:
            links = self.path.parent.glob(_link_name(self.path).name)
            for leftover in (*leftovers(self.path.parent, self._is_own), *links):  # of a process that was killed
                leftover.unlink()
        self.interruption.watch(time_limit(trainer))
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]  # see there
        run_missed_validation(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not stepped(trainer, batch_idx):  # half-accumulated gradients would be lost
            return
        self.interruption.graceful = not is_final_batch(trainer)
        self._exit_code = self._polled_exit_code(trainer)
        due = trainer.global_step % self.every_n_train_steps == 0
        if due or is_final_batch(trainer) or self._exit_code or validation_due(trainer):
            self._copy(trainer)
            if speed := find(trainer, Throughput):
                speed.work()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.interruption.graceful:  # after the last step, this file would mark the run as done without validation
            self._write(trainer)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._exit_code = self._requested_exit_code(trainer)[0]
        self._stop_if_requested(trainer)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._write(trainer)
        if is_final_batch(trainer):  # the weights are written without a copy, and averages will soon replace them
            self._wait()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Saves runs that end other than after a batch, too, such as by early stopping.

        Raises OSError if the disk is full, because a run without its last checkpoint is not finished.
        """
        self._copy(trainer)
        self._write(trainer)
        self._wait()
        self.interruption.restore()
        if self._unsaved:
            raise OSError(
                f"the last checkpoint, of step {trainer.global_step}, was not saved because the disk is full: free "
                "disk space, and run the same command with resume=auto"
            )

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._join()
        self.interruption.restore()

    def _polled_exit_code(self, trainer: Trainer) -> int:
        """Returns `_requested_exit_code` at the end of a step, or 0 if the ranks agree on it in a later step."""
        step = trainer.global_step
        if trainer.world_size > 1 and step < self._next_poll and not is_final_batch(trainer):
            return 0
        (last, then), now = self._polled, time.monotonic()
        code, seconds = self._requested_exit_code(trainer, (now - then) / max(1, step - last))
        self._polled = step, now
        self._next_poll = step + steps_to_next_poll(seconds, trainer.strategy.root_device)
        return code

    def _requested_exit_code(self, trainer: Trainer, seconds: float = 0.0) -> tuple[int, float]:
        """Returns the highest exit code that any rank was asked to stop with; a signal's exceeds a time limit's.

        The second value is the maximum of `seconds` over all ranks.
        """
        if trainer.world_size == 1:
            return self.interruption.code, seconds
        own = torch.tensor([self.interruption.code, seconds], dtype=torch.float64, device=trainer.strategy.root_device)
        code, longest = trainer.strategy.reduce(own, reduce_op="max").tolist()
        return int(code), longest

    def _copy(self, trainer: Trainer) -> None:
        if trainer.global_step == self._copied:
            return
        self._wait()
        self._copied = trainer.global_step
        with self._io(trainer).holding(copy=not is_final_batch(trainer)):
            trainer.save_checkpoint(self._own(self._copied), weights_only=False)

    def _write(self, trainer: Trainer) -> None:
        """Starts writing the copy, because everything of its step is logged by now; stops the run if requested."""
        io = self._io(trainer)
        if io.held is not None:
            with tolerate_full_disk("the log"):
                for logger in trainer.loggers:
                    logger.save()
            held, io.held = io.held, None
            self._writer = threading.Thread(target=self._publish, args=held, name="checkpoint")
            self._writer.start()
        self._stop_if_requested(trainer)

    def _publish(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Writes a checkpoint in a background thread; each rank writes its own file if it has one."""
        step = self._copied
        kept = f"the previous {self.path} is kept" if self.path.exists() else "there is no earlier checkpoint"
        self._unsaved = True
        try:
            with tolerate_full_disk(f"the checkpoint of step {step}", f"{kept}, and training continues"):
                checkpoint_file.write(path, checkpoint)
                if path == self._own(step):
                    _also_as(path, self.path)
                    self._prune(step)
                self._written, self._unsaved = step, False
        except Exception as error:  # raised when the main thread waits for this one
            self._failure = error

    def _own(self, step: int) -> Path:
        return self.path.with_name(f"step_{step:08}.ckpt")

    def _is_own(self, name: str) -> bool:
        return name == self.path.name or STEP.fullmatch(name) is not None

    def _prune(self, step: int) -> None:
        """Deletes old checkpoints, counting only complete ones: some ranks may still be writing, or have failed to."""
        found = [(int(name[1]), file) for file in self.path.parent.iterdir() if (name := STEP.fullmatch(file.name))]
        steps = sorted({number for number, _ in found if number <= step}, reverse=True)
        complete = (number for number in steps if checkpoint_file.is_complete(self._own(number)))
        oldest = min(islice(complete, self.keep), default=0)
        for number, file in found:
            if number < oldest and not (self.keep_every and number % self.keep_every == 0):
                file.unlink()

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _wait(self) -> None:
        """Waits for the last write, and raises its error if it failed."""
        self._join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _stop_if_requested(self, trainer: Trainer) -> None:
        if not self._exit_code:
            return
        self._wait()
        trainer.strategy.barrier("checkpoint")  # a launcher may end all ranks when the first one exits
        if trainer.is_global_zero:
            where = self._where_stopped(trainer.global_step)
            cause = stop_cause(self._exit_code)
            write_stderr(f"stopped by {cause} {where}: to continue, resume with resume={self.path}")
        raise SystemExit(self._exit_code)

    def _where_stopped(self, step: int) -> str:
        if self._written == step:
            return f"after step {step}"
        if self.interruption.graceful:
            return f"after step {step}, which could not be saved"
        return f"in the validation after the last step, {step}; the checkpoint of step {self._written} is kept"

    def _io(self, trainer: Trainer) -> AtomicCheckpointIO:
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, AtomicCheckpointIO):
            raise TypeError(
                "Checkpoint requires AtomicCheckpointIO: pass plugins=[AtomicCheckpointIO()] to the Trainer"
            )
        return io


def steps_to_next_poll(seconds: float, device: torch.device) -> int:
    """Returns the number of steps, of `seconds` each, until the ranks next agree on whether to stop.

    On GPUs they do so about every POLL_SECONDS, because it waits for all devices.
    """
    return 1 if device.type == "cpu" else max(1, int(POLL_SECONDS / max(seconds, 1e-3)))


def _nothing() -> None:
    """Replaces Lightning's agreement on SIGTERM before each batch, which reads back; `Interruption` handles signals."""


def _also_as(file: Path, name: Path) -> None:
    """Makes `name` a hard link to the file, or a copy if the file system has no links."""
    link = _link_name(name)
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(file)
    except OSError:
        copyfile(file, link)
    link.replace(name)


def _link_name(name: Path) -> Path:
    return name.with_name(f".{name.name}.link.tmp")

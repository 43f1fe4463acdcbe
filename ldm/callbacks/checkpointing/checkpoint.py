"""When a run's state is saved: on time, when it is asked to stop, and without holding training up."""

import threading
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


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the old file and renames; reads nothing but undamaged tensors and plain data."""

    def __init__(self) -> None:
        self.held: tuple[Path, dict[str, Any]] | None = None  # where to, and what
        self._holding: str | None = None
        self._memory: list[Tensor] = []

    @contextmanager
    def holding(self, copy: bool = True) -> Iterator[None]:
        """Within it a save only copies the state, to `held`: training goes on while the copy is written.

        copy=False holds the state itself, where nothing is trained before it is written.
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
        """In the memory of the last copy, since fetching new memory takes longer than copying."""
        old, memory = iter(self._memory), []

        def copy(tensor: Tensor) -> Tensor:
            place = next(old, None)
            if place is None or (place.shape, place.stride(), place.dtype) != (
                tensor.shape,
                tensor.stride(),
                tensor.dtype,
            ):
                place = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            memory.append(place.copy_(tensor, non_blocking=True))
            return place

        held: dict[str, Any] = apply_to_collection(checkpoint, Tensor, lambda tensor: copy(tensor.detach()))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._memory = memory
        return held


class Checkpoint(lightning_callbacks.Checkpoint):
    """Keeps `folder`/last.ckpt: every n optimizer steps, before a validation, at the end, and where a run is stopped.

    The newest `keep` stay as step_N.ckpt, too, and for good those of every `keep_every`-th step. The state is copied
    at the end of a batch, where resuming is exact, and written in the background once the step is logged, by all ranks
    if the strategy gives each its part. A full disk is told and costs only this checkpoint. On Ctrl-C, SIGTERM or
    SIGUSR1, to whichever rank, and after the time of a TimeLimit, the step is finished and saved, and the process exits
    with 128 + the signal, or with TIMEOUT. Lightning runs it after all other callbacks, so that the EMA has taken in
    the step; it needs the plugin AtomicCheckpointIO.
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
        self._copied = self._written = 0  # steps: of the last copy, and of the last file
        self._exit_code = 0  # that some rank was asked to stop with
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["dealing"] = batch_split(trainer)

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        align_progress(trainer, checkpoint)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._copied = self._written = trainer.global_step
        self._exit_code = 0
        if trainer.is_global_zero:
            for left in leftovers(self.path.parent, self._is_own):  # by a process killed while it wrote
                left.unlink()
        self.interruption.watch(time_limit(trainer))
        run_missed_validation(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not stepped(trainer, batch_idx):  # half-accumulated gradients would be lost
            return
        self.interruption.graceful = not is_final_batch(trainer)
        self._exit_code = self._asked(trainer)
        on_time = trainer.global_step % self.every_n_train_steps == 0
        if on_time or is_final_batch(trainer) or self._exit_code or validation_due(trainer):
            self._copy(trainer)
            if speed := find(trainer, Throughput):
                speed.work()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.interruption.graceful:  # else the run would count as finished without this validation
            self._write(trainer)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._exit_code = self._asked(trainer)
        self._stop_if_asked(trainer)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._write(trainer)
        if is_final_batch(
            trainer
        ):  # what is written then are the weights themselves, in whose place others soon put averages
            self._wait()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Also for runs that end elsewhere than after a batch, such as by early stopping."""
        self._copy(trainer)
        self._write(trainer)
        self._wait()
        self.interruption.restore()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._join()
        self.interruption.restore()

    def _asked(self, trainer: Trainer) -> int:
        """The exit code that any rank was asked to stop with: a signal's is higher than that of a time limit."""
        own = torch.tensor(self.interruption.code, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(own, reduce_op="max"))

    def _copy(self, trainer: Trainer) -> None:
        if trainer.global_step == self._copied:
            return
        self._wait()
        self._copied = trainer.global_step
        with self._io(trainer).holding(copy=not is_final_batch(trainer)):
            trainer.save_checkpoint(self._own(self._copied), weights_only=False)

    def _write(self, trainer: Trainer) -> None:
        """Starts to write the copy, now that all that belongs to its step is logged; stops where that was asked."""
        io = self._io(trainer)
        if io.held is not None:
            with tolerate_full_disk("THE LOG"):
                for logger in trainer.loggers:
                    logger.save()
            held, io.held = io.held, None
            self._writer = threading.Thread(target=self._publish, args=held, name="checkpoint")
            self._writer.start()
        self._stop_if_asked(trainer)

    def _publish(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Runs beside the training; each rank writes its own file, if it has any."""
        step = self._copied
        kept = f"the older {self.path} is kept" if self.path.exists() else "THERE IS NO OLDER ONE"
        try:
            with tolerate_full_disk(f"THE CHECKPOINT OF STEP {step}", f"{kept} and training goes on"):
                checkpoint_file.write(path, checkpoint)
                if path == self._own(step):
                    _also_as(path, self.path)
                    self._prune(step)
                self._written = step
        except Exception as error:  # raised again where training waits for this thread
            self._failure = error

    def _own(self, step: int) -> Path:
        return self.path.with_name(f"step_{step:08}.ckpt")

    def _is_own(self, name: str) -> bool:
        return name == self.path.name or STEP.fullmatch(name) is not None

    def _prune(self, step: int) -> None:
        """Counts what all ranks have written: some may still be writing this step, or have failed to."""
        found = [(int(name[1]), file) for file in self.path.parent.iterdir() if (name := STEP.fullmatch(file.name))]
        steps = sorted({one for one, _ in found if one <= step}, reverse=True)
        whole = (one for one in steps if checkpoint_file.is_complete(self._own(one)))
        oldest = min(islice(whole, self.keep), default=0)
        for one, file in found:
            if one < oldest and not (self.keep_every and one % self.keep_every == 0):
                file.unlink()

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _wait(self) -> None:
        """For the last write. Raises what it failed with."""
        self._join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if not self._exit_code:
            return
        self._wait()
        trainer.strategy.barrier("checkpoint")  # whoever launched the ranks may end all when one ends
        if trainer.is_global_zero:
            step = trainer.global_step
            saved = "" if self._written == step else ", which could not be saved"
            write_stderr(
                f"stopped by {stop_cause(self._exit_code)} after step {step}{saved}: resume={self.path} goes on from there"
            )
        raise SystemExit(self._exit_code)

    def _io(self, trainer: Trainer) -> AtomicCheckpointIO:
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, AtomicCheckpointIO):
            raise TypeError("Checkpoint needs the plugin AtomicCheckpointIO: give the trainer plugins=[…] with it")
        return io


def _also_as(file: Path, name: Path) -> None:
    """Makes `name` another name of the same file, or a copy where the file system has no links."""
    link = name.with_name(f".{name.name}.link.tmp")
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(file)
    except OSError:
        copyfile(file, link)
    link.replace(name)

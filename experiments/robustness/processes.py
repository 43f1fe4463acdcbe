"""Starts commands of ldm with their output in a file, and finds and kills their ranks (on Linux)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 1800.0  # seconds after which anything that is waited for counts as hanging, also on a busy machine


class Wrong(Exception):
    """Something did not behave as it must."""


class Command:
    """A running command, whose output is appended to a file."""

    def __init__(self, command: Sequence[str], log: Path, prefix: Sequence[str] = (), **environment: str) -> None:
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.log, self.began = log, log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, *command],
                cwd=ROOT,
                env=variables | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def output(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.began)
            return file.read().decode(errors="replace")

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        """Waits until the condition holds. Raises Wrong if the command ends before."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise Wrong(f"ended with exit code {self.process.returncode} before {what}:\n{self.output[-3000:]}")
            if time.monotonic() > end:
                self.kill()
                raise Wrong(f"not {what} within {seconds:.0f} s:\n{self.output[-3000:]}")
            time.sleep(0.05)

    def end(self, seconds: float = PATIENCE) -> int:
        """Returns the exit code, once the command and the processes that it started have ended."""
        family = [self.process.pid, *descendants(self.process.pid)]
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Wrong(f"did not end within {seconds:.0f} s:\n{self.output[-3000:]}") from None
        end = time.monotonic() + 60
        while left := [process for process in family if is_alive(process)]:
            if time.monotonic() > end:
                kill(left)
                raise Wrong(f"left the processes {left} running:\n{self.output[-3000:]}")
            time.sleep(0.05)
        return code

    def finish(self, seconds: float = PATIENCE) -> str:
        """Returns the output of the command once it has succeeded."""
        if code := self.end(seconds):
            raise Wrong(f"exit code {code}:\n{self.output[-3000:]}")
        return self.output

    def ranks(self) -> dict[int, int]:
        """Returns the process of each rank."""
        found = {}
        for process in descendants(self.process.pid):
            with suppress(OSError):
                variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                rank = next((int(each[5:]) for each in variables if each.startswith(b"RANK=")), None)
                if rank is not None and rank not in found:  # processes that a rank started come later
                    found[rank] = process
        return found

    def kill(self) -> None:
        """Kills the command and all processes that it started."""
        kill([self.process.pid, *descendants(self.process.pid)])


def torchrun(ranks: int, *script: str) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *script]


def kill(processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def descendants(process: int) -> list[int]:
    """Returns the processes that a process started, and those that they started, parents first."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

"""Shares between the ranks of a distributed run who they are, whether they live, and which one failed and why."""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.callbacks.checkpointing.interruption import CONTINUE
from ldm.errors import EXPECTED, worker_failure
from ldm.execution.offload import is_out_of_memory
from ldm.files import MACHINE


@dataclass(frozen=True)
class Member:
    """A rank's process. `system` identifies the kernel and the namespace in which its number `process` is valid."""

    rank: int
    ranks: int
    host: str
    process: int
    system: str

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks} (host {self.host}, process {self.process})"


@dataclass(frozen=True)
class Failure:
    """The sentence for the user on a failure, the rank that failed, and whether that rank lives and reports itself."""

    sentence: str
    rank: int
    reports: bool = False


class Ranks:
    """Communicates with all ranks of a run through their `store`, which waits until each has called this.

    `exit_code` returns how a child process of this one ended: its code, -N for signal N, or None while it lives.
    """

    def __init__(
        self, store: Any, rank: int, ranks: int, exit_code: Callable[[int], int | None] = lambda rank: None
    ) -> None:
        self.store, self.exit_code = store, exit_code
        self.own = Member(rank, ranks, platform.node(), os.getpid(), _system())
        store.set(f"member {rank}", json.dumps(asdict(self.own)))
        self.members = [Member(**json.loads(store.get(f"member {other}"))) for other in range(ranks)]
        self._beats: dict[int, tuple[bytes, float]] = {}  # the last beat of each rank, and when it was first seen
        self._count = 0

    def beat(self, batches: int) -> None:
        """Shows other ranks that this process lives, and how many batches it has started and finished."""
        self._count += 1
        self.store.set(f"beat {self.own.rank}", f"{self._count} {batches}")

    def leave(self) -> None:
        """Tells the other ranks that this process will end without a failure."""
        self.store.set(f"left {self.own.rank}", "")

    def batches(self) -> dict[int, int]:
        """Returns the batches that each rank has started and finished."""
        return {member.rank: int(beat.split()[1]) for member in self.members if (beat := self._beat(member))}

    def publish(self, failure: Failure) -> Failure:
        """Makes this failure known to all ranks unless there is an earlier one, and returns the earliest."""
        text = json.dumps(asdict(failure))
        return Failure(**json.loads(self.store.compare_set("failed", "", text)))

    def failure(self, silence: float) -> Failure | None:
        """Returns the failure that a rank has published, or that of a rank which died.

        A rank on another machine counts as dead if it does not beat for `silence` seconds.
        """
        if self.store.check(["failed"]):
            return Failure(**json.loads(self.store.get("failed")))
        for member in self.members:
            if member != self.own and self._is_dead(member, silence) and not self._is_known(member):
                here = member.system == self.own.system
                sentence = _death(member, self.exit_code(member.rank)) if here else _no_answer(member, silence)
                return self.publish(Failure(sentence, member.rank))
        return None

    def _is_known(self, member: Member) -> bool:
        """Returns whether the process left, or published a failure, before it ended."""
        return bool(self.store.check([f"left {member.rank}"]) or self.store.check(["failed"]))

    def _is_dead(self, member: Member, silence: float) -> bool:
        if member.system == self.own.system:
            return self._ended(member)
        beat = self._beat(member)
        if self._beats.get(member.rank, (None, 0.0))[0] != beat:
            self._beats[member.rank] = beat, time.monotonic()
        return time.monotonic() - self._beats[member.rank][1] > silence

    def _ended(self, member: Member) -> bool:
        """Returns whether a process of this system has ended."""
        return member.system == self.own.system and (
            self.exit_code(member.rank) is not None or not _exists(member.process)
        )

    def _beat(self, member: Member) -> bytes:
        key = f"beat {member.rank}"
        return bytes(self.store.get(key)) if self.store.check([key]) else b""

    def unreachable(self) -> Failure:
        """Returns the failure that explains why the store cannot be reached."""
        first = self.members[0]
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            host = os.environ.get("MASTER_ADDR")
            return Failure(
                f"torchrun on {host}, through which the ranks communicate, does not answer: it has ended, or that host "
                f"or the network to it is down; to continue, {CONTINUE}",
                -1,
            )
        return Failure(_death(first, None), 0)

    def acknowledge(self, seconds: float) -> None:
        """Waits until the other living ranks know of the failure, because the store may end with this process."""
        self.store.set(f"knows {self.own.rank}", "")
        end = time.monotonic() + seconds
        others = [member for member in self.members if member != self.own]
        while others and time.monotonic() < end:
            others = [
                member
                for member in others
                if not self._ended(member) and not self.store.check([f"knows {member.rank}"])
            ]
            time.sleep(0.05)

    def wait_for(self, rank: int, seconds: float) -> None:
        """Waits until the rank's process has ended, if it is one of this system."""
        end, member = time.monotonic() + seconds, self.members[rank]
        while member.system == self.own.system and not self._ended(member) and time.monotonic() < end:
            time.sleep(0.05)

    def reports(self, failure: Failure) -> bool:
        """Returns whether this rank prints the failure: the failed one if it lives, else one rank of each host."""
        failed = self.members[failure.rank] if failure.rank >= 0 else None
        if failed and failure.reports and failed.host == self.own.host:
            return self.own == failed
        here = [member.rank for member in self.members if member.host == self.own.host and member != failed]
        return self.own.rank == min(here, default=-1)


def own_failure(member: Member, error: Exception) -> Failure:
    """Returns the failure of a rank whose training raised an error."""
    text = " ".join(str(error).split())
    if reason := worker_failure(error):
        what, remedy = f"failed: {reason}", f"to continue, {CONTINUE}"
    elif is_out_of_memory(error):
        what = f"ran out of memory ({text[:200]})"
        remedy = f"lower data.batch_size, and {CONTINUE}; data.global_batch keeps the result the same"
    elif isinstance(error, EXPECTED) and text:
        what, remedy = f"failed: {text}", "" if "resume=auto" in text else f"to continue, {CONTINUE}"
    else:
        what, remedy = f"failed with {type(error).__name__}: {text}", f"fix the cause, and {CONTINUE}"
    return Failure("; ".join(filter(None, [f"{member} {what}", remedy])), member.rank, reports=True)


def _death(member: Member, code: int | None) -> str:
    how = f"was killed by signal {-code}" if code and code < 0 else "died without a message, as after kill -9"
    if code and code > 0:
        how = f"ended with exit code {code}"
    return (
        f"{member} {how}: if nobody stopped it, look for a lack of memory or a crash in the host's kernel log (dmesg); "
        f"to continue, {CONTINUE}"
    )


def _no_answer(member: Member, seconds: float) -> str:
    return (
        f"{member} has not answered for {seconds:g} s: its process or its host has died, or the network to it is down; "
        f"look at that host's kernel log (dmesg) and at the network; to continue, {CONTINUE}"
    )


def is_consequence(error: BaseException) -> bool:
    """Returns whether communication between ranks failed, which another rank's end causes."""
    text = str(error).lower()
    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "process group", "socket")
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def _system() -> str:
    try:
        return f"{MACHINE} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{MACHINE} {platform.node()}"


def _exists(process: int) -> bool:
    """Returns whether a process of this system runs; one that ended and was not waited for does not."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (OSError, IndexError):  # another user's process, or no /proc
        return True
    return state not in "ZX"

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm import errors

ROOT = Path(errors.__file__).parents[1]


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "output"),
    [
        (ValueError("size is 3,\n but must be 4"), 1, "error: size is 3, but must be 4\n"),
        (errors.UsageError("n= is given twice"), 2, "error: n= is given twice\n"),
        (PermissionError(13, "Permission denied", "x.png"), 1, "error: x.png: Permission denied\n"),
        (KeyError("a"), 1, "error: KeyError: 'a' (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_printed_on_one_line_and_sets_the_exit_code(
    error: BaseException, code: int, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors.run(lambda: fail(error)) == code
    assert capsys.readouterr().err == output


def test_debug_prints_the_traceback_before_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run(lambda: fail(ValueError("wrong")), debug=True) == 1
    output = capsys.readouterr().err
    assert output.startswith("Traceback") and output.endswith("\nerror: wrong\n")


def test_successful_work_exits_with_0() -> None:
    assert errors.run(lambda: None) == 0


PROGRAMS = [
    ["-m", "ldm", "--help"],
    ["train.py", "--help"],
    pytest.param(["train.py", "debug=plan"], marks=pytest.mark.slow),
    pytest.param(["train.py", "--cfg", "job"], marks=pytest.mark.slow),
    pytest.param(["sample.py", "--help"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("command", PROGRAMS, ids=str)
def test_a_closed_pipe_ends_a_program_quietly_as_sigpipe_would(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_pipe_that_stays_open_gets_all_of_the_output() -> None:
    done = subprocess.run([sys.executable, "-m", "ldm", "--help"], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().endswith("describes a command and its options.\n")


class Broken(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Calls a function in a worker."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> object:
        return self.action()


DIED = r"a worker of the data loader \(process \d+\) died or was killed, as when memory runs out"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: fail(ValueError("the folder is gone")), "the folder is gone$"),
        (lambda: {}["x"], "KeyError: 'x'$"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), DIED),
        (lambda: os._exit(3), DIED),
    ],
)
def test_the_failure_of_a_worker_is_one_sentence(action: Callable[[], object], message: str) -> None:
    loader = torch.utils.data.DataLoader(Broken(action), num_workers=1, multiprocessing_context="fork")
    with pytest.raises((RuntimeError, ValueError, KeyError)) as caught:
        next(iter(loader))
    assert re.match(message, errors.sentence(caught.value)), errors.sentence(caught.value)

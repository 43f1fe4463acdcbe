"""img2dataset as a process of its own: its environment, its run, and its statistics."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.files import write_json, write_text

# Its fetch is replaced by img2dataset_driver.py, so the version is one that this was tried with.
REQUIREMENT = "img2dataset==1.47.0"
TOO_NEW = (3, 13)  # img2dataset needs the module imghdr, which Python 3.13 dropped
READY = "ldm.ready"  # in the environment, once all of it is there
DRIVER = Path(__file__).with_name("img2dataset_driver.py")


def environment(folder: Path, python: str, tell: Callable[[str], None]) -> Path:
    """The Python of the environment in `folder`, which is made if it is not there or was not finished.

    ValueError for a folder that is something else; OSError, with pip's last line, if it cannot be made.
    """
    interpreter = folder / "bin" / "python"
    if (folder / READY).is_file() and (folder / READY).read_text() == REQUIREMENT:
        return interpreter
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise ValueError(f"--env {folder} is a folder with something else in it: give an empty or a new one")
    tell(f"{REQUIREMENT} needs an environment of its own: making it in {folder} with pip, about 600 MB, once")
    _made([python, "-m", "venv", "--clear", str(folder)], folder)
    _made([str(interpreter), "-m", "pip", "install", "--quiet", REQUIREMENT], folder)
    write_text(folder / READY, REQUIREMENT)
    return interpreter


def _made(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise OSError(f"{command[0]} cannot be run: {error.strerror}; give another with --python") from error
    if done.returncode:
        told = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["no reason given"]
        raise OSError(f"the environment {folder} could not be made: {told[-1].strip()}; run again once that is mended")


def check_python(python: str) -> None:
    """ValueError where this Python cannot run img2dataset."""
    if python == sys.executable and sys.version_info[:2] >= TOO_NEW:
        raise ValueError(
            f"{REQUIREMENT} does not run on Python {sys.version.split()[0]}: give an older one, "
            f"--python python3.{TOO_NEW[1] - 1}"
        )


@dataclass
class Fetched:
    """Statistics of the finished shards. `reasons` counts what became of the pictures that failed, in the server's
    and the decoder's words."""

    shards: set[str] = field(default_factory=set)
    count: int = 0
    successes: int = 0
    failed_to_download: int = 0
    failed_to_resize: int = 0
    seconds_of_work: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    def update(self, folder: Path) -> int:
        """Take in the shards that finished since; returns how many pictures were tried in them."""
        before = self.count
        for path in sorted(folder.glob("*_stats.json")):
            if path.name not in self.shards and (told := _statistics(path)) is not None:
                self.shards.add(path.name)
                self.count += told["count"]
                self.successes += told["successes"]
                self.failed_to_download += told["failed_to_download"]
                self.failed_to_resize += told["failed_to_resize"]
                self.seconds_of_work += told["duration"]
                self.reasons.update({" ".join(k.split()): n for k, n in told["status_dict"].items() if k != "success"})
        return self.count - before


def _statistics(path: Path) -> dict[str, Any] | None:
    """None for a file that img2dataset is in the middle of writing, or was stopped in; such a shard is done again."""
    try:
        return dict(json.loads(path.read_text()))
    except ValueError:
        return None


def drop_unfinished(folder: Path) -> None:
    """Statistics that were cut off would pass for a finished shard."""
    for path in folder.glob("*_stats.json"):
        if _statistics(path) is None:
            path.unlink()


def download(python: Path, settings: dict[str, Any], log: Path, max_pixels: int, tick: Callable[[], None]) -> int:
    """Run it to the end, calling `tick` every two seconds; returns its exit code. What it prints goes to `log`.

    Whatever ends this process ends the download too: it lives as long as the pipe to its standard input.
    """
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    surroundings = os.environ | quiet | {"OPENCV_IO_MAX_IMAGE_PIXELS": str(max_pixels)}
    with tempfile.TemporaryDirectory(prefix="ldm.") as folder, open(log, "ab") as output:
        file = Path(folder) / "settings.json"
        write_json(file, settings)
        command = [str(python), "-I", str(DRIVER), str(file)]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=surroundings, start_new_session=True
        )
        assert child.stdin is not None
        try:
            while child.returncode is None:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=2)
                tick()
        finally:
            child.stdin.close()
            child.wait()
        return child.returncode

"""Runs img2dataset as a separate process in its own environment and reads its statistics."""

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

from ldm.files import temporary_folder, write_json, write_text

# img2dataset_driver.py replaces its download function, so the version is pinned to one that was tested.
REQUIREMENT = "img2dataset==1.47.0"
UNSUPPORTED_PYTHON = (3, 13)  # img2dataset needs the module imghdr, which Python 3.13 removed
# Distributors of img2dataset, and the packages that those for a cluster need.
DISTRIBUTORS = {"multiprocessing": None, "ray": "ray>=2.9,<3", "pyspark": "pyspark>=3.4,<5"}
READY = "ldm.ready"  # marks a completely installed environment
DRIVER = Path(__file__).with_name("img2dataset_driver.py")


def ensure_environment(folder: Path, python: str, notify: Callable[[str], None]) -> Path:
    """Returns the Python of the environment in `folder`, which is created if it is missing or incomplete.

    Raises ValueError if the folder has other content, and OSError with the last line of pip if creating it fails.
    """
    interpreter = folder / "bin" / "python"
    if (folder / READY).is_file() and (folder / READY).read_text() == REQUIREMENT:
        return interpreter
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise ValueError(f"--env {folder} is a folder with other content: give an empty or a new one")
    notify(f"{REQUIREMENT} needs its own environment: creating it in {folder} with pip (about 600 MB, only once)")
    _run([python, "-m", "venv", "--clear", str(folder)], folder)
    _run([str(interpreter), "-m", "pip", "install", "--quiet", REQUIREMENT], folder)
    write_text(folder / READY, REQUIREMENT)
    return interpreter


def add_distributor(interpreter: Path, distributor: str, notify: Callable[[str], None]) -> None:
    """Installs the package of a distributor into the environment unless it is already installed.

    Raises OSError with the last line of pip if that fails.
    """
    requirement = DISTRIBUTORS[distributor]
    if requirement is None:
        return
    found = subprocess.run([str(interpreter), "-I", "-c", f"import {distributor}"], capture_output=True, check=False)
    if found.returncode:
        folder = interpreter.parents[1]
        notify(f"--distributor {distributor} needs {requirement}: installing it into {folder} with pip")
        _run([str(interpreter), "-m", "pip", "install", "--quiet", requirement], folder)


def _run(command: list[str], folder: Path) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise OSError(f"{command[0]} cannot be run: {error.strerror}; give another with --python") from error
    if result.returncode:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()] or ["no reason given"]
        raise OSError(
            f"cannot create the environment {folder}: {lines[-1].strip()}; fix this and run the command again"
        )


def check_python(python: str) -> None:
    """Raises ValueError if `python` is this interpreter and its version cannot run img2dataset."""
    if python == sys.executable and sys.version_info[:2] >= UNSUPPORTED_PYTHON:
        raise ValueError(
            f"{REQUIREMENT} does not run on Python {sys.version.split()[0]}: give an older one, "
            f"--python python3.{UNSUPPORTED_PYTHON[1] - 1}"
        )


@dataclass
class DownloadStatistics:
    """Statistics of the finished shards; `reasons` counts failed images by the error of the server or the decoder."""

    shards: set[str] = field(default_factory=set)
    count: int = 0
    successes: int = 0
    failed_to_download: int = 0
    failed_to_resize: int = 0
    seconds_of_work: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    def update(self, folder: Path) -> int:
        """Adds the shards finished since the last call and returns the number of images attempted in them."""
        before = self.count
        for path in sorted(folder.glob("*_stats.json")):
            if path.name not in self.shards and (added := _statistics(path)) is not None:
                self.shards.add(path.name)
                self.count += added["count"]
                self.successes += added["successes"]
                self.failed_to_download += added["failed_to_download"]
                self.failed_to_resize += added["failed_to_resize"]
                self.seconds_of_work += added["duration"]
                self.reasons.update({" ".join(k.split()): n for k, n in added["status_dict"].items() if k != "success"})
        return self.count - before


def _statistics(path: Path) -> dict[str, Any] | None:
    """Returns None for an incompletely written file; img2dataset downloads its shard again."""
    try:
        return dict(json.loads(path.read_text()))
    except ValueError:
        return None


def drop_unfinished(folder: Path) -> None:
    """Removes incomplete statistics, which img2dataset would take for those of a finished shard."""
    for path in folder.glob("*_stats.json"):
        if _statistics(path) is None:
            path.unlink()


def download(python: Path, settings: dict[str, Any], log: Path, max_pixels: int, tick: Callable[[], None]) -> int:
    """Runs img2dataset, calls `tick` every two seconds, and returns the exit code. Its output is appended to `log`.

    The download never outlives this process, because it stops when the pipe to its standard input closes.
    """
    variables = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    variables["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(max_pixels)
    with temporary_folder(Path(tempfile.gettempdir(), "ldm")) as folder, open(log, "ab") as output:
        file = folder / "settings.json"
        write_json(file, settings | {"download": _without_patterns(settings["download"], folder)})
        command = [str(python), "-I", str(DRIVER), str(file)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=os.environ | variables,
            start_new_session=True,
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


def _without_patterns(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the arguments with links in `folder` in place of paths that img2dataset would take for patterns.

    It lists both folders with a glob, and would download every shard again if it did not find the finished ones.
    """
    folders = {"output_folder": Path(arguments["output_folder"])}
    if (source := Path(arguments["url_list"])).is_dir():
        folders["url_list"] = source
    links = {}
    for name, path in folders.items():
        if any(c in str(path) for c in "*?["):
            if arguments["distributor"] != "multiprocessing":
                raise ValueError(f"{path} has one of the characters *?[ in its name: rename it for a cluster")
            path.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path)
            links[name] = str(folder / name)
    return arguments | links

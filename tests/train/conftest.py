import sys
from pathlib import Path
from typing import Any

import pytest

import train
from tests import runs
from tests.runs import ALONE, TINY


@pytest.fixture
def here(tmp_path: Path) -> Any:
    """Returns a function that trains in this process."""
    return lambda *arguments: runs.run(tmp_path, *TINY, *ALONE, "trainer.max_steps=1", *arguments)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that runs a sweep in this process, and returns its exit code and the run folders."""
    monkeypatch.setattr("ldm.commands.train.run.quiet_logging", lambda: None)
    own = (
        "-m",
        "--config-path",
        str(train.CONF),
        *TINY,
        "metrics=none",
        "logger=none",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )

    def run(*arguments: str) -> tuple[int, list[Path]]:
        monkeypatch.setattr(sys, "argv", ["train.py", *own, *arguments])
        code = 0
        try:
            train.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, sorted(path.parent for path in tmp_path.glob("sweep/*/config.yaml"))

    return run

"""Functions shared by the tests of sample.py."""

from pathlib import Path

import pytest

from ldm.commands.sample import command as sample


def error(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    assert sample.main(list(argv)) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and not any(line.startswith("error") for line in lines[:-1])
    return lines[-1]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}

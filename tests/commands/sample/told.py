"""What the tests of sample.py share."""

from pathlib import Path

import pytest

from ldm.commands.sample import command as sample


def error(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    assert sample.main(list(argv)) == code
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: ") and not any(line.startswith("error") for line in told[:-1])
    return told[-1]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}

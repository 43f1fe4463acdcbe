"""The documentation quotes messages that exist, and marks its commands in a form that `.ci/docs` understands."""

import re
from pathlib import Path

import pytest

from docs.run_commands import NOTE, blocks, shortened

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUOTED = re.compile(r"^\| `([^`]+)`", re.MULTILINE)


def source() -> str:
    """Returns the code of ldm with adjacent string literals joined, as messages are printed."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "ldm").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_quoted_error_messages_are_in_the_code() -> None:
    quoted = QUOTED.findall((ROOT / "docs" / "errors.md").read_text())
    code = source()
    missing = [part for text in quoted for part in re.split(r"\s*…\s*", text) if part not in code]
    assert len(quoted) > 15 and not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_note_on_commands_is_understood_and_follows_a_block(page: Path) -> None:
    notes = page.read_text().count("<!-- docs:")
    read = sum(len(block.before) + bool(block.arguments) + bool(block.reason) for block in blocks(page))
    assert notes == len(NOTE.findall(page.read_text())) == read


def test_arguments_are_appended_to_training_and_sampling_only() -> None:
    assert shortened("python train.py lr=cosine  # the default", ["a=1"]) == "python train.py lr=cosine a=1"
    assert shortened("PYTHONPATH=. python sample.py x", ["a=1"]) == "PYTHONPATH=. python sample.py x a=1"
    assert shortened("ldm info runs/mine", ["a=1"]) == "ldm info runs/mine"

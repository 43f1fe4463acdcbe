"""Runs the shell commands of the README and of these pages: python docs/run_commands.py [PAGE …], in a fresh clone.

Each block of shell commands is run as written, in the order of the page. A comment after a block changes this:

    <!-- docs: before COMMAND -->            runs COMMAND first, such as one that makes example data
    <!-- docs: with ARGUMENTS -->            appends ARGUMENTS to each train.py and sample.py, so that it takes seconds
    <!-- docs: not run, because REASON -->   skips the block
"""

import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```sh\n(.*?)^```\n((?:\n?<!-- docs: .*? -->\n?)*)", re.MULTILINE | re.DOTALL)
NOTE = re.compile(r"<!-- docs: (before|with|not run, because) (.*?) -->")
SHORTENED = re.compile(r"(?:.* && |\S+=\S+ )?(?:python|torchrun \S+ \S+) (?:train|sample)\.py")
LIMIT = 300  # seconds per command


@dataclass
class Block:
    """Commands of a page, with commands to run before them, arguments to append, and a reason for not running them."""

    commands: list[str]
    before: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    reason: str = ""


def blocks(page: Path) -> list[Block]:
    found = []
    for code, notes in BLOCK.findall(page.read_text()):
        lines = [line.strip() for line in code.replace("\\\n", " ").splitlines()]
        block = Block([line for line in lines if line and not line.startswith("#")])
        for kind, text in NOTE.findall(notes):
            if kind == "before":
                block.before.append(text)
            elif kind == "with":
                block.arguments.append(text)
            else:
                block.reason = text
        found.append(block)
    return found


def shortened(command: str, arguments: list[str]) -> str:
    """Returns the command without its comment, and with arguments if it trains or samples."""
    command = re.sub(r"\s+#.*$", "", command)
    return " ".join([command, *arguments]) if SHORTENED.match(command) else command


def run(command: str) -> str | None:
    """Runs a command, and returns the end of its output if it failed."""
    print(f"  {command} …", end="", flush=True)
    began = time.monotonic()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(["bash", "-ec", command], text=True, check=False, timeout=LIMIT, **streams)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        return f"did not end within {LIMIT} s"
    print(f" {time.monotonic() - began:.0f} s", flush=True)
    return f"ended with exit code {done.returncode}:\n{done.stdout[-3000:]}" if done.returncode else None


def main() -> None:
    listed = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/data").glob("*.md"))]
    failed, count, skipped = [], 0, 0
    for page in [Path(name).resolve() for name in sys.argv[1:]] or listed:
        print(page.relative_to(ROOT), flush=True)
        for block in blocks(page):
            if block.reason:
                skipped += len(block.commands)
                continue
            for command in [*block.before, *(shortened(each, block.arguments) for each in block.commands)]:
                count += 1
                if error := run(command):
                    failed.append(f"{page.relative_to(ROOT)}: {command}\n{error}")
    print(f"{count} commands run, {skipped} not run for the reason beside them, {len(failed)} failed")
    if failed:
        sys.exit("\n\n".join(failed))


if __name__ == "__main__":
    main()

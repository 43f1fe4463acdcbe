"""Parses the command line of sample.py: prompts and key=value, by hand, so that no prompt needs escaping."""

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ldm.drawing.added_files import KEYS as REPEATED
from ldm.drawing.keys import KEYS
from ldm.errors import UsageError


@dataclass
class Arguments:
    """A parsed command line. `given` maps the keys on it to their parsed values."""

    prompts: list[str] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    help: bool = False
    debug: bool = False


ALIASES = {  # names of the keys in other programs
    "image": "init",
    "mask_image": "mask",
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "cfg": "guidance",
    "scheduler": "sampler",
    "num_images": "n",
    "output": "out",
}
INSTEAD = {  # names that are not keys → what to write
    "prompt": "the prompt alone, without prompt=",
    "width": "size=HEIGHTxWIDTH, such as size=512x768",
    "height": "size=HEIGHTxWIDTH, such as size=512x768",
}
HELP = """\
usage: python sample.py "PROMPT" ["PROMPT" …] [key=value …] [-- PROMPT …]

Samples images for each prompt. An argument that is not key=value with a key below is a prompt, whatever it
contains; after -- all arguments are prompts. The paths of the images are printed to standard output.

  python sample.py "a red circle above a blue star on a white background"
  python sample.py "a cat" "a dog" n=4 seed=7 steps=30 guidance=3 out=pets
  python sample.py "a cat" init=dog.jpg mask=head.png
  python sample.py from=pets/0003.png               reproduces that image, bit for bit on the same CPU
  python sample.py from=pets/0003.png guidance=5    same noise, different guidance scale
  python sample.py prompts_file=pets.csv out=pets   resumes if it was stopped
  torchrun --nproc-per-node 8 sample.py prompts_file=pets.csv out=pets    uses eight GPUs

keys (default):
{keys}

  --debug        show the traceback of an error
  --help         show this help

The metadata of each PNG holds all settings needed to reproduce it. The prompt and seed determine an image,
independent of the other images in its batch (up to 1/255 with precision=32; bf16 and 16 round more on a GPU).
Exit codes: 0 success, 1 failure, 2 wrong arguments, 130 stopped by Ctrl-C."""


def help_text() -> str:
    return HELP.format(keys="\n".join(f"  {name + '=':<18} {key.help}" for name, key in KEYS.items()))


def parse(argv: list[str]) -> Arguments:
    """Raises UsageError for keys that are misspelt, given twice or have an invalid value."""
    arguments = Arguments()
    for text in argv:
        check_unicode(text)
    for position, text in enumerate(argv):
        name, equals, value = text.partition("=")
        if text == "--":
            arguments.prompts += argv[position + 1 :]
            break
        if text in ("--help", "-h"):
            arguments.help = True
        elif text == "--debug":
            arguments.debug = True
        elif equals and name in KEYS:
            if name in REPEATED:
                arguments.given.setdefault(name, []).append(_parse_value(name, value))
                continue
            if name in arguments.given:
                raise UsageError(f"{name}= is given twice; remove one")
            arguments.given[name] = _parse_value(name, value)
        else:
            _check_spelling(name, equals, text)
            arguments.prompts.append(text)
    return arguments


def check_unicode(text: str) -> None:
    """Raises UsageError for bytes that are not UTF-8, which Python represents as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise UsageError(f"the argument {shown!r} is not UTF-8 text: write it in a UTF-8 terminal") from error


def _parse_value(name: str, value: str) -> Any:
    try:
        return KEYS[name].parse(value)
    except ValueError as error:
        raise UsageError(f"{name}={value} was given, but {name} must be {error}") from error


def _check_spelling(name: str, equals: str, text: str) -> None:
    """Raises UsageError for a word before `=`, or an option with dashes, that resembles a key or an alias of one."""
    word = name.lstrip("-").lower().replace("-", "_")
    if not (equals or text.startswith("--")) or not re.fullmatch(r"[^\W\d]\w*", word):
        return
    if equals and word in INSTEAD:
        raise UsageError(f"{text!r} is not a setting: write {INSTEAD[word]}; or put it after -- if it is a prompt")
    known = [*KEYS, *ALIASES, *(() if equals else ("help", "debug"))]
    if close := get_close_matches(word, known, n=1, cutoff=0.75):
        key = ALIASES.get(close[0], close[0])
        suggestion = f"{key}={text[len(name) + 1 :]}" if key in KEYS else f"--{key}"
        raise UsageError(f"{text!r} looks like {suggestion}; write that, or put it after -- if it is a prompt")

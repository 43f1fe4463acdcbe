"""Parses the command line of sample.py: prompts and key=value, by hand, so that no prompt needs escaping."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ldm.drawing.keys import ADDED, KEYS, Key, integer
from ldm.errors import UsageError
from ldm.synonyms.sampling import translate
from ldm.synonyms.table import COMMAND, SAMPLING, Instead


@dataclass
class Arguments:
    """A parsed command line. `given` maps the keys on it to their parsed values.

    `notes` say which arguments were taken for others, and `listed` are the keys whose values are asked for by `=?`.
    """

    prompts: list[str] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)
    help: bool = False
    debug: bool = False


SYNONYMS = SAMPLING | COMMAND
SIDES = {side: Key(integer(1), "in pixels") for side in ("height", "width")}
TEXT = Key(str, "any text")
HELP = """\
usage: python sample.py "PROMPT" ["PROMPT" …] [key=value …] [-- PROMPT …]

Samples images for each prompt. An argument that is not key=value with a key below, nor an option such as --steps,
is a prompt, whatever it contains; after -- all arguments are prompts. Prints the paths of the images.

  python sample.py "a red circle above a blue star on a white background"
  python sample.py "a cat" "a dog" n=4 seed=7 steps=30 guidance=3 out=pets
  python sample.py "a cat" init=dog.jpg mask=head.png
  python sample.py from=pets/0003.png               reproduces that image, bit for bit on the same CPU
  python sample.py from=pets/0003.png guidance=5    same noise, different guidance scale
  python sample.py prompts_file=pets.csv out=pets   resumes if it was stopped
  torchrun --nproc-per-node 8 sample.py prompts_file=pets.csv out=pets    uses eight GPUs

keys (default):
{keys}

KEY=? describes a key, and lists its values. Names of diffusers and of AUTOMATIC1111's web UI are taken for these keys,
with a note, such as num_inference_steps=30, --guidance_scale 7.5 or sampler="DPM++ 2M Karras".

  --debug        show the traceback of an error
  --help         show this help

The metadata of each PNG holds all settings needed to reproduce it. The prompt and seed determine an image,
independent of the other images in its batch (up to 1/255 with precision=32; bf16 and 16 round more on a GPU).
Exit codes: 0 success, 1 failure, 2 wrong arguments, 130 stopped by Ctrl-C."""


def help_text() -> str:
    return HELP.format(keys="\n".join(f"  {name + '=':<18} {key.help}" for name, key in KEYS.items()))


def asks_for_help(argv: list[str]) -> bool:
    try:
        return parse(argv).help
    except UsageError:
        return False


def parse(argv: list[str]) -> Arguments:
    """Raises UsageError for keys that are misspelt, given twice or have an invalid value."""
    arguments = Arguments()
    for text in argv:
        check_unicode(text)
    words = iter(argv)
    for text in words:
        name, equals, value = text.partition("=")
        if text == "--":
            arguments.prompts += words
            break
        if text in ("--help", "-h"):
            arguments.help = True
        elif text == "--debug":
            arguments.debug = True
        elif (key := _named(name, equals)) is not None:
            if name.startswith("--"):
                value = value if equals or isinstance(SYNONYMS.get(key), Instead) else _following(name, words)
                if key in KEYS:
                    arguments.notes.append(f"{text if equals else f'{text} {value}'} is taken as {key}={value}")
            _add(arguments, key, value)
        else:
            _check_spelling(name, equals, text)
            arguments.prompts.append(text)
    try:
        arguments.given, notes = translate(arguments.given, SYNONYMS)
    except ValueError as error:
        raise UsageError(str(error)) from error
    arguments.notes += notes
    if "prompt" in arguments.given:
        arguments.prompts.insert(0, arguments.given.pop("prompt"))
    return arguments


def _named(name: str, equals: str) -> str | None:
    """Returns the key or synonym that is given as name=value or, with dashes, as --name; None for a prompt."""
    if name.startswith("--"):
        name = name.removeprefix("--").replace("-", "_")
    elif not equals:
        return None
    return name if name in KEYS or name in SYNONYMS else None


def _following(name: str, words: Iterator[str]) -> str:
    """Returns the argument after an option with dashes, its value."""
    if (value := next(words, None)) is None:
        raise UsageError(f"{name} has no value: write {name.lstrip('-').replace('-', '_')}=VALUE")
    return value


def _add(arguments: Arguments, name: str, value: str) -> None:
    if value == "?" and (key := _key(name)).parse is not str:
        arguments.listed += [own for own, known in KEYS.items() if known is key]
    elif name in ADDED:
        arguments.given.setdefault(name, []).append(_parse_value(name, value))
    elif name in arguments.given:
        raise UsageError(f"{name}= is given twice; remove one")
    else:
        arguments.given[name] = _parse_value(name, value)


def check_unicode(text: str) -> None:
    """Raises UsageError for bytes that are not UTF-8, which Python represents as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise UsageError(f"the argument {shown!r} is not UTF-8 text: write it in a UTF-8 terminal") from error


def _parse_value(name: str, value: str) -> Any:
    try:
        return _key(name).parse(value)
    except ValueError as error:
        raise UsageError(f"{name}={value} was given, but {name} must be {error}") from error


def _key(name: str) -> Key:
    """Returns the key that a name stands for."""
    if (found := SYNONYMS.get(name)) is None:
        return KEYS[name]
    return (KEYS | SIDES).get("" if isinstance(found, Instead) else found.ours, TEXT)


def _check_spelling(name: str, equals: str, text: str) -> None:
    """Raises UsageError for a word before `=` that resembles a key or a synonym of one, and for an unknown option."""
    word = name.lstrip("-").lower().replace("-", "_")
    if not (equals or text.startswith("--")) or not re.fullmatch(r"[^\W\d]\w*", word):
        return
    known = [*KEYS, *SYNONYMS, *(() if equals else ("help", "debug"))]
    if close := get_close_matches(word, known, n=1, cutoff=0.75):
        found = SYNONYMS.get(close[0])
        key = close[0] if found is None or isinstance(found, Instead) else found.ours
        suggestion = f"--{key}" if key in ("help", "debug") else f"{key}={text[len(name) + 1 :]}"
        raise UsageError(f"{text!r} looks like {suggestion}; write that, or put it after -- if it is a prompt")
    if text.startswith("--"):
        raise UsageError(
            f"there is no option {name}: python sample.py --help lists all, or put it after -- if it is a prompt"
        )

"""sample.py's command line: prompts and key=value, read by hand so that no prompt needs quoting."""

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ldm.drawing.added_files import KEYS as REPEATED
from ldm.drawing.keys import KEYS
from ldm.errors import UsageError


@dataclass
class Arguments:
    """`given` holds the keys that were written, with their values read."""

    prompts: list[str] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    help: bool = False
    debug: bool = False


ELSEWHERE = {  # what other programs call them
    "image": "init",
    "mask_image": "mask",
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "cfg": "guidance",
    "scheduler": "sampler",
    "height": "size",
    "width": "size",
    "num_images": "n",
    "output": "out",
}
HELP = """\
usage: python sample.py "PROMPT" ["PROMPT" …] [key=value …] [-- PROMPT …]

Draws each prompt. An argument that is not key=value with a key below is a prompt, whatever it contains;
after -- all are prompts. The paths of the pictures go to the standard output.

  python sample.py "a red circle above a blue star on a white background"
  python sample.py "a cat" "a dog" n=4 seed=7 steps=30 guidance=3 out=pets
  python sample.py "a cat" init=dog.jpg mask=head.png
  python sample.py from=pets/0003.png               draws that picture again, bit for bit on the same machine
  python sample.py from=pets/0003.png guidance=5    the same noise, more guidance
  python sample.py prompts_file=pets.csv out=pets   goes on where it was stopped
  torchrun --nproc-per-node 8 sample.py prompts_file=pets.csv out=pets    on eight GPUs

keys (default):
{keys}

  --debug        show the traceback of an error
  --help         show this

Each PNG holds in its metadata all that is needed to draw it again. A prompt and its seed decide a picture,
whatever else is drawn beside it (with precision=32 to 1/255; on a GPU bf16 and 16 round more).
Exit codes: 0 done, 1 the work failed, 2 wrong arguments, 130 stopped by Ctrl-C."""


def help_text() -> str:
    return HELP.format(keys="\n".join(f"  {name + '=':<18} {key.help}" for name, key in KEYS.items()))


def parse(argv: list[str]) -> Arguments:
    """Raises UsageError, in one sentence, for keys that are misspelt, written twice or hold no such value."""
    arguments = Arguments()
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
                arguments.given.setdefault(name, []).append(_value(name, value))
                continue
            if name in arguments.given:
                raise UsageError(f"{name}= is given twice; leave one out")
            arguments.given[name] = _value(name, value)
        else:
            _refuse_misspelt(name, equals, text)
            arguments.prompts.append(text)
    return arguments


def _value(name: str, value: str) -> Any:
    try:
        return KEYS[name].read(value)
    except ValueError as error:
        raise UsageError(f"{name}={value} was given, but {name} must be {error}") from error


def _refuse_misspelt(name: str, equals: str, text: str) -> None:
    """A single word before `=`, or an option with dashes, that is nearly a key or another program's name for one."""
    word = name.lstrip("-").lower().replace("-", "_")
    if not (equals or text.startswith("--")) or not re.fullmatch(r"[^\W\d]\w*", word):
        return
    known = [*KEYS, *ELSEWHERE, *(() if equals else ("help", "debug"))]
    if close := get_close_matches(word, known, n=1, cutoff=0.75):
        key = ELSEWHERE.get(close[0], close[0])
        meant = f"{key}={text[len(name) + 1 :]}" if key in KEYS else f"--{key}"
        raise UsageError(f"{text!r} looks like {meant}; write that, or put it after -- if it is a prompt")

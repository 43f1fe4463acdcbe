"""Lists the values that a key of sample.py can have, for `KEY=?`."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ldm.drawing.keys import KEYS
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.options import options_of
from ldm.sampling.spacing import SPACINGS
from ldm.sampling.thresholding import THRESHOLDINGS

FUNCTIONS: dict[str, Mapping[str, Callable[..., Any]]] = {
    "sampler": SAMPLERS,
    "spacing": SPACINGS,
    "thresholding": THRESHOLDINGS,
}


def listing(key: str) -> Iterator[str]:
    """Yields a line for each value that is a function, with its options; for other keys, their help."""
    functions = FUNCTIONS.get(key, {})
    yield f"{key}: {KEYS[key].help.replace(f'; {key}=? lists all', '')}"
    width = max(map(len, functions), default=0)
    for name, function in functions.items():
        options = " ".join(f"{option}={_text(value)}" for option, value in options_of(function).items())
        line = f"  {name:<{width}}  {_first_sentence(function)}"
        yield f"{line} [{key}_options: {options}]" if options else line.rstrip()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _first_sentence(function: Callable[..., Any]) -> str:
    text = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    return re.split(r"(?<!\bal)\.(?= [A-Z]|$)", text)[0]

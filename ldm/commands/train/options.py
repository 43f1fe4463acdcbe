"""Lists the options of a config group with a line each, for GROUP=?."""

import re
from collections.abc import Iterator
from pathlib import Path

from hydra._internal.utils import get_args
from hydra.core.override_parser.overrides_parser import OverridesParser

from ldm.commands.train.config_sources import config_sources

ASKED = "=?"


def list_options(arguments: list[str], conf: Path) -> Iterator[str]:
    """Yields the options of each group that the arguments ask for, from all folders that they add.

    Raises ValueError for what is not a group.
    """
    asked = [word.removesuffix(ASKED) for word in arguments if word.endswith(ASKED)]
    given = get_args([word for word in arguments if not word.endswith(ASKED)])
    overrides = OverridesParser.create().parse_overrides(given.overrides)
    with config_sources(given, overrides, conf) as sources:
        for group in asked:
            if not (options := sources.options(group)):
                raise ValueError(f"{group} is not a group of options: the groups are {', '.join(sources.groups)}")
            width = max(map(len, options))
            yield f"{group}:"
            for option in options:
                yield f"  {option:<{width}}  {first_sentence(sources.comment(group, option))}".rstrip()


def first_sentence(comment: str) -> str:
    """Returns the first sentence of the comment at the top of a config file, without its heading `@package`."""
    lines = [line.lstrip("# ").rstrip() for line in comment.splitlines()]
    text = " ".join(line for line in lines if not line.startswith("@package"))
    return re.split(r"(?<!\bal)[.:](?= +[A-Z]|$)| (?:Command|Data): ", text)[0]

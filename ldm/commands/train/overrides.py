"""Validates Hydra overrides before they are composed, and suggests the nearest names."""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf

from ldm.commands.train.config_sources import ConfigSources, config_sources
from ldm.commands.train.hints import ELSEWHERE, EVALUATION, null_hint, option_hint, removal_hint
from ldm.commands.train.messages import first_line
from ldm.commands.train.trainer_arguments import check_argument
from ldm.commands.train.used_settings import is_read

OPEN = ("sampler.options.", "sampler.spacing_options.")  # keys below these are function arguments that no config lists
PLAIN = re.compile(r"[^\[\]{}()'\",\\$]+")  # text that has no meaning to Hydra beyond its characters
UNTRAINED = "untrained"  # in place of a path to frozen weights; only then `config` is used (see ldm.weights.parts)
# Settings that would be ignored in a sweep → what to set instead.
SET_BY_SWEEPS = {
    "run_dir": "each run's folder is named by its settings; set hydra.sweep.dir, which contains them",
    "hydra.sweep.subdir": "each run's folder is named by its settings, inside hydra.sweep.dir",
}


def check_overrides(arguments: list[str], conf: Path) -> list[str]:
    """Returns the arguments in Hydra's syntax; values such as <my-dog>, which it cannot parse, are quoted.

    Raises ValueError for an unknown option or key, with the nearest valid name, and for a value of another type than
    the config's.
    """
    arguments = [quoted(f"++{line}" if line.startswith(OPEN) else line) for line in arguments]
    try:
        given = get_args(arguments)
        overrides = OverridesParser.create().parse_overrides(given.overrides)
    except HydraException as error:
        raise ValueError(
            f"cannot parse the arguments ({_reason(error)}): write key=value, and quote special characters"
        ) from error
    if given.multirun and (given.cfg or given.info):
        raise ValueError(
            "the config of a sweep cannot be shown, only that of one run: leave out -m, and give each key one value"
        )
    sweep = given.multirun or any(o.key_or_group == "hydra.mode" and o.value() == "MULTIRUN" for o in overrides)
    _check_set_elsewhere(overrides, sweep)
    with config_sources(given, overrides, conf) as sources:
        _check_names(overrides, sources)
        _check_read(overrides, sweep, sources)
    return arguments


def _reason(error: HydraException) -> str:
    """Returns the first line of a parser's message, without the name of the exception that it starts with."""
    return re.sub(r"^\w+Exception: ", "", first_line(error))


def quoted(argument: str) -> str:
    """Quotes a plain text that Hydra's grammar lacks the characters for, such as adapter.token=<my-dog>.

    Values with brackets, quotes or commas are returned as they are, because they may be meant as lists or sweeps.
    """
    name, equals, value = argument.partition("=")
    if not equals or name.startswith("-") or PLAIN.fullmatch(value) is None:
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return f"{name}='{value}'"
    return argument


def _check_names(overrides: list[Override], sources: ConfigSources) -> None:
    """Raises ValueError for options and keys that do not exist, and for values of the wrong type."""
    chosen = []
    for override in overrides:
        group = override.key_or_group
        if not (known := _options_of(group, sources)):
            continue
        if override.is_delete():
            raise ValueError(removal_hint(group, known))
        options = _options(override)
        for option in options:
            if option not in known:
                raise ValueError(
                    option_hint(group, option, known) or f"{group}={option} does not exist: {suggestion(option, known)}"
                )
        if override.is_sweep_override():  # keys are checked against its first option
            chosen += [f"{group}={option}" for option in options[:1]]
        else:
            chosen.append(override.input_line or "")
    values = dict(_dotted_items(OmegaConf.to_container(sources.compose(chosen))))
    for override in overrides:
        name = override.key_or_group
        if name.startswith(("hydra", *OPEN)) or _options_of(name, sources):
            continue
        if name in values:
            if override.is_delete() and name == "evaluation":
                raise ValueError(f"~evaluation would remove settings that a run reads: {EVALUATION}")
            _check_type(override, values[name])
        elif owners := [] if override.is_add() else _owners(name, sources):
            raise ValueError(f"the key {name} exists only with {' or '.join(owners)}: choose that, or leave it out")
        elif not override.is_add():
            raise ValueError(
                f"there is no key {name}: {ELSEWHERE.get(name) or suggestion(name, sorted({*values, *sources.groups}))}"
            )


def _options_of(name: str, sources: ConfigSources) -> list[str]:
    """Returns the options of a group of ldm or the user; empty for a key and for Hydra's own groups."""
    return [] if "." in name or name.split("/")[0] == "hydra" else sources.options(name)


def _check_set_elsewhere(overrides: list[Override], sweep: bool) -> None:
    """Raises ValueError for settings that would be ignored, because another setting takes their place."""
    for name in (override.key_or_group for override in overrides if not override.is_delete()):
        if sweep and name in SET_BY_SWEEPS:
            raise ValueError(f"{name} cannot be set in a sweep: {SET_BY_SWEEPS[name]}")
        if name.startswith("trainer."):
            check_argument(name.split(".")[1])


def _check_read(overrides: list[Override], sweep: bool, sources: ConfigSources) -> None:
    """Raises ValueError for settings that nothing would read, such as a schedule when an autoencoder is trained."""
    config = sources.compose([_first(o) for o in overrides if not o.key_or_group.startswith("hydra")])
    plain: Any = OmegaConf.to_container(config)
    if plain.get("plan"):  # a plan reads more settings than training
        return
    if plain.get("resume") == "auto" and "${now:" in str(plain.get("run_dir")) and not sweep:
        raise ValueError(
            "resume=auto resumes the run in run_dir, which is a new folder each time by default: give run_dir, too"
        )
    for override in overrides:
        key = override.package or override.key_or_group
        if key.split(".")[0] not in plain or override.is_delete():
            continue
        part, _, setting = key.partition(".")
        if setting.split(".")[0] == "config" and OmegaConf.select(config, f"{part}.weights") not in (None, UNTRAINED):
            raise ValueError(f"{key} would be ignored, because the file {part}.weights determines it: leave it out")
        if not is_read(plain, key):
            raise ValueError(
                f"{override.input_line} would be ignored, because nothing reads {key} with these settings: leave it out"
            )


def _first(override: Override) -> str:
    """Returns the override, with the first value if it lists several; "" for sweeps that do not list their values."""
    line = override.input_line or ""
    if not override.is_sweep_override():
        return line
    if override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
        return ""
    return f"{line.partition('=')[0]}={next(iter(override.sweep_string_iterator()))}"


def _check_type(override: Override, default: Any) -> None:
    """Raises ValueError for a value of another type than the default: a string, true or false for a number, or a
    fraction for an integer.

    Any key may be null or an interpolation, a list may replace a number, and a fraction may replace an integer of
    Lightning's Trainer, where it is a share.
    """
    name = override.key_or_group
    for value in _given(override):
        if value is None and not override.is_delete() and (hint := null_hint(name, default)):
            raise ValueError(hint)
        if value is None or (isinstance(value, str) and "${" in value):
            continue
        if isinstance(default, list):
            mismatch = not isinstance(value, list)
        elif isinstance(default, bool):
            mismatch = isinstance(value, str)
        elif isinstance(default, int | float):
            fraction = isinstance(value, float) and isinstance(default, int) and not name.startswith("trainer.")
            mismatch = isinstance(value, str | bool) or fraction
        else:
            continue
        if mismatch:
            kinds = {bool: "true or false", int: "an integer", float: "a number", list: "a list"}
            example = json.dumps(default)
            raise ValueError(f"{name} is {value}, but must be {kinds[type(default)]}, such as {example}")


def _given(override: Override) -> list[Any]:
    """Returns the value, or the values that a sweep lists."""
    value = override.value()
    if not override.is_sweep_override():
        return [value]
    listed = value.list if isinstance(value, ChoiceSweep) else []
    return [item.text if isinstance(item, QuotedString) else item for item in listed]


def _options(override: Override) -> list[str]:
    if override.is_delete() or override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return []
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    value = override.value()
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _owners(key: str, sources: ConfigSources) -> list[str]:
    """Returns the options, as group=option, that have a key which the chosen options lack."""
    group, _, leaf = key.partition(".")
    options = _options_of(group, sources) if leaf else []
    return [f"{group}={option}" for option in options if leaf in sources.keys(group, option)]


def _dotted_items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every dotted key with its value."""
    for name, value in node.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from _dotted_items(value, f"{prefix}{name}.")


def suggestion(name: str, names: list[str]) -> str:
    """Returns a hint with the most similar of `names`, or all of them if they are few."""
    leaf = {full.rpartition(".")[2]: full for full in reversed(names)}
    close = difflib.get_close_matches(name, names, 1) or [
        leaf[match] for match in difflib.get_close_matches(name.rpartition(".")[2], list(leaf), 1)
    ]
    if close:
        return f"did you mean {close[0]}?"
    return f"choose from {', '.join(names)}" if len(names) <= 30 else "python train.py --cfg job prints every key"

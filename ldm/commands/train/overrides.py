"""Checks the overrides of a command line before Hydra composes them, and suggests the nearest names."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ldm.commands.train.messages import first_line
from ldm.commands.train.trainer_arguments import check_argument
from ldm.commands.train.used_settings import is_read

OPEN = ("sampler.options.", "sampler.spacing_options.")  # whose keys are arguments of functions, not of a config
UNTRAINED = "untrained"  # in place of the path of a frozen part, see ldm.weights.parts: what its `config` is for
# Settings that would be ignored in a sweep → what to set instead.
ELSEWHERE_IN_SWEEPS = {
    "run_dir": "the folder of each run is named by its settings; set hydra.sweep.dir, which holds them",
    "hydra.sweep.subdir": "the folder of each run is named by its settings, within hydra.sweep.dir",
}


def check_overrides(arguments: list[str], conf: Path) -> list[str]:
    """The arguments as Hydra takes them.

    Raises ValueError for an option that no group has, a key that the config does not have, with the nearest right
    name, and for a value of another type than the config's.
    """
    arguments = [f"++{line}" if line.startswith(OPEN) else line for line in arguments]
    try:
        given = get_args(arguments)
        overrides = OverridesParser.create().parse_overrides(given.overrides)
    except HydraException as error:
        raise ValueError(
            f"cannot read the arguments ({first_line(error)}); write key=value, quote odd values"
        ) from error
    sweep = given.multirun or any(one.key_or_group == "hydra.mode" and one.value() == "MULTIRUN" for one in overrides)
    _check_elsewhere(overrides, sweep)
    groups = {path.name: sorted(p.stem for p in path.glob("[!_]*.yaml")) for path in conf.iterdir() if path.is_dir()}
    chosen = []
    for override in overrides:
        if (name := override.key_or_group) in groups:
            options = _options(override)
            for option in options:
                if option not in groups[name]:
                    raise ValueError(f"{name}={option} does not exist; {suggestion(option, groups[name])}")
            if override.is_sweep_override():  # keys are looked for in its first option
                chosen += [f"{name}={option}" for option in options[:1]]
            else:
                chosen.append(override.input_line or "")
    values = dict(_walk(OmegaConf.to_container(_composed(chosen, conf))))
    for override in overrides:
        name = override.key_or_group
        if name in groups or name.startswith(("hydra", *OPEN)):
            continue
        if name in values:
            _check_type(override, values[name])
        elif owners := [] if override.is_add() else _owners(name, groups, conf):
            raise ValueError(f"there is a key {name} only with {' or '.join(owners)}; choose that, or leave it out")
        elif not override.is_add():
            raise ValueError(f"there is no key {name}; {suggestion(name, sorted(values.keys() | groups.keys()))}")
    _check_read(overrides, sweep, conf)
    return arguments


def _check_elsewhere(overrides: list[Override], sweep: bool) -> None:
    """Refuses settings that would be ignored, since another one decides."""
    for name in (override.key_or_group for override in overrides if not override.is_delete()):
        if sweep and name in ELSEWHERE_IN_SWEEPS:
            raise ValueError(f"{name} is not a setting of a sweep: {ELSEWHERE_IN_SWEEPS[name]}")
        if name.startswith("trainer."):
            check_argument(name.split(".")[1])


def _check_read(overrides: list[Override], sweep: bool, conf: Path) -> None:
    """Refuses settings that nothing would read, such as a schedule where an autoencoder is trained."""
    config = _composed([_first(one) for one in overrides if not one.key_or_group.startswith("hydra")], conf)
    plain: Any = OmegaConf.to_container(config)
    if plain["plan"]:  # which looks at more than training does
        return
    if plain["resume"] == "auto" and "${now:" in str(plain["run_dir"]) and not sweep:
        raise ValueError(
            "resume=auto resumes the run in run_dir, which would be a new folder each time: give run_dir too"
        )
    for override in overrides:
        key = override.package or override.key_or_group
        if key.split(".")[0] not in plain or override.is_delete():
            continue
        part, _, setting = key.partition(".")
        if setting.split(".")[0] == "config" and OmegaConf.select(config, f"{part}.weights") not in (None, UNTRAINED):
            raise ValueError(f"{key} would be ignored, since the file {part}.weights says it: leave it out")
        if not is_read(plain, key):
            raise ValueError(
                f"{override.input_line} would be ignored, since nothing reads {key} under these settings: leave it out"
            )


def _first(override: Override) -> str:
    """The override itself, or the first of a sweep that lists its values; nothing for another sweep."""
    line = override.input_line or ""
    if not override.is_sweep_override():
        return line
    if override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
        return ""
    return f"{line.partition('=')[0]}={next(iter(override.sweep_string_iterator()))}"


def _check_type(override: Override, default: Any) -> None:
    """Refuses text, and for numbers true and false, where the config has none; fractions where it has a whole number.

    Any key may be null or refer to another one, a list may stand for a number, and a fraction for one of Lightning's,
    which takes it as a share.
    """
    name = override.key_or_group
    for value in _given(override):
        if value is None or (isinstance(value, str) and "${" in value):
            continue
        if isinstance(default, bool | list):
            misfit = isinstance(value, str)
        elif isinstance(default, int | float):
            fraction = isinstance(value, float) and isinstance(default, int) and not name.startswith("trainer.")
            misfit = isinstance(value, str | bool) or fraction
        else:
            continue
        if misfit:
            kinds = {bool: "true or false", int: "a whole number", float: "a number", list: "a list"}
            shown = json.dumps(default)
            raise ValueError(f"{name} is {value}, but must be {kinds[type(default)]}, such as {shown}")


def _given(override: Override) -> list[Any]:
    """The value, or those of a sweep that are listed."""
    value = override.value()
    if not override.is_sweep_override():
        return [value]
    listed = value.list if isinstance(value, ChoiceSweep) else []
    return [one.text if isinstance(one, QuotedString) else one for one in listed]


def _options(override: Override) -> list[str]:
    if override.is_delete() or override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return []
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    value = override.value()
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _owners(key: str, groups: dict[str, list[str]], conf: Path) -> list[str]:
    """The options, as group=option, that would bring a key which the chosen ones lack."""
    group, _, leaf = key.partition(".")
    files = {name: OmegaConf.load(conf / group / f"{name}.yaml") for name in groups.get(group, [])}
    return [f"{group}={name}" for name, node in files.items() if isinstance(node, DictConfig) and leaf in [*node]]


def _composed(overrides: list[str], conf: Path) -> DictConfig:
    """The config with these overrides."""
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        return compose("train", overrides=[line for line in overrides if line], return_hydra_config=False)


def _walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key and its value."""
    for name, value in node.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{name}.")


def suggestion(name: str, names: list[str]) -> str:
    """A hint: the most similar of `names`, or some of them."""
    leaf = {full.rpartition(".")[2]: full for full in reversed(names)}
    close = difflib.get_close_matches(name, names, 1) or [
        leaf[match] for match in difflib.get_close_matches(name.rpartition(".")[2], list(leaf), 1)
    ]
    if close:
        return f"did you mean {close[0]}?"
    return f"there are: {', '.join(names)}" if len(names) <= 30 else "python train.py --cfg job prints every key"

"""What stands between the command line and the objects: checks with nearest names, run folders, one-sentence errors."""

import difflib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.commands.edge import EXPECTED
from ldm.files import write_text


def check_overrides(arguments: list[str], conf: Path) -> None:
    """Refuses, with the nearest right name, an option that no group has and a key that the config does not have."""
    try:
        overrides = OverridesParser.create().parse_overrides(get_args(arguments).overrides)
    except HydraException as error:
        raise ValueError(
            f"cannot read the arguments ({_first_line(error)}); write key=value, quote odd values"
        ) from error
    groups = {path.name: sorted(p.stem for p in path.glob("*.yaml")) for path in conf.iterdir() if path.is_dir()}
    chosen = []
    for override in overrides:
        if (name := override.key_or_group) in groups:
            options = _options(override)
            for option in options:
                if option not in groups[name]:
                    raise ValueError(f"{name}={option} does not exist; {nearest(option, groups[name])}")
            if override.is_sweep_override():  # keys are looked for in its first option
                chosen += [f"{name}={option}" for option in options[:1]]
            else:
                chosen.append(override.input_line or "")
    keys = _keys(chosen, conf)
    for override in overrides:
        name = override.key_or_group
        if name in groups or name.startswith("hydra") or override.is_add() or name in keys:
            continue
        if owners := _owners(name, groups, conf):
            raise ValueError(f"there is a key {name} only with {' or '.join(owners)}; choose that, or leave it out")
        raise ValueError(f"there is no key {name}; {nearest(name, sorted(keys | groups.keys()))}")


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


def _keys(chosen: list[str], conf: Path) -> set[str]:
    """Every dotted key of the config with these group options."""
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        config = compose("train", overrides=[line for line in chosen if line], return_hydra_config=False)
    return {key for key, _ in _walk(config)}


def _walk(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every dotted key, and whether its value is still to be given."""
    for name, value in node.items_ex(resolve=False):
        yield f"{prefix}{name!s}", OmegaConf.is_missing(node, name)
        if isinstance(value, DictConfig):
            yield from _walk(value, f"{prefix}{name!s}.")


def nearest(name: str, names: list[str]) -> str:
    """A hint: the most similar of `names`, or some of them."""
    leaf = {full.rpartition(".")[2]: full for full in reversed(names)}
    close = difflib.get_close_matches(name, names, 1) or [
        leaf[match] for match in difflib.get_close_matches(name.rpartition(".")[2], list(leaf), 1)
    ]
    if close:
        return f"did you mean {close[0]}?"
    return f"there are: {', '.join(names)}" if len(names) <= 30 else "python train.py --cfg job prints every key"


def save_run(config: DictConfig, run_dir: Path) -> None:
    """The resolved config and the exact command, so that the run can be read and repeated."""
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    write_text(run_dir / "command.txt", shlex.join(["python", *sys.argv]) + "\n")


def check_given(config: DictConfig) -> None:
    """Refuses a config in which a key that has no default was not given."""
    for key, missing in _walk(config):
        if missing:
            raise ValueError(f"{key} has no default; give it as {key}=…")


def is_refusal(error: BaseException) -> bool:
    """Whether the message is written for people, so that where it was raised says nothing more to them."""
    return isinstance(error, (*EXPECTED, HydraException, OmegaConfBaseException))


def sentence(error: BaseException) -> str:
    """What went wrong in one line: the innermost cause of what Hydra and OmegaConf wrap."""
    while isinstance(error, HydraException | OmegaConfBaseException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_first_line(error)}"
    text = " ".join(str(error).split())
    return text if is_refusal(error) and text else f"{type(error).__name__}: {text}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

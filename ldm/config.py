"""What stands between the command line and the objects: checks with nearest names, run folders, one-sentence errors."""

import difflib
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.files import write_text


def check_overrides(arguments: list[str], conf: Path) -> None:
    """Refuses, with the nearest right name, an option that no group has and a key that the config does not have."""
    try:
        overrides = OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("-")])
    except HydraException as error:
        raise ValueError(f"cannot read the arguments ({_first_line(error)}); write key=value, quote odd values") from error
    groups = {path.name: sorted(p.stem for p in path.glob("*.yaml")) for path in conf.iterdir() if path.is_dir()}
    chosen = []
    for override in overrides:
        if (name := override.key_or_group) in groups:
            for option in _options(override):
                if option not in groups[name]:
                    raise ValueError(f"{name}={option} does not exist; {nearest(option, groups[name])}")
            if not override.is_sweep_override():
                chosen.append(override.input_line or "")
    keys = _keys(chosen, conf)
    for override in overrides:
        name = override.key_or_group
        if name in groups or name.startswith("hydra") or override.is_add() or name in keys:
            continue
        raise ValueError(f"there is no key {name}; {nearest(name, sorted(keys | groups.keys()))}")


def _options(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    value = override.value()
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _keys(chosen: list[str], conf: Path) -> set[str]:
    """Every dotted key of the config with these group options, and the Trainer's own arguments."""
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        config = compose("train", overrides=[line for line in chosen if line], return_hydra_config=False)
    keys: set[str] = set()

    def walk(node: Any, prefix: str) -> None:
        items = node.items_ex(resolve=False) if isinstance(node, DictConfig) else ()
        for name, value in items:
            keys.add(prefix + str(name))
            walk(value, f"{prefix}{name}.")

    walk(config, "")
    return keys


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


def sentence(error: BaseException) -> str:
    """What went wrong in one line: the innermost cause of what Hydra and OmegaConf wrap."""
    while isinstance(error, HydraException | OmegaConfBaseException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_first_line(error)}"
    return str(error) if str(error) else type(error).__name__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

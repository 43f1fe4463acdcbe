"""Lists the config groups and options that a command line can choose, from all folders in Hydra's search path."""

import argparse
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from hydra.version import setbase
from omegaconf import DictConfig

SEARCH_PATH = "hydra.searchpath"


class ConfigSources:
    """The configs in the search path of a command line: train.py's own, --config-path, --config-dir, hydra.searchpath.

    Only valid within the block of `config_sources`.
    """

    def __init__(self, hydra: Hydra, config_name: str, search_path: list[str]) -> None:
        self.hydra, self.config_name, self.search_path = hydra, config_name, search_path
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    @cached_property
    def _repository(self) -> Any:
        loader: Any = self.hydra.config_loader
        return loader._parse_overrides_and_create_caching_repo(self.config_name, self.search_path)[1]

    @cached_property
    def groups(self) -> list[str]:
        """The top-level groups."""
        return [name for name in self._repository.get_group_options("", ObjectType.GROUP) if name != "hydra"]

    def options(self, group: str) -> list[str]:
        """Returns the options of a group that can be chosen; none if there is no such group."""
        return [name for name in self._repository.get_group_options(group, ObjectType.CONFIG) if name[0] != "_"]

    def keys(self, group: str, option: str) -> list[str]:
        """Returns the keys that the file of an option sets."""
        config = self._repository.load_config(f"{group}/{option}").config
        return [str(key) for key in config] if isinstance(config, DictConfig) else []

    def comment(self, group: str, option: str) -> str:
        """Returns the comment at the top of the file of an option, "" if it has none or cannot be found."""
        place = self._repository.load_config(f"{group}/{option}").path
        scheme, _, path = place.partition("://")
        if scheme not in ("file", "pkg"):
            return ""
        folder = Path(path) if scheme == "file" else files(path.partition("/")[0].replace("/", "."))
        file = folder / group / f"{option}.yaml"
        lines = file.read_text().splitlines() if file.is_file() else []
        return "\n".join(takewhile(lambda line: line.startswith("#"), lines))

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Composes the config with these overrides, which takes 0.2 s, but only once for the same ones."""
        lines = *self.search_path, *(line for line in overrides if line)
        if lines not in self._composed:
            self._composed[lines] = compose(self.config_name, overrides=list(lines))
        return self._composed[lines]


@contextmanager
def config_sources(given: argparse.Namespace, overrides: Sequence[Override], conf: Path) -> Iterator[ConfigSources]:
    """Yields the configs of a command line that Hydra's parser has `given`; `conf` is the folder of train.py's own.

    Raises ValueError for a folder or package that does not exist.
    """
    path = create_automatic_config_search_path(str(conf.parent / "train.py"), None, given.config_path or conf.name)
    if given.config_dir:
        folder = Path(given.config_dir).absolute()
        if not folder.is_dir():
            raise ValueError(f"--config-dir {given.config_dir} is not a folder: give one that contains config groups")
        path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    search_path = [
        line for override in overrides if override.key_or_group == SEARCH_PATH and (line := override.input_line)
    ]
    backup = get_gh_backup()
    setbase("1.3")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", r"provider=.* is not available")
            yield ConfigSources(Hydra.create_main_hydra2("train", path), given.config_name or "train", search_path)
    except UserWarning as warning:
        missing = str(warning).partition("path=")[2].removesuffix(" is not available.")
        raise ValueError(
            f"{SEARCH_PATH} names {missing}, which does not exist: give file:///FOLDER or pkg://PACKAGE, with config "
            "groups in it"
        ) from None
    finally:
        restore_gh_from_backup(backup)


def source_arguments(hydra_config: Any, conf: Path) -> list[str]:
    """Returns the arguments of a job's command line that name its config sources, from the job's Hydra config."""
    sources: dict[str, list[str]] = {}
    for source in hydra_config.runtime.config_sources:
        sources.setdefault(source.provider, []).append(f"{source.schema}://{source.path}")
    arguments = [line for line in hydra_config.overrides.hydra if line.lstrip("+").startswith(f"{SEARCH_PATH}=")]
    for option, provider, default in (("--config-path", "main", conf), ("--config-dir", "command-line", None)):
        for place in sources.get(provider, []):
            path = place.removeprefix("file://")
            arguments += [] if Path(path) == default else [option, path]
    name = hydra_config.job.config_name
    return arguments + ([] if name == "train" else ["--config-name", name])

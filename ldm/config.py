"""What stands between the command line and the objects: checks with nearest names, run folders, one-sentence errors."""

import difflib
import hashlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, ValueType
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ldm.commands.edge import EXPECTED
from ldm.files import is_locked, lock, write_text
from ldm.report.groups import decisive
from ldm.report.runs import WAITING, flatten
from ldm.training.consistency import disagreements
from ldm.training.reading import is_read
from ldm.training.trainer import check_argument, check_trainer

UNTRAINED = "untrained"  # in place of the path of a frozen part, see ldm.weights.parts: what its `config` is for
# Settings that would be ignored in a sweep → what to set instead.
ELSEWHERE_IN_SWEEPS = {
    "run_dir": "the folder of each run is named by its settings; set hydra.sweep.dir, which holds them",
    "hydra.sweep.subdir": "the folder of each run is named by its settings, within hydra.sweep.dir",
}


def check_overrides(arguments: list[str], conf: Path) -> None:
    """Refuses an option that no group has, a key that the config does not have, and a value of another type.

    Names are told with the nearest right one, types by the value that is there without the override.
    """
    try:
        given = get_args(arguments)
        overrides = OverridesParser.create().parse_overrides(given.overrides)
    except HydraException as error:
        raise ValueError(
            f"cannot read the arguments ({_first_line(error)}); write key=value, quote odd values"
        ) from error
    sweep = given.multirun or any(one.key_or_group == "hydra.mode" and one.value() == "MULTIRUN" for one in overrides)
    _check_elsewhere(overrides, sweep)
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
    values = dict(_walk(OmegaConf.to_container(_composed(chosen, conf))))
    for override in overrides:
        name = override.key_or_group
        if name in groups or name.startswith("hydra"):
            continue
        if name in values:
            _check_type(override, values[name])
        elif owners := [] if override.is_add() else _owners(name, groups, conf):
            raise ValueError(f"there is a key {name} only with {' or '.join(owners)}; choose that, or leave it out")
        elif not override.is_add():
            raise ValueError(f"there is no key {name}; {nearest(name, sorted(values.keys() | groups.keys()))}")
    _check_read(overrides, sweep, conf)


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


def sweep_label(hydra: Any) -> str:
    """A job's overrides, for people: first those that its sweep varies, as far as that is known."""
    constant = set(hydra.job.config.override_dirname.exclude_keys)
    parsed = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    rest = sorted(str(one.input_line) for one in parsed if one.key_or_group in constant)
    return ",".join([*filter(None, [hydra.job.override_dirname]), *rest])


def sweep_folder(config: DictConfig, parent: Path, label: str) -> Path:
    """A sweep's run by its content: a hash of what decides its result; `label`, for people, is of the first so made.

    A checkpoint that the run starts from, unlike its own, is part of that.
    """
    settings = decisive(flatten(OmegaConf.to_container(config, resolve=True)), config.run_dir)
    if config.resume not in (None, "auto"):
        settings["resume"] = config.resume
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    readable = re.sub(r"[^\w=.,+-]+", "-", label)[:80]
    return next(iter(parent.glob(f"*_{digest}")), parent / f"{readable}_{digest}")


class Waiting(Callback):
    """Marks each run of a sweep as waiting when the sweep starts; one that has a folder waits no more.

    Their names begin with what the sweep varies.

    The marks hold while the sweep's process does, which locks the folder of its runs.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            return  # which finds its runs as it goes
        folders = []
        listed = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
        overrides = OverridesParser.create().parse_overrides([*listed, *config.hydra.overrides.task])
        constant = json.dumps([one.key_or_group for one in overrides if not one.is_sweep_override()])
        with open_dict(config):
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys={constant}")
        for overridden in BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]:
            job = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overridden))
            HydraConfig.instance().set_config(job)  # which the job's ${hydra:…} refer to
            parent, label = Path(job.hydra.sweep.dir), sweep_label(job.hydra)
            with open_dict(job):
                del job["hydra"]
            with suppress(ValueError):  # for a key that was not given: the run itself says so
                check_given(job)
                folders.append(sweep_folder(job, parent, label))
        marks = [waiting(folder) for folder in folders if not folder.exists()]
        for folder in {mark.parent for mark in marks}:
            folder.parent.mkdir(parents=True, exist_ok=True)
            others = is_locked(folder.parent)
            lock(folder.parent, shared=True)  # until the process ends
            if not others:
                shutil.rmtree(folder, ignore_errors=True)  # of a sweep that was stopped
            folder.mkdir(exist_ok=True)
        for mark in marks:
            mark.touch()


def waiting(run_dir: Path) -> Path:
    """The mark of a run that has not begun."""
    return run_dir.parent / WAITING / run_dir.name


def hyperparameters(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides the result in an unresolved config, by dotted key; what only repeats another setting is left out."""
    return {key: value for key, value in decisive(flatten(settings)).items() if "${" not in str(value)}


def check_given(config: DictConfig) -> None:
    """Refuses a config in which a key that has no default was not given."""
    for key, value in _walk(OmegaConf.to_container(config)):
        if value == MISSING:
            raise ValueError(f"{key} has no default; give it as {key}=…")


def check_settings(config: DictConfig) -> None:
    """Refuses arguments of the Trainer that would be ignored, and settings that differ from those that they follow."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    check_trainer(plain["trainer"])
    if found := disagreements(plain):
        raise ValueError("; ".join(found))


def check_parallel(config: DictConfig, gpu: bool) -> None:
    """Refuses what the device, or strategy=fsdp, cannot do."""
    if "largest_batch" in config.callbacks and (config.trainer.accelerator == "cpu" or not gpu):
        raise ValueError(
            "debug=batch_size fills the memory of a GPU, and a process that fills the machine's is killed: use "
            "debug=plan, which computes what fits"
        )
    if str(config.trainer.precision).startswith("16") and (config.trainer.accelerator == "cpu" or not gpu):
        raise ValueError("precision=16-mixed needs a GPU; choose precision=bf16-mixed or precision=fp32")
    if config.precision.compute and "compute" not in config.training:
        raise ValueError("precision=bf16-true is for training=diffusion; choose precision=bf16-mixed")
    if isinstance(config.trainer.strategy, str) or "ModelParallel" not in config.trainer.strategy["_target_"]:
        return
    if "compute" not in config.training:
        raise ValueError("strategy=fsdp is for training=diffusion; choose strategy=ddp")
    if config.optimizer["_target_"].endswith("Muon"):
        raise ValueError("optimizer=muon needs whole matrices, and strategy=fsdp cuts them up; choose optimizer=adamw")
    if (config.get("evaluation") or {}).get("prompts"):
        raise ValueError(
            "with strategy=fsdp no process holds the weights that the evaluation at the end draws with; give "
            "metrics=none, and measure the run with ldm evaluate"
        )


def fast_precision(accelerator: str, plan: bool) -> str:
    """bf16-mixed where the GPU, or without one the CPU, has instructions for it, and in a plan; float32 elsewhere."""
    if plan:
        return "bf16-mixed"  # which every GPU that is planned for has
    from ldm.processor import choose_device, has_bf16

    return "bf16-mixed" if has_bf16(choose_device("cpu" if accelerator == "cpu" else "auto")) else "32-true"


OmegaConf.register_new_resolver("fast_precision", fast_precision, replace=True)


def is_refusal(error: BaseException) -> bool:
    """Whether the message is written for people, so that where it was raised says nothing more to them."""
    return isinstance(error, (*EXPECTED, HydraException, OmegaConfBaseException))


def sentence(error: BaseException) -> str:
    """What went wrong in one line: the innermost cause of what Hydra and OmegaConf wrap, with its key if need be."""
    key = re.search(r"full_key: (\S+)", str(error))
    while isinstance(error, HydraException | OmegaConfBaseException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {_first_line(error)}"
    text = " ".join(str(error).split())
    if is_refusal(error) and text:
        return text
    return f"{key[1] + ': ' if key else ''}{type(error).__name__}: {text}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

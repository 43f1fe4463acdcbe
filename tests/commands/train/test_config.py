import os
import re
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.commands.train import config_sources as config_sources_module
from ldm.commands.train.checks import check, check_given, check_parallel
from ldm.commands.train.config_sources import config_sources, source_arguments
from ldm.commands.train.messages import as_usage_error, exit_code, is_refusal, sentence
from ldm.commands.train.overrides import check_overrides, quoted, suggestion
from ldm.commands.train.precision import uses_tf32
from ldm.commands.train.preparation import avoid_fragmentation, fill_in_settings, take_own_gpu
from ldm.commands.train.resolvers import register_resolvers
from ldm.commands.train.run_folder import hyperparameters, save_run
from ldm.commands.train.sweep import WaitingMarks, sweep_folder, waiting_mark
from ldm.diffusion.schedule import from_config
from ldm.diffusion.weighting import WEIGHTINGS
from ldm.errors import UsageError
from ldm.files import is_locked
from ldm.nn.unet import UNet

CONF = Path(__file__).parents[3] / "conf"
register_resolvers()


@pytest.fixture(scope="module", autouse=True)
def composed_once() -> Iterator[None]:
    """Composes a config that several tests read only once. Composing takes most of the time of these tests."""
    known: dict[tuple[str, ...], DictConfig] = {}

    def once(name: str, overrides: list[str]) -> DictConfig:
        places = (
            f"{place.provider}={place.path}"
            for place in GlobalHydra.instance().config_loader().get_search_path().get_path()
        )
        key = name, *places, "", *overrides
        if key not in known:
            known[key] = compose(name, overrides=overrides)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_sources_module, "compose", once)
        yield


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "trainer.max_steps=3 trainer.limit_val_batches=5 data.batch_size=4",
        "schedule=cosine prediction=v sampler=ddim sampler.steps=7",
        "experiment=emoji data.shards=x",
        "experiment=shapes_vae data.shards=x model.widths=[8]",
        "lr=constant",
        "lr=linear lr.hold=0.1",
        "-m schedule=cosine,linear trainer.max_steps=3,4",
        "-m lr=linear,constant lr.hold=0.1",
        "-m prediction=glob(*)",
        "schedule=snr_shift schedule@schedule.schedule=linear schedule.shift=4 schedule.schedule.steps=10",
        "schedule=zero_terminal_snr schedule@schedule.schedule=snr_shift",
        "-m seed=range(3)",
        "~callbacks.checkpoint",
        "+trainer.inference_mode=false",
        "hydra.sweep.dir=x",
        "--cfg job",
        "-cn train seed=1",
        "metrics=none debug=plan",
        'callbacks.previews.prompts=["a red ring, left of a blue star"]',
    ],
)
def test_overrides_of_existing_keys_are_accepted(line: str) -> None:
    check_overrides([line] if '"' in line else line.split(), CONF)


@pytest.mark.parametrize("text", ["<my-dog>", "a photo of a <my-dog>", "a<b>", "wow!", "50% of #3", "a dog; a cat"])
def test_plain_text_needs_no_quotes(text: str) -> None:
    line = f"adapter.token={text}"
    arguments = check_overrides(["experiment=textual_inversion", "data.root=x", line], CONF)
    assert composed(*arguments).adapter.token == text


@pytest.mark.parametrize(
    "line",
    [
        *("lr=cosine", "--config-dir=a b", "+data.x=[1,2]", "~ema", "-m", "seed=1,2", "data.caption='a, b'"),
        *("adapter.token='<my-dog>'", "adapter.token=a\\>", "data.captions=[<a>]"),
    ],
)
def test_arguments_that_hydra_reads_are_not_changed(line: str) -> None:
    assert quoted(line) == line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("schedule=flo", "schedule=flo does not exist: did you mean flow?"),
        ("experiment=[shapes,emojy]", "experiment=emojy does not exist: did you mean emoji?"),
        ("-m sampler=ddim,eular", "sampler=eular does not exist: did you mean euler?"),
        ("shedule=flow", "there is no key shedule: did you mean schedule?"),
        ("trainer.max_step=3", "there is no key trainer.max_step: did you mean trainer.max_steps?"),
        ("optimiser.lr=1", "there is no key optimiser.lr: did you mean optimizer.lr?"),
        ("max_steps=3", "there is no key max_steps: did you mean trainer.max_steps?"),
        ("data.batchsize=3", "there is no key data.batchsize: did you mean data.batch_size?"),
        ("lr=constant lr.hold=0.1", "the key lr.hold exists only with lr=linear"),
        ("data.root=pictures", "the key data.root exists only with data=folder"),
        ("data=folder data.shards=x", "the key data.shards exists only with data="),
        ("shapes", "cannot parse the arguments"),
        ("lr=1e-4", "lr=0.0001 does not exist, because lr is a group of settings: set optimizer.lr=0.0001"),
        ("ema=0.999", "ema=0.999 does not exist, because ema is a group of settings: set ema.decay=0.999"),
        ("ema=null", "ema=null is not an option: choose ema=none"),
        ("schedule=null", "schedule=null is not an option: choose from cosine, edm"),
        ("~ema", "~ema would remove settings that a run reads: choose ema=none"),
        ("~schedule", "~schedule would remove settings that a run reads: choose one of cosine, edm"),
        ("evaluation=null", "evaluation cannot be null: a run without evaluation has metrics=none"),
        (
            "~evaluation",
            "~evaluation would remove settings that a run reads: a run without evaluation has metrics=none",
        ),
        ("seed=null", "seed cannot be null, because the run needs a number: leave it out for 0"),
        ("data.batch_size=null", "data.batch_size cannot be null, because the run needs a number: leave it out for 64"),
        ("run_dir=null", "run_dir cannot be null, because the run writes its files there"),
        ("prompt='a red circle'", "there is no key prompt: it belongs to sample.py, as in python sample.py"),
        ("lora=x", "there is no key lora: adapter=lora trains a LoRA"),
        ("width=512", "there is no key width: the size of images is training.size=[HEIGHT,WIDTH]"),
        ("steps=20", "there is no key steps: set trainer.max_steps for training, or sampler.steps for sampling"),
        ("data.root=a=[", "cannot parse the arguments"),
        ("'a b'", "cannot parse the arguments ('a b'): "),
        ("precision=bf16", "precision=bf16 does not exist: choose bf16-mixed, or bf16-true"),
        ("device=cpu", "there is no key device: set trainer.accelerator=cpu or gpu"),
    ],
)
def test_unknown_options_and_keys_are_refused_with_the_most_similar_name(line: str, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_overrides([line] if "'" in line else line.split(), CONF)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "+trainer.accumulate_grad_batches=4",
            "trainer.accumulate_grad_batches is not supported: set data.global_b",
        ),
        ("trainer.fast_dev_run=true", "trainer.fast_dev_run is not supported: choose debug=fast"),
        ("++trainer.logger=false", "trainer.logger is not supported: choose logger="),
        ("+trainer.extra=1", "there is no key trainer.extra: choose from accelerator, "),
        (
            "-m seed=1,2 run_dir=x",
            "run_dir cannot be set in a sweep: each run's folder is named by its settings",
        ),
        ("hydra.mode=MULTIRUN seed=1,2 run_dir=x", "run_dir cannot be set in a sweep"),
        ("-m seed=1,2 --cfg job", "the config of a sweep cannot be shown, only that of one run: leave out -m"),
        ("-m seed=1,2 hydra.sweep.subdir=x", "hydra.sweep.subdir cannot be set in a sweep"),
        (
            "resume=auto",
            "resume=auto resumes the run in run_dir, which is a new folder each time by default: give",
        ),
        (
            "experiment=laion_sd15 data.cache=x first_stage.weights=y first_stage.config.scale=0.13",
            "first_stage.config.scale would be ignored, because the file first_stage.weights determines it",
        ),
        (
            "experiment=laion_sd15 data.cache=x first_stage.weights=y text_encoder.config.width=32",
            "text_encoder.config.width would be ignored, because the file text_encoder.weights determines it",
        ),
        ("+new=1", "+new=1 would be ignored, because nothing reads new with these settings: leave it out"),
        ("+data.new=1", "+data.new=1 would be ignored"),
        ("+sampler.new=1", "+sampler.new=1 would be ignored"),
        ("+guidance.new=1", "+guidance.new=1 would be ignored"),
        ("+strategy.devices=2", "+strategy.devices=2 would be ignored"),
        ("data=shards data.shards=x +data.count=18", "+data.count=18 would be ignored"),
        ("experiment=shapes_vae data.shards=x schedule=cosine", "schedule=cosine would be ignored"),
        ("experiment=shapes_vae data.shards=x sampler.steps=5", "sampler.steps=5 would be ignored"),
        ("-m experiment=shapes_clip data.shards=x prediction=v,eps", "prediction=v,eps would be ignored"),
        ("data.batch_size=8 training.sampling.steps=5 sampler.steps=9", "sampler.steps=9 would be ignored"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_overrides(line.split(), CONF)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "line",
    [
        "+data.new=3 data.batch_size=${data.new}",
        "+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping +callbacks.stop.monitor=val/loss",
        "+callbacks.previews.at_end=false",
        "+training.sampling.clip_skip=1",
        "debug=plan +data.size=64",
        "strategy=ddp +strategy.name.static_graph=true",
        "name=x run_dir=y",
        "run_dir=x resume=auto",
        "hydra.run.dir=. hydra.job.name=train_ddp_process_1 hydra.output_subdir=null",  # for other ranks
        "-m seed=1,2 resume=auto",
        "resume=other.ckpt",
        "experiment=laion_sd15 data.cache=x first_stage.weights=untrained first_stage.config.scale=0.13",
        "experiment=laion_sd15 data.cache=x first_stage.weights=y text_encoder.weights=untrained "
        "text_encoder.config.width=32",
    ],
)
def test_an_added_setting_that_something_reads_is_accepted(line: str) -> None:
    check_overrides(line.split(), CONF)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trainer.max_steps=abc", "trainer.max_steps is abc, but must be an integer, such as 940"),
        ("data.batch_size=x", "data.batch_size is x, but must be an integer, such as 64"),
        ("data.batch_size=1.5", "data.batch_size is 1.5, but must be an integer"),
        ("data.batch_size=true", "data.batch_size is True, but must be an integer"),
        ("optimizer.lr=fast", "optimizer.lr is fast, but must be a number, such as 0.009"),
        ("optimizer.lr='1e-3'", "optimizer.lr is 1e-3, but must be a number"),
        ("ema.decay=true", "ema.decay is True, but must be a number"),
        ("model.multipliers=wide", "model.multipliers is wide, but must be a list, such as [1, 2]"),
        ("training.size=64", "training.size is 64, but must be a list, such as [64, 64]"),
        ("training.stratified=maybe", "training.stratified is maybe, but must be true or false, such as false"),
        ("++sampler.steps=many", "sampler.steps is many, but must be an integer"),
        ("-m data.batch_size=8,x", "data.batch_size is x, but must be an integer"),
        ("lr=linear lr.hold=x", "lr.hold is x, but must be a number, such as 0.5"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_key(line: str, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_overrides(line.split(), CONF)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "line",
    [
        "optimizer.lr=1",
        "optimizer.lr=1e-3",
        "trainer.gradient_clip_val=null",
        "data.workers=${data.batch_size}",
        "model.heads=[1,2]",
        "trainer.deterministic=warn",
        "trainer.detect_anomaly=1",
        "experiment=shapes_vae data.shards=x trainer.val_check_interval=0.5",
        "trainer.devices=2",
        "-m data.batch_size=8,16",
        "-m seed=range(3)",
        "-m optimizer.lr=interval(0,1)",
        "evaluation.prompts=0 metrics=none",
        "+sampler.options.eta=1",
    ],
)
def test_a_value_of_a_compatible_type_is_accepted(line: str) -> None:
    check_overrides(line.split(), CONF)


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A folder outside the repository that adds a weighting and an experiment."""
    for path, text in {
        "weighting/flat.yaml": "{_target_: ldm.diffusion.weighting.uniform, height: 2.0}",
        "experiment/mine.yaml": "# @package _global_\ndefaults: [override /weighting: flat]",
    }.items():
        (tmp_path / "a conf" / path).parent.mkdir(parents=True)
        (tmp_path / "a conf" / path).write_text(text)
    return str(tmp_path / "a conf")


OUTSIDE = [
    ["weighting=flat", "weighting.height=3"],
    ["experiment=mine", "weighting.height=3"],
    ["-m", "weighting=flat,uniform", "seed=1,2"],
    ["weighting=min_snr"],
]


@pytest.mark.parametrize("line", OUTSIDE, ids=str)
@pytest.mark.parametrize("source", [["--config-dir", "{}"], ["hydra.searchpath=['file://{}']"]], ids=str)
def test_options_of_another_folder_are_accepted_like_those_of_the_repository(
    line: list[str], source: list[str], own: str
) -> None:
    check_overrides([*line, *(word.format(own) for word in source)], CONF)


def test_a_config_path_replaces_the_repositorys_folder(own: str) -> None:
    lines = f"hydra: {{searchpath: ['file://{CONF}']}}", "defaults: [weighting: flat, _self_]", "training: ${weighting}"
    (Path(own) / "train.yaml").write_text("\n".join(lines))
    check_overrides(["--config-path", own, "weighting.height=1", "weighting=flat"], CONF)
    with pytest.raises(ValueError, match=r"there is no key trainer\.max_steps"):
        check_overrides(["--config-path", own, "trainer.max_steps=1"], CONF)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--config-dir {} weighting=flatt", "weighting=flatt does not exist: did you mean flat?"),
        ("--config-dir {} weighting.height=3", "the key weighting.height exists only with weighting=flat"),
        ("--config-dir {}/nowhere weighting=flat", "--config-dir {}/nowhere is not a folder: give one that contains"),
        (
            "hydra.searchpath=['file://{}/nowhere']",
            "hydra.searchpath names {}/nowhere, which does not exist: give file:/",
        ),
        ("hydra.searchpath=[pkg://nowhere.conf]", "hydra.searchpath names nowhere.conf, which does not exist"),
    ],
)
def test_a_missing_folder_or_option_of_it_is_refused(line: str, message: str, own: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_overrides([word.format(own) for word in line.split()], CONF)
    assert str(refusal.value).startswith(message.format(own)) and "\n" not in str(refusal.value)


def test_a_job_of_a_sweep_names_its_config_sources(own: str) -> None:
    for words in ([], ["--config-dir", own], [f"hydra.searchpath=['file://{own}']"]):
        given = get_args(words)
        overrides = OverridesParser.create().parse_overrides(given.overrides)
        with config_sources(given, overrides, CONF):
            job = compose("train", overrides=given.overrides, return_hydra_config=True).hydra
        assert source_arguments(job, CONF) == words


# The packages of optimizers that ldm does not require.
PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}
CHOICES = [(e, g, o) for e in options("experiment") for g in ("lr", "ema", "optimizer") for o in options(g)]


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "group", "option"), CHOICES)
def test_settings_of_an_experiment_fit_every_option_of_their_group(experiment: str, group: str, option: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", overrides=[f"experiment={experiment}", f"{group}={option}", "run_dir=x"])[group]
    if "_target_" in (node or {}):
        built = instantiate(node, _convert_="all")
        if isinstance(built, partial):
            if option in PACKAGES:
                pytest.importorskip(PACKAGES[option])
            built([torch.nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in ("schedule", "weighting", "times") for o in options(g)])
def test_every_diffusion_option_builds_with_the_defaults_of_its_function(group: str, option: str) -> None:
    given = ["schedule.positions=64", "schedule.trained=64"] if option == "flow_at_resolution" else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", overrides=["experiment=emoji", f"{group}={option}", *given])[group]
    built = instantiate(node, _convert_="all")
    if group == "times":
        assert built == type(built)(built.schedule, **({"mean": 0.7} if option == "late" else {}))
    if group == "weighting":
        log_snr = torch.linspace(-20, 20, 9, dtype=torch.float64)
        assert torch.equal(built.weight(log_snr), WEIGHTINGS[option]().weight(log_snr))
    if group == "schedule" and not given:
        assert from_config(built.config).config == built.config
        settings = {} if "schedule" not in node else {"schedule": {"name": node.schedule._target_.rpartition(".")[2]}}
        settings |= {"shift": 2.0} if option == "snr_shift" else {}
        assert from_config({"name": option, **settings}).config == built.config


def test_schedules_can_be_nested_on_the_command_line() -> None:
    line = "schedule=zero_terminal_snr schedule@schedule.schedule=snr_shift schedule.schedule.shift=4"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        built = instantiate(compose("train", overrides=line.split()).schedule, _convert_="all")
    names = built.config["name"], built.config["schedule"]["name"], built.config["schedule"]["schedule"]["name"]
    assert names == ("zero_terminal_snr", "snr_shift", "cosine") and built.config["schedule"]["shift"] == 4


def test_a_suggestion_without_similar_names_lists_them_if_they_are_few() -> None:
    assert suggestion("zzz", ["a", "b"]) == "choose from a, b"
    assert suggestion("zzz", [f"key{i}" for i in range(31)]) == "python train.py --cfg job prints every key"


def test_a_key_without_a_default_must_be_given() -> None:
    node = {"data": {"shards": "???", "module": {"urls": "${data.shards}"}}, "given": 1}
    with pytest.raises(ValueError, match=r"^data.shards has no default: give data.shards=…$"):
        check_given(OmegaConf.create(node))
    with pytest.raises(ValueError, match=r"^training.start has no default: give training.start=…$"):
        check_given(composed("experiment=sd15_finetune", "data.root=x"))
    node["data"]["shards"] = None  # type: ignore[index]
    check_given(OmegaConf.create(node))


def test_the_run_folder_records_config_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "data.shards=a b"])
    save_run(OmegaConf.create({"a": {"b": 1}, "c": "${a.b}"}), tmp_path / "run")
    assert OmegaConf.load(tmp_path / "run" / "config.yaml") == {"a": {"b": 1}, "c": 1}
    assert (tmp_path / "run" / "command.txt").read_text().splitlines()[1:] == ["python train.py 'data.shards=a b'"]


def test_the_commands_of_a_run_and_its_resumptions_are_kept_with_their_dates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, argument in ((0, "seed=1"), (5, "resume=auto")):
        monkeypatch.setattr("sys.argv", ["train.py", argument])
        save_run(OmegaConf.create(), tmp_path, step)
    first, command, second, resumed = (tmp_path / "command.txt").read_text().splitlines()
    assert (command, resumed) == ("python train.py seed=1", "python train.py resume=auto")
    for line in (first, second):
        assert datetime.fromisoformat(line[2:27]).tzinfo is not None
    assert second.endswith(", resumed after step 5") and "resumed" not in first


def error_of(target: str, **how: object) -> Exception:
    try:
        instantiate({"_target_": target, **how})
    except HydraException as error:
        return error
    raise AssertionError("instantiation succeeded")


def test_an_error_wrapped_by_hydra_keeps_its_message() -> None:
    error = error_of("ldm.diffusion.schedule.Flow", shift=-1)
    assert isinstance(error, InstantiationException) and is_refusal(error)
    assert sentence(error) == "the flow schedule's shift is -1, but must be positive"


def test_an_unexpected_error_is_reported_with_its_config_key() -> None:
    node = OmegaConf.create({"schedule": {"_target_": "ldm.diffusion.schedule.Flow", "shift": "far"}})
    with pytest.raises(InstantiationException) as error:
        instantiate(node.schedule)
    assert sentence(error.value).startswith("schedule: TypeError: '<' not supported")


def test_an_unknown_argument_of_a_class_is_named() -> None:
    assert "'speed'" in sentence(error_of("ldm.diffusion.schedule.Flow", speed=2))


def test_a_message_is_formatted_on_one_line() -> None:
    assert sentence(ValueError("one\n  two")) == "one two"
    assert sentence(ValueError()) == "ValueError: "


@pytest.mark.parametrize(
    ("error", "refusal"), [(ValueError("x"), True), (FileNotFoundError("x"), True), (KeyError("x"), False)]
)
def test_only_expected_errors_are_reported_without_a_traceback(error: Exception, refusal: bool) -> None:
    assert is_refusal(error) == refusal
    assert sentence(error) == ("x" if refusal else "KeyError: 'x'")


def test_an_invalid_setting_exits_with_2_and_a_failure_with_1() -> None:
    with pytest.raises(UsageError) as refused, as_usage_error():
        check(composed("schedule=flow", "prediction=eps", "training.time=thousand"))
    invalid = error_of("ldm.diffusion.schedule.Flow", shift=-1), error_of("ldm.diffusion.schedule.Flow", speed=2)
    failed = error_of("ldm.weights.parts.first_stage", weights="/nowhere.safetensors"), ValueError("a corrupt file")
    assert [exit_code(error) for error in (refused.value, *invalid, *failed)] == [2, 2, 2, 1, 1]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=["name=test", "run_dir=runs/a", *overrides])


def test_a_run_of_a_sweep_is_named_by_the_settings_that_affect_its_result(tmp_path: Path) -> None:
    def name(*overrides: str, label: str = "seed=1") -> str:
        return sweep_folder(composed(*overrides), tmp_path, label).name

    same = name("seed=1")
    assert re.fullmatch(r"seed=1_[0-9a-f]{12}", same)
    elsewhere = "run_dir=runs/b", "logger=csv", "resume=auto", "callbacks.checkpoint.every_n_train_steps=7"
    assert name("seed=1", *elsewhere, "data.workers=2") == same
    others = name("seed=2"), name("seed=1", "schedule=cosine"), name("seed=1", "evaluation.prompts=7")
    assert len({same, *others}) == 4


def test_runs_of_a_sweep_that_start_from_other_checkpoints_are_distinct(tmp_path: Path) -> None:
    names = [sweep_folder(composed(f"resume={path}"), tmp_path, "x").name for path in ("a.ckpt", "b.ckpt", "auto")]
    assert len(set(names)) == 3


def test_an_existing_run_of_a_sweep_is_found_by_its_hash_and_not_its_label(tmp_path: Path) -> None:
    folder = sweep_folder(composed("seed=1"), tmp_path, "seed=1")
    folder.mkdir()
    assert sweep_folder(composed("seed=1"), tmp_path, "schedule=flow,seed=1") == folder
    assert sweep_folder(composed(), tmp_path, "a/b[c],d='e f'").name.startswith("a-b-c-,d=-e-f-_")


@pytest.mark.slow
def test_new_runs_of_a_sweep_are_marked_as_waiting_under_their_final_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    overrides = ["name=test", "seed=1,2,3", "prediction=flow,v", f"hydra.sweep.dir={tmp_path}"]
    cells = [(seed, kind) for seed in (1, 2, 3) for kind in ("flow", "v")]
    folders = [
        sweep_folder(composed(f"seed={seed}", f"prediction={kind}"), tmp_path, f"prediction={kind},seed={seed}")
        for seed, kind in cells
    ]
    folders[0].mkdir()
    left = waiting_mark(tmp_path / "of a sweep that was stopped")
    left.parent.mkdir()
    left.touch()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        WaitingMarks().on_multirun_start(loader.load_configuration("train", overrides, RunMode.MULTIRUN))
    assert {*(tmp_path / ".waiting").iterdir()} == {waiting_mark(folder) for folder in folders[1:]}
    assert is_locked(tmp_path)


def test_hyperparameters_list_each_chosen_setting_once() -> None:
    config = composed("schedule=cosine", "seed=3")
    logged = hyperparameters(OmegaConf.to_container(config))  # type: ignore[arg-type]
    assert logged["seed"] == 3 and logged["schedule._target_"] == "ldm.diffusion.schedule.cosine"
    assert "training.seed" not in logged and "run_dir" not in logged
    assert not [key for key in logged if key.startswith("callbacks")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("precision=16-mixed", "precision=16-mixed needs a GPU"),
        ("trainer.accelerator=mps", "trainer.accelerator=mps is not supported, because Apple's MPS has no float64"),
        ("trainer.accelerator=gpu", "trainer.accelerator=gpu needs a GPU, but torch finds none on this machine"),
        ("precision=bf16-true experiment=shapes_clip data.shards=x", "precision=bf16-true requires training=diffusion"),
        ("strategy=fsdp experiment=shapes_clip data.shards=x", "strategy=fsdp requires training=diffusion"),
        ("strategy=fsdp metrics=none", "optimizer=muon needs full matrices"),
        ("debug=batch_size", "use debug=plan, which computes what fits"),
        ("strategy=fsdp optimizer=adamw", "give metrics=none, and evaluate the run with ldm evaluate"),
    ],
)
def test_settings_that_the_device_or_fsdp_does_not_support_are_refused(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parallel(composed(*overrides.split()), gpu=False)


def test_the_largest_batch_of_a_distributed_recipe_is_searched_on_one_gpu() -> None:
    search = "experiment=laion_sd15", "debug=batch_size", "data.cache=x", "first_stage.weights=y"
    check_parallel(config := composed(*search), gpu=True)
    assert (config.trainer.strategy, config.trainer.devices, config.data.global_batch) == ("auto", 1, None)
    check_parallel(composed(*search, "trainer.devices=[1]"), gpu=True)
    for several in ("trainer.devices=8", "trainer.num_nodes=2", "strategy=ddp", "strategy=fsdp"):
        with pytest.raises(ValueError, match="debug=batch_size searches on one GPU"):
            check_parallel(composed(*search, several), gpu=True)


@pytest.mark.parametrize(("apple", "expected"), [(True, "cpu"), (False, "auto")])
def test_training_on_a_mac_runs_on_the_cpu_with_a_note(
    apple: bool, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    fill_in_settings(config := composed())
    assert config.trainer.accelerator == expected
    assert ("auto is taken as cpu, because Apple's MPS has no float64" in capsys.readouterr().err) == apple


@pytest.mark.parametrize("overrides", ["", "strategy=fsdp optimizer=adamw metrics=none precision=bf16-true"])
def test_settings_that_the_device_or_fsdp_supports_are_accepted(overrides: str) -> None:
    check_parallel(composed(*overrides.split()), gpu=False)
    check_parallel(composed("precision=16-mixed", *overrides.replace("precision=bf16-true", "").split()), gpu=True)


@pytest.mark.parametrize(
    ("accelerator", "gpu", "cpu", "expected"),
    [
        ("auto", None, {"avx2": True, "avx512_bf16": False, "amx_bf16": True}, "bf16-mixed"),
        ("auto", None, {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "32-true"),
        ("auto", True, {"avx2": True}, "bf16-mixed"),
        ("gpu", False, {"avx512_bf16": True}, "32-true"),
        ("cpu", True, {"avx2": True}, "32-true"),
    ],
)
def test_precision_auto_is_bfloat16_if_the_processor_has_instructions_for_it(
    accelerator: str, gpu: bool | None, cpu: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if gpu else (7, 5))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    config = composed("precision=auto", f"trainer.accelerator={accelerator}")
    assert config.trainer.precision == expected
    config.plan = True  # a plan assumes GPUs that support bfloat16
    assert config.trainer.precision == "bf16-mixed"


@pytest.mark.parametrize(
    ("option", "expected"),
    [("fp32", False), ("tf32", True), ("bf16-mixed", True), ("16-mixed", True), ("bf16-true", True)],
)
def test_float32_is_rounded_to_tf32_only_if_it_is_asked_for(option: str, expected: bool) -> None:
    assert uses_tf32(composed(f"precision={option}").precision) == expected


@pytest.mark.parametrize(
    ("accelerator", "devices", "world", "current"),
    [
        ("auto", 2, 2, [1]),
        ("gpu", "auto", 2, [1]),
        ("gpu", [2, 3], 2, [3]),
        ("cpu", 2, 2, []),
        ("auto", 1, 1, []),
    ],
)
def test_a_rank_takes_its_own_gpu_before_anything_is_built(
    accelerator: str, devices: Any, world: int, current: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in {"RANK": world - 1, "WORLD_SIZE": world, "LOCAL_RANK": world - 1}.items():
        monkeypatch.setenv(name, str(number))
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    take_own_gpu(OmegaConf.create({"accelerator": accelerator, "devices": devices}))
    assert taken == current


@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}])
def test_memory_blocks_may_grow_unless_the_user_configures_the_allocator(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    avoid_fragmentation()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == (None if given else "expandable_segments:True")


@pytest.mark.slow
def test_ddp_reduces_the_gradients_of_stable_diffusion_in_few_buckets() -> None:
    """At each boundary between buckets, torch.compile splits the network; PyTorch's default of 25 MB gives 69."""
    with torch.device("meta"):
        weights = list(UNet().parameters())
    sizes = [2**20, composed("strategy=ddp").strategy.name.bucket_cap_mb * 2**20]  # the first bucket is always small
    buckets, _ = dist._compute_bucket_assignment_by_size(weights[::-1], sizes, [False] * len(weights))
    assert len(buckets) == 16

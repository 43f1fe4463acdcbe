import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.commands.train.checks import check_given, check_parallel
from ldm.commands.train.messages import is_refusal, sentence
from ldm.commands.train.overrides import check_overrides, suggestion
from ldm.commands.train.run_folder import hyperparameters, save_run
from ldm.commands.train.sweep import WaitingMarks, sweep_folder, waiting_mark
from ldm.diffusion.schedule import from_config
from ldm.diffusion.weighting import WEIGHTINGS
from ldm.files import is_locked

CONF = Path(__file__).parents[3] / "conf"


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
        "~ema",
        "+trainer.inference_mode=false",
        "hydra.sweep.dir=x",
        "--cfg job",
        "-cn train seed=1",
        "metrics=none debug=plan",
        'callbacks.previews.prompts=["a red ring, left of a blue star"]',
    ],
)
def test_what_the_config_has_is_let_through(line: str) -> None:
    check_overrides([line] if '"' in line else line.split(), CONF)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("schedule=flo", "schedule=flo does not exist; did you mean flow?"),
        ("experiment=[shapes,emojy]", "experiment=emojy does not exist; did you mean emoji?"),
        ("-m sampler=ddim,eular", "sampler=eular does not exist; did you mean euler?"),
        ("shedule=flow", "there is no key shedule; did you mean schedule?"),
        ("trainer.max_step=3", "there is no key trainer.max_step; did you mean trainer.max_steps?"),
        ("optimiser.lr=1", "there is no key optimiser.lr; did you mean optimizer.lr?"),
        ("max_steps=3", "there is no key max_steps; did you mean trainer.max_steps?"),
        ("data.batchsize=3", "there is no key data.batchsize; did you mean data.batch_size?"),
        ("lr=constant lr.hold=0.1", "there is a key lr.hold only with lr=linear"),
        ("data.root=pictures", "there is a key data.root only with data=folder"),
        ("data=folder data.shards=x", "there is a key data.shards only with data="),
        ("shapes", "cannot read the arguments"),
        ("data.root=a=[", "cannot read the arguments"),
    ],
)
def test_what_it_lacks_is_refused_with_the_nearest_right_name(line: str, told: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_overrides(line.split(), CONF)
    assert str(refusal.value).startswith(told) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "+trainer.accumulate_grad_batches=4",
            "trainer.accumulate_grad_batches is not a setting here: set data.global_b",
        ),
        ("trainer.fast_dev_run=true", "trainer.fast_dev_run is not a setting here: choose debug=fast"),
        ("++trainer.logger=false", "trainer.logger is not a setting here: choose logger="),
        ("+trainer.extra=1", "there is no key trainer.extra; there are: accelerator, "),
        (
            "-m seed=1,2 run_dir=x",
            "run_dir is not a setting of a sweep: the folder of each run is named by its settings",
        ),
        ("hydra.mode=MULTIRUN seed=1,2 run_dir=x", "run_dir is not a setting of a sweep"),
        ("-m seed=1,2 hydra.sweep.subdir=x", "hydra.sweep.subdir is not a setting of a sweep"),
        (
            "resume=auto",
            "resume=auto resumes the run in run_dir, which would be a new folder each time: give",
        ),
        (
            "experiment=laion_sd15 data.cache=x first_stage.weights=y first_stage.config.scale=0.13",
            "first_stage.config.scale would be ignored, since the file first_stage.weights says it",
        ),
        (
            "experiment=laion_sd15 data.cache=x first_stage.weights=y text_encoder.config.width=32",
            "text_encoder.config.width would be ignored, since the file text_encoder.weights says it",
        ),
        ("+new=1", "+new=1 would be ignored, since nothing reads new under these settings: leave it out"),
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
def test_a_setting_that_would_be_ignored_is_refused(line: str, told: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_overrides(line.split(), CONF)
    assert str(refusal.value).startswith(told) and "\n" not in str(refusal.value)


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
        "hydra.run.dir=. hydra.job.name=train_ddp_process_1 hydra.output_subdir=null",  # Lightning's, for other ranks
        "-m seed=1,2 resume=auto",
        "resume=other.ckpt",
        "experiment=laion_sd15 data.cache=x first_stage.weights=untrained first_stage.config.scale=0.13",
        "experiment=laion_sd15 data.cache=x first_stage.weights=y text_encoder.weights=untrained "
        "text_encoder.config.width=32",
    ],
)
def test_an_added_setting_that_something_reads_is_let_through(line: str) -> None:
    check_overrides(line.split(), CONF)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("trainer.max_steps=abc", "trainer.max_steps is abc, but must be a whole number, such as 940"),
        ("data.batch_size=x", "data.batch_size is x, but must be a whole number, such as 64"),
        ("data.batch_size=1.5", "data.batch_size is 1.5, but must be a whole number"),
        ("data.batch_size=true", "data.batch_size is True, but must be a whole number"),
        ("optimizer.lr=fast", "optimizer.lr is fast, but must be a number, such as 0.004"),
        ("optimizer.lr='1e-3'", "optimizer.lr is 1e-3, but must be a number"),
        ("ema.decay=true", "ema.decay is True, but must be a number"),
        ("model.multipliers=wide", "model.multipliers is wide, but must be a list, such as [1, 2]"),
        ("training.stratified=maybe", "training.stratified is maybe, but must be true or false, such as false"),
        ("++sampler.steps=many", "sampler.steps is many, but must be a whole number"),
        ("-m data.batch_size=8,x", "data.batch_size is x, but must be a whole number"),
        ("lr=linear lr.hold=x", "lr.hold is x, but must be a number, such as 0.5"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(line: str, told: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_overrides(line.split(), CONF)
    assert str(refusal.value).startswith(told) and "\n" not in str(refusal.value)


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
def test_a_value_that_may_be_meant_is_let_through(line: str) -> None:
    check_overrides(line.split(), CONF)


CHOICES = [(e, g, o) for e in options("experiment") for g in ("lr", "ema", "optimizer") for o in options(g)]


@pytest.mark.parametrize(("experiment", "group", "option"), CHOICES)
def test_an_experiment_sets_nothing_that_another_option_of_the_group_would_not_take(
    experiment: str, group: str, option: str
) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", overrides=[f"experiment={experiment}", f"{group}={option}", "run_dir=x"])[group]
    if "_target_" in (node or {}):
        built = instantiate(node, _convert_="all")
        if isinstance(built, partial):
            built([torch.nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in ("schedule", "weighting", "times") for o in options(g)])
def test_every_option_of_the_diffusion_builds_with_the_defaults_of_its_function(group: str, option: str) -> None:
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


def test_schedules_are_changed_and_changed_again_from_the_command_line() -> None:
    line = "schedule=zero_terminal_snr schedule@schedule.schedule=snr_shift schedule.schedule.shift=4"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        built = instantiate(compose("train", overrides=line.split()).schedule, _convert_="all")
    names = built.config["name"], built.config["schedule"]["name"], built.config["schedule"]["schedule"]["name"]
    assert names == ("zero_terminal_snr", "snr_shift", "cosine") and built.config["schedule"]["shift"] == 4


def test_where_nothing_is_near_few_names_are_listed_and_many_are_not() -> None:
    assert suggestion("zzz", ["a", "b"]) == "there are: a, b"
    assert suggestion("zzz", [f"key{i}" for i in range(31)]) == "python train.py --cfg job prints every key"


def test_a_key_without_a_default_must_be_given() -> None:
    node = {"data": {"shards": "???", "module": {"urls": "${data.shards}"}}, "given": 1}
    with pytest.raises(ValueError, match=r"^data.shards has no default; give it as data.shards=…$"):
        check_given(OmegaConf.create(node))
    node["data"]["shards"] = None  # type: ignore[index]
    check_given(OmegaConf.create(node))


def test_a_run_folder_says_what_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "data.shards=a b"])
    save_run(OmegaConf.create({"a": {"b": 1}, "c": "${a.b}"}), tmp_path / "run")
    assert OmegaConf.load(tmp_path / "run" / "config.yaml") == {"a": {"b": 1}, "c": 1}
    assert (tmp_path / "run" / "command.txt").read_text() == "python train.py 'data.shards=a b'\n"


def error_of(target: str, **how: object) -> Exception:
    try:
        instantiate({"_target_": target, **how})
    except HydraException as error:
        return error
    raise AssertionError("it was built")


def test_what_hydra_wraps_is_told_as_it_was_said() -> None:
    error = error_of("ldm.diffusion.schedule.Flow", shift=-1)
    assert isinstance(error, InstantiationException) and is_refusal(error)
    assert sentence(error) == "the flow schedule's shift is -1, but must be positive"


def test_an_error_that_was_not_written_for_people_is_told_with_its_key() -> None:
    node = OmegaConf.create({"schedule": {"_target_": "ldm.diffusion.schedule.Flow", "shift": "far"}})
    with pytest.raises(InstantiationException) as error:
        instantiate(node.schedule)
    assert sentence(error.value).startswith("schedule: TypeError: '<' not supported")


def test_a_setting_that_a_class_does_not_have_is_named() -> None:
    assert "'speed'" in sentence(error_of("ldm.diffusion.schedule.Flow", speed=2))


def test_a_sentence_is_one_line() -> None:
    assert sentence(ValueError("one\n  two")) == "one two"
    assert sentence(ValueError()) == "ValueError: "


@pytest.mark.parametrize(
    ("error", "refusal"), [(ValueError("x"), True), (FileNotFoundError("x"), True), (KeyError("x"), False)]
)
def test_only_messages_written_for_people_go_without_a_traceback(error: Exception, refusal: bool) -> None:
    assert is_refusal(error) == refusal
    assert sentence(error) == ("x" if refusal else "KeyError: 'x'")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=["name=test", "run_dir=runs/a", *overrides])


def test_a_sweeps_run_is_named_by_what_decides_its_result(tmp_path: Path) -> None:
    def name(*overrides: str, label: str = "seed=1") -> str:
        return sweep_folder(composed(*overrides), tmp_path, label).name

    same = name("seed=1")
    assert re.fullmatch(r"seed=1_[0-9a-f]{12}", same)
    elsewhere = "run_dir=runs/b", "logger=csv", "resume=auto", "callbacks.checkpoint.every_n_train_steps=7"
    assert name("seed=1", *elsewhere, "data.workers=2") == same
    others = name("seed=2"), name("seed=1", "schedule=cosine"), name("seed=1", "evaluation.prompts=7")
    assert len({same, *others}) == 4


def test_runs_of_a_sweep_that_start_from_other_checkpoints_are_others(tmp_path: Path) -> None:
    names = [sweep_folder(composed(f"resume={path}"), tmp_path, "x").name for path in ("a.ckpt", "b.ckpt", "auto")]
    assert len(set(names)) == 3


def test_a_run_that_is_there_already_is_found_by_its_content_and_not_its_label(tmp_path: Path) -> None:
    folder = sweep_folder(composed("seed=1"), tmp_path, "seed=1")
    folder.mkdir()
    assert sweep_folder(composed("seed=1"), tmp_path, "schedule=flow,seed=1") == folder
    assert sweep_folder(composed(), tmp_path, "a/b[c],d='e f'").name.startswith("a-b-c-,d=-e-f-_")


def test_the_runs_of_a_sweep_that_are_not_there_wait_under_the_names_that_they_will_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    overrides = ["name=test", "seed=1,2,3", "prediction=flow,v", f"hydra.sweep.dir={tmp_path}"]
    cells = [(seed, kind) for seed in (1, 2, 3) for kind in ("flow", "v")]
    folders = [
        sweep_folder(
            composed(f"seed={seed}", f"prediction={kind}"), tmp_path, f"prediction={kind},seed={seed},name=test"
        )
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


def test_hyperparameters_are_what_was_chosen_and_each_is_told_once() -> None:
    config = composed("schedule=cosine", "seed=3")
    told = hyperparameters(OmegaConf.to_container(config))  # type: ignore[arg-type]
    assert told["seed"] == 3 and told["schedule._target_"] == "ldm.diffusion.schedule.cosine"
    assert "training.seed" not in told and "run_dir" not in told
    assert not [key for key in told if key.startswith("callbacks")]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("precision=16-mixed", "precision=16-mixed needs a GPU"),
        ("precision=bf16-true experiment=shapes_clip data.shards=x", "precision=bf16-true is for training=diffusion"),
        ("strategy=fsdp experiment=shapes_clip data.shards=x", "strategy=fsdp is for training=diffusion"),
        ("strategy=fsdp metrics=none", "optimizer=muon needs whole matrices"),
        ("debug=batch_size", "use debug=plan, which computes what fits"),
        ("strategy=fsdp optimizer=adamw", "give metrics=none, and measure the run with ldm evaluate"),
    ],
)
def test_what_the_device_or_sharding_cannot_do_is_refused(overrides: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_parallel(composed(*overrides.split()), gpu=False)


@pytest.mark.parametrize("overrides", ["", "strategy=fsdp optimizer=adamw metrics=none precision=bf16-true"])
def test_what_they_can_do_is_not(overrides: str) -> None:
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
def test_precision_auto_is_what_the_processor_has_instructions_for(
    accelerator: str, gpu: bool | None, cpu: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if gpu else (7, 5))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    config = composed("precision=auto", f"trainer.accelerator={accelerator}")
    assert config.trainer.precision == expected
    config.plan = True  # of GPUs, which have them
    assert config.trainer.precision == "bf16-mixed"

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldm.config import check_given, check_overrides, is_refusal, nearest, save_run, sentence
from ldm.diffusion.schedule import from_config
from ldm.diffusion.weighting import WEIGHTINGS

CONF = Path(__file__).parents[1] / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "trainer.max_steps=3 trainer.limit_train_batches=5 data.batch_size=4",
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
        "+trainer.model_registry=x",
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


CHOICES = [(e, g, o) for e in options("experiment") for g in ("lr", "ema", "optimizer") for o in options(g)]


@pytest.mark.parametrize(("experiment", "group", "option"), CHOICES)
def test_an_experiment_sets_nothing_that_another_option_of_the_group_would_not_take(
    experiment: str, group: str, option: str
) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", overrides=[f"experiment={experiment}", f"{group}={option}"])[group]
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
    assert nearest("zzz", ["a", "b"]) == "there are: a, b"
    assert nearest("zzz", [f"key{i}" for i in range(31)]) == "python train.py --cfg job prints every key"


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

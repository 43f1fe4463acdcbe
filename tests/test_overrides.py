from pathlib import Path

import pytest

from ldm.overrides import check_overrides, nearest

CONF = Path(__file__).parents[1] / "conf"


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


def test_where_nothing_is_near_few_names_are_listed_and_many_are_not() -> None:
    assert nearest("zzz", ["a", "b"]) == "there are: a, b"
    assert nearest("zzz", [f"key{i}" for i in range(31)]) == "python train.py --cfg job prints every key"

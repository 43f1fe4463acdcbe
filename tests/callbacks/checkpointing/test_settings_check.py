from pathlib import Path
from typing import Any

import pytest

from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.checkpointing.settings_check import SettingsCheck, differences
from tests.callbacks.tiny import Batches, Tiny, trainer

SETTINGS = {
    "optimizer": {"lr": 0.1},
    "lr": {"_target_": "ldm.training.optim.cosine"},
    "callbacks": {"checkpoint": {"keep": 2}},
    "trainer": {"max_steps": 4, "devices": 1, "gradient_clip_val": 1.0},
    "first_stage": {"weights": "a.safetensors"},
    "data": {"batch_size": 8, "shards": "a.tar"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, SettingsCheck(SETTINGS, SETTINGS), Checkpoint(folder)).fit(Tiny(), Batches())
    return folder / "last.ckpt"


def resume(checkpoint: Path, accepted: bool = False, **changed: Any) -> None:
    settings = SETTINGS | {group: SETTINGS.get(group, {}) | values for group, values in changed.items()}
    callback = SettingsCheck(settings, settings, accepted)
    trainer(checkpoint.parent, callback, max_steps=5).fit(Tiny(), Batches(), ckpt_path=checkpoint)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": {"lr": 0.2}}, "optimizer.lr 0.1 → 0.2"),
        ({"trainer": {"max_steps": 5}}, "trainer.max_steps 4 → 5"),
        ({"trainer": {"max_epochs": 2}}, "trainer.max_epochs None → 2"),
        ({"trainer": {"gradient_clip_val": 0.5}}, "trainer.gradient_clip_val 1.0 → 0.5"),
        ({"data": {"shards": "b.tar"}}, "data.shards a.tar → b.tar"),
        ({"ema": {"decay": 0.5}}, "ema.decay None → 0.5"),
    ],
)
def test_a_change_that_affects_the_weights_is_refused_unless_accepted(
    run: Path, changed: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=rf"other settings \({message}\).*accept_changes=true"):
        resume(run, **changed)
    resume(run, accepted=True, **changed)
    assert f"since the checkpoint of step 4:\n  {message}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed",
    [
        {"callbacks": {"checkpoint": {"keep": 3}}},
        {"trainer": {"devices": 2}},
        {"first_stage": {"weights": "moved/a.safetensors"}},
        {"data": {"batch_size": 4}},
        {"evaluation": {"prompts": 8}},
        {"optimizer": {"fused": None}},
    ],
)
def test_a_change_that_does_not_affect_the_weights_is_not_reported(
    run: Path, changed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    resume(run, **changed)
    assert "settings" not in capsys.readouterr().out


def test_only_the_changes_that_affect_the_weights_are_reported(run: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings \(optimizer.lr 0.1 → 0.2\)"):
        resume(run, optimizer={"lr": 0.2}, evaluation={"prompts": 8}, trainer={"devices": 2})


def test_a_run_that_would_end_before_its_checkpoint_is_refused(run: Path) -> None:
    callback = SettingsCheck(SETTINGS, SETTINGS)
    with pytest.raises(ValueError, match=r"trainer\.max_steps is 3, but the checkpoint is from step 4: give at least"):
        trainer(run.parent, callback, max_steps=3).fit(Tiny(), Batches(), ckpt_path=run)


def test_an_interpolation_of_the_old_value_is_not_a_change() -> None:
    now = SETTINGS | {"data": {"batch_size": 8, "shards": "${files}"}, "files": "b.tar"}
    before = {**SETTINGS, "files": "b.tar"}
    for shards, expected in (("b.tar", ["data.shards a.tar → ${files}"]), ("a.tar", [])):
        resolved = now | {"data": {"batch_size": 8, "shards": shards}}
        assert differences(before, now, resolved) == expected


def test_more_steps_are_not_a_change_if_the_learning_rate_is_constant(tmp_path: Path) -> None:
    settings = SETTINGS | {"lr": {"_target_": "ldm.training.optim.constant"}}
    trainer(tmp_path, SettingsCheck(settings, settings), Checkpoint(tmp_path)).fit(Tiny(), Batches())
    more = settings | {"trainer": {**SETTINGS["trainer"], "max_steps": 5}}
    longer = SettingsCheck(more, more)
    run = trainer(tmp_path, longer, max_steps=5)
    run.fit(Tiny(), Batches(), ckpt_path=tmp_path / "last.ckpt")
    assert run.global_step == 5


def test_a_checkpoint_without_settings_is_resumed_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, Checkpoint(tmp_path)).fit(Tiny(), Batches())
    resume(tmp_path / "last.ckpt")
    assert "older layout without settings" in capsys.readouterr().out


def test_a_setting_renamed_since_version_0_1_is_not_a_change() -> None:
    models = {"model": {"width": 8}, "other": {"width": 8}}
    old = models | {"training": {"unet": "${model}"}}
    same, other = (models | {"training": {"backbone": f"${{{name}}}"}} for name in ("model", "other"))
    assert differences(old, same, same) == []
    changed = differences(old, other, other)
    assert changed == ["training.backbone ${model} → ${other}"]


@pytest.mark.parametrize("empty", [None, {}])  # Hydra turns null in a config file into {}
def test_a_new_interpolation_of_a_null_setting_is_not_a_change(empty: Any) -> None:
    now = {"adapter": empty, "training": {"adapter": "${adapter}"}}
    assert differences({}, now, now) == []


def test_a_new_interpolation_of_a_given_setting_is_a_change() -> None:
    now = {"adapter": {"_target_": "ldm.adapters.train_only.TrainOnly"}, "training": {"adapter": "${adapter}"}}
    assert differences({}, now, now) == ["adapter._target_ None → ldm.adapters.train_only.TrainOnly"]


def test_a_checkpoint_without_a_recorded_split_uses_the_earlier_split() -> None:
    for now, expected in (("crc32", []), ("mixed", ["data.split_hash crc32 → mixed"])):
        settings = {"data": {"split_hash": now}}
        assert differences({"data": {}}, settings, settings) == expected
    assert differences({"data": {}}, {"data": {}}, {"data": {}}) == []

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
    ("changed", "told"),
    [
        ({"optimizer": {"lr": 0.2}}, "optimizer.lr 0.1 → 0.2"),
        ({"trainer": {"max_steps": 5}}, "trainer.max_steps 4 → 5"),
        ({"trainer": {"max_epochs": 2}}, "trainer.max_epochs None → 2"),
        ({"trainer": {"gradient_clip_val": 0.5}}, "trainer.gradient_clip_val 1.0 → 0.5"),
        ({"data": {"shards": "b.tar"}}, "data.shards a.tar → b.tar"),
        ({"ema": {"decay": 0.5}}, "ema.decay None → 0.5"),
    ],
)
def test_a_change_that_leads_elsewhere_is_shown_and_refused_unless_it_is_accepted(
    run: Path, changed: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=rf"other settings \({told}\).*accept_changes=true"):
        resume(run, **changed)
    resume(run, accepted=True, **changed)
    assert f"since the checkpoint of step 4:\n  {told}\n" in capsys.readouterr().out


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
def test_a_change_that_decides_no_weight_is_not_spoken_of(
    run: Path, changed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    resume(run, **changed)
    assert "settings" not in capsys.readouterr().out


def test_beside_a_change_that_leads_elsewhere_others_are_not_told(run: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings \(optimizer.lr 0.1 → 0.2\)"):
        resume(run, optimizer={"lr": 0.2}, evaluation={"prompts": 8}, trainer={"devices": 2})


def test_a_run_that_is_to_end_before_its_checkpoint_is_refused(run: Path) -> None:
    callback = SettingsCheck(SETTINGS, SETTINGS)
    with pytest.raises(ValueError, match=r"trainer\.max_steps is 3, but the checkpoint is of step 4: give at least"):
        trainer(run.parent, callback, max_steps=3).fit(Tiny(), Batches(), ckpt_path=run)


def test_a_setting_that_now_refers_to_its_old_value_has_not_changed() -> None:
    now = SETTINGS | {"data": {"batch_size": 8, "shards": "${files}"}, "files": "b.tar"}
    before = {**SETTINGS, "files": "b.tar"}
    for shards, told in (("b.tar", ["data.shards a.tar → ${files}"]), ("a.tar", [])):
        resolved = now | {"data": {"batch_size": 8, "shards": shards}}
        assert differences(before, now, resolved) == told


def test_more_steps_are_no_change_where_the_rate_is_constant(tmp_path: Path) -> None:
    settings = SETTINGS | {"lr": {"_target_": "ldm.training.optim.constant"}}
    trainer(tmp_path, SettingsCheck(settings, settings), Checkpoint(tmp_path)).fit(Tiny(), Batches())
    more = settings | {"trainer": {**SETTINGS["trainer"], "max_steps": 5}}
    longer = SettingsCheck(more, more)
    run = trainer(tmp_path, longer, max_steps=5)
    run.fit(Tiny(), Batches(), ckpt_path=tmp_path / "last.ckpt")
    assert run.global_step == 5


def test_a_checkpoint_of_an_older_layout_is_gone_on_from_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, Checkpoint(tmp_path)).fit(Tiny(), Batches())
    resume(tmp_path / "last.ckpt")
    assert "older layout without settings" in capsys.readouterr().out


def test_a_setting_that_only_has_another_name_since_version_0_1_is_unchanged() -> None:
    models = {"model": {"width": 8}, "other": {"width": 8}}
    old = models | {"training": {"unet": "${model}"}}
    same, other = (models | {"training": {"backbone": f"${{{name}}}"}} for name in ("model", "other"))
    assert differences(old, same, same) == []
    changed = differences(old, other, other)
    assert changed == ["training.backbone ${model} → ${other}"]


@pytest.mark.parametrize("nothing", [None, {}])  # of which Hydra makes the latter where a file says null
def test_a_new_reference_to_a_setting_that_is_null_changes_nothing(nothing: Any) -> None:
    now = {"adapter": nothing, "training": {"adapter": "${adapter}"}}
    assert differences({}, now, now) == []


def test_a_new_reference_to_a_setting_that_is_set_is_a_change() -> None:
    now = {"adapter": {"_target_": "ldm.adapters.train_only.TrainOnly"}, "training": {"adapter": "${adapter}"}}
    assert differences({}, now, now) == ["adapter._target_ None → ldm.adapters.train_only.TrainOnly"]

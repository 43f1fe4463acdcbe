import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.runs import TINY
from tests.train.processes import finish, read, start


@pytest.mark.slow
def test_a_sweep_with_a_failed_job_runs_the_others_and_skips_finished_runs(tmp_path: Path) -> None:
    joblib = "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", f"hydra.sweep.dir={tmp_path}"
    sweep = *TINY, "-m", "model.context_width=17,128", "trainer.max_steps=1", "metrics=none", *joblib
    run = finish(start(*sweep))
    assert run.returncode == 1
    assert re.search(
        rf"error: {tmp_path}/\S+: the unet reads text of width 17, but the text encoder gives text of width 128",
        run.stderr,
    ), run.stderr
    assert "Traceback" not in run.stderr
    (folder,) = (path.parent for path in tmp_path.glob("*/config.yaml"))
    assert read(folder)["global_step"] == 1
    assert [*(tmp_path / ".waiting").iterdir()] == []
    command = (folder / "command.txt").read_text()
    assert {"model.context_width=128", f"run_dir='{folder}'", "resume='auto'"} <= {*shlex.split(command)}
    again = finish(start(*sweep))
    assert again.returncode == 1 and f"{folder} is already finished: skipped" in again.stdout


@pytest.mark.slow
def test_a_sweep_that_lacks_a_required_key_names_it() -> None:
    run = finish(start("-m", "experiment=emoji", "seed=0"))
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "data.shards has no default: give data.shards=…" in run.stderr


@pytest.mark.slow
def test_a_sweep_resumes_its_runs_that_were_stopped_by_the_time_limit(sweep: Any) -> None:
    limited = "seed=1,2", "trainer.max_steps=2", "trainer.max_time=00:00:00:00"
    for code, step in ((1, 1), (0, 2)):
        got, folders = sweep(*limited)
        assert got == code and [read(folder)["global_step"] for folder in folders] == [step, step]


@pytest.mark.slow
def test_a_sweep_started_from_a_checkpoint_resumes_from_its_own_checkpoints(
    here: Any, sweep: Any, tmp_path: Path
) -> None:
    here()
    start = f"resume={tmp_path}/checkpoints/last.ckpt", "trainer.max_steps=3", "trainer.max_time=00:00:00:00"
    for code, step in ((1, 2), (0, 3)):
        got, (folder,) = sweep("seed=0", *start)
        assert got == code and read(folder)["global_step"] == step

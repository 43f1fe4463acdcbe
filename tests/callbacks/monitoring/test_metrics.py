import hashlib
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.images.evaluation import Evaluation
from ldm.callbacks.monitoring.metrics import Metrics
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.data.loading.datamodule import collate
from ldm.data.sources.shapes import Shapes
from ldm.diffusion.schedule import Flow
from ldm.diffusion.time_sampling import LogitNormal
from ldm.diffusion.weighting import min_snr
from ldm.metrics.provenance import Provenance
from tests.callbacks.images.test_evaluation import features
from tests.callbacks.logged import Logged
from tests.callbacks.painted import Painter
from tests.training import test_autoencoder
from tests.training.tiny import Images, diffusion, fit

VALIDATED = {"val_check_interval": 2, "check_val_every_n_epoch": None}
LOSS = "val/pictures/loss"


def train(folder: Path, steps: int, *callbacks: Any, resume: Path | None = None, **how: Any) -> Any:
    """Returns metrics.json of a run that validates after every second batch."""
    chosen = [*callbacks, Metrics(folder, seed=7), Checkpoint(folder)]
    settings = VALIDATED | {"enable_checkpointing": True} | how
    fit(folder, settings.pop("module", None) or diffusion(), steps, resume, callbacks=chosen, **settings)
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_without_images_records_its_validation_and_provenance(tmp_path: Path) -> None:
    logger = Logged()
    report = train(tmp_path, 4, EMA(0.75), Throughput(), logger=logger)
    assert report["metrics"].keys() == {LOSS, "images_per_second", "training_seconds"}
    assert report["metrics"][LOSS] == logger.rows[3][LOSS] != logger.rows[1][LOSS]
    about = report["provenance"]
    assert about.keys() == Provenance(None, 4, 7, 1, "", "", "").plain().keys()
    assert (about["steps"], about["validated"], about["seed"], about["ranks"]) == (4, 4, 7, 1)
    assert about["ema"] == {"decay": 0.75, "warmup": True, "updates": 4}
    assert (about["dtype"], about["device"], about["prompts"]) == ("32-true", "cpu", None)


def test_the_metrics_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss = train(tmp_path, 2)["metrics"][LOSS]
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed[LOSS]) == pytest.approx(loss, rel=1e-3) and printed["files"] == str(tmp_path)


def test_the_provenance_identifies_the_validation_samples_and_the_loss(tmp_path: Path) -> None:
    how = {"schedule": Flow(3.0), "times": LogitNormal(Flow(3.0), 0.5), "weighting": min_snr(4.0), "huber": 0.5}
    provenance = train(tmp_path, 2, module=diffusion(**how))["provenance"]["sets"]["pictures"]
    samples = [Images(6, seed=1)[index] for index in range(6)]
    rows = [b"torch.uint8 [3, 8, 8]" + s["image"].numpy().tobytes() + s["caption"].encode() for s in samples]
    total = sum(int.from_bytes(hashlib.sha256(row).digest()) for row in rows) % 2**256
    assert provenance == {
        "count": 6,
        "sha256": f"{total:064x}",
        "schedule": {"name": "flow", "shift": 3.0},
        "prediction": "flow",
        "times": {"name": "LogitNormal", "mean": 0.5, "std": 1.0},
        "weighting": {"name": "min_snr", "gamma": 4.0},
        "offset_noise": 0.0,
        "huber": 0.5,
        "first_stage": "v",
    }


def test_samples_beyond_limit_val_batches_are_not_counted(tmp_path: Path) -> None:
    sets = [train(tmp_path / str(n), 2, limit_val_batches=n)["provenance"]["sets"]["pictures"] for n in (1, 2)]
    assert [validated["count"] for validated in sets] == [4, 6] and sets[0]["sha256"] != sets[1]["sha256"]


def test_a_validation_before_the_end_keeps_its_step_across_a_resume(tmp_path: Path) -> None:
    first = train(tmp_path, 3)
    assert (first["provenance"]["steps"], first["provenance"]["validated"]) == (3, 2)
    again = train(tmp_path, 5, resume=tmp_path / "last.ckpt", val_check_interval=100)
    assert (again["provenance"]["steps"], again["provenance"]["validated"]) == (5, 2)
    assert again["metrics"] == first["metrics"]


def test_a_run_that_never_validated_records_only_its_speed(tmp_path: Path) -> None:
    report = train(tmp_path, 2, Throughput(), limit_val_batches=0)
    assert report["metrics"].keys() == {"images_per_second", "training_seconds"}
    assert (report["provenance"]["validated"], report["provenance"]["sets"]) == (None, None)


def test_training_seconds_include_the_processes_before_a_resume(tmp_path: Path) -> None:
    first = train(tmp_path, 2, Throughput())["metrics"]
    second = Throughput()
    both = train(tmp_path, 4, second, resume=tmp_path / "last.ckpt")["metrics"]
    assert both["training_seconds"] == second.seconds > first["training_seconds"]
    assert both["images_per_second"] * both["training_seconds"] == pytest.approx(16)


def test_resuming_a_finished_run_keeps_metrics_json_or_restores_a_missing_one(tmp_path: Path) -> None:
    train(tmp_path, 4)
    written = (tmp_path / "metrics.json").read_bytes()
    first = json.loads(written)
    train(tmp_path, 4, resume=tmp_path / "last.ckpt")
    assert (tmp_path / "metrics.json").read_bytes() == written
    (tmp_path / "metrics.json").unlink()
    assert train(tmp_path, 4, resume=tmp_path / "last.ckpt")["metrics"] == first["metrics"]


def test_another_module_records_its_own_validation_metrics(tmp_path: Path) -> None:
    module = test_autoencoder.training()
    report = train(tmp_path, 2, module=module)
    assert report["metrics"].keys() == {"val/pictures/psnr"}
    assert report["provenance"]["sets"]["pictures"].keys() == {"count", "sha256"}


def evaluation(folder: Path, prompts: int) -> Evaluation:
    return Evaluation(folder, Shapes(0, "held_out", length=8), features(), prompts=prompts)


@pytest.mark.filterwarnings("ignore:FID from")
def test_evaluation_metrics_are_stored_together_with_validation_metrics(tmp_path: Path, painter: type[Painter]) -> None:
    module = diffusion(size=(64, 64))
    report = train(tmp_path, 2, evaluation(tmp_path, 4), module=module)
    assert {LOSS, "accuracy", "fid"} <= report["metrics"].keys()
    about = report["provenance"]
    assert about["prompts"]["count"] == 4 and about["sets"]["pictures"]["count"] == 6 and about["validated"] == 2


@pytest.mark.filterwarnings("ignore:FID from")
def test_a_finished_run_is_evaluated_when_it_is_resumed_with_prompts(tmp_path: Path, painter: type[Painter]) -> None:
    first = train(tmp_path, 2, evaluation(tmp_path, 0), module=diffusion(size=(64, 64)))
    assert "fid" not in first["metrics"] and not painter.calls
    last = tmp_path / "last.ckpt"
    again = train(tmp_path, 2, evaluation(tmp_path, 4), module=diffusion(size=(64, 64)), resume=last)
    assert "fid" in again["metrics"] and again["metrics"][LOSS] == first["metrics"][LOSS]
    painter.calls.clear()
    assert train(tmp_path, 2, evaluation(tmp_path, 4), module=diffusion(size=(64, 64)), resume=last) == again
    assert not painter.calls


def test_the_validation_loss_is_computed_with_the_ema_weights(tmp_path: Path) -> None:
    ema, module = EMA(0.5), diffusion()
    loss = train(tmp_path, 2, ema, module=module)["metrics"][LOSS]
    samples = [Images(6, seed=1)[index] for index in range(6)]
    images = {**collate(samples), "draw": torch.zeros(6).long()}
    with ema.swapped(module):
        averaged = module.losses(images)[1].tolist()
    raw = module.losses(images)[1].tolist()
    assert loss == pytest.approx(fmean(averaged), rel=1e-5) and loss != pytest.approx(fmean(raw), rel=1e-3)

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.callbacks.averages.ema import EMA
from ldm.callbacks.checkpointing.checkpoint import Checkpoint
from ldm.callbacks.images.evaluation import Evaluation
from ldm.callbacks.monitoring.throughput import Throughput
from ldm.data.sources.phrasing import parse
from ldm.data.sources.shapes import Shapes, held_out_prompts
from ldm.files import write_json
from ldm.image import pixels, read_metadata
from ldm.metrics.composition import accuracy
from ldm.metrics.features import ClipFeatures
from ldm.metrics.fid import fid
from ldm.metrics.provenance import image_hash, text_hash
from ldm.nn.clip import ImageTower
from tests.callbacks.painted import Model, Painter
from tests.callbacks.tiny import Batches, trainer

pytestmark = pytest.mark.filterwarnings("ignore:FID from")


def features() -> ClipFeatures:
    torch.manual_seed(0)
    return ClipFeatures(ImageTower(64, 32, 8, 1, 2))


def evaluate(folder: Path, *callbacks: Any, reference: Dataset[Any] | None = None, **settings: Any) -> dict[str, Any]:
    reference = reference or Shapes(0, "held_out", length=20)
    defaults = {"prompts": 16, "count": 20, "batch_size": 6}
    evaluation = Evaluation(folder, reference, features(), **(defaults | settings))
    trainer(folder, *callbacks, evaluation).fit(Model(), Batches())
    return json.loads((folder / "metrics.json").read_text())


def test_images_of_held_out_prompts_are_checked_against_them(tmp_path: Path, painter: type[Painter]) -> None:
    metrics = evaluate(tmp_path)["metrics"]
    prompts = held_out_prompts(16)
    assert [prompt for call in painter.calls for prompt in call[0]] == prompts
    assert [seed for call in painter.calls for seed in call[1]] == list(range(16))
    painted = torch.stack([painter(None).paint(prompt, seed) for seed, prompt in enumerate(prompts)])
    expected = accuracy(painted, prompts)
    assert metrics["accuracy"] == expected["accuracy"] > 0.9
    assert metrics["accuracy_color"] == expected["color"]


def test_prompts_with_an_unseen_pair_are_counted_separately(tmp_path: Path, painter: type[Painter]) -> None:
    wrong = "a big red ring on a gray background"  # no unseen pair
    painter.understood = staticmethod(lambda prompt: wrong if parse(prompt).split == "unseen" else prompt)
    metrics = evaluate(tmp_path)["metrics"]
    assert (metrics["accuracy_seen"], metrics["accuracy_unseen"]) == (1, 0)
    assert metrics["accuracy"] == 14 / 16


def test_fid_compares_with_the_first_images_of_the_reference(tmp_path: Path, painter: type[Painter]) -> None:
    value = evaluate(tmp_path)["metrics"]["fid"]
    reference = Shapes(0, "held_out", length=20)
    real = torch.stack([reference[i]["image"] for i in range(20)])
    generated = [painter(None).paint(prompt, seed) for seed, prompt in enumerate(held_out_prompts(16))]
    assert value == pytest.approx(fid([real], [torch.stack(generated)], features()), rel=1e-3)


def test_without_composition_the_prompts_are_the_captions_of_the_reference(
    tmp_path: Path, painter: type[Painter]
) -> None:
    reference = Shapes(3, "train", length=9)
    result = evaluate(tmp_path, reference=reference, composition=False)
    assert [p for call in painter.calls for p in call[0]] == [reference[i]["caption"] for i in range(9)]
    assert "accuracy" not in result["metrics"] and result["metrics"]["fid"] > 0
    assert result["provenance"]["prompts"]["count"] == result["provenance"]["reference"]["count"] == 9


def test_the_provenance_has_everything_needed_to_repeat_the_evaluation(tmp_path: Path, painter: type[Painter]) -> None:
    result = evaluate(tmp_path, EMA(0.75), Throughput(), seed=100)
    provenance = result["provenance"]
    assert provenance["sampling"] == {**Model.sampling, "size": [64, 64]}
    assert provenance["prompts"]["seeds"] == [100, 115]
    assert provenance["ema"] == {"decay": 0.75, "warmup": True, "updates": 4}
    assert (provenance["steps"], provenance["seed"], provenance["torch"]) == (4, 5, torch.__version__)
    assert provenance["features"] == features().fingerprint
    assert result["metrics"]["images_per_second"] > 0


def test_the_provenance_identifies_the_data_and_the_feature_network(tmp_path: Path, painter: type[Painter]) -> None:
    provenance = evaluate(tmp_path)["provenance"]
    reference = Shapes(0, "held_out", length=20)
    digest = image_hash(torch.stack([reference[i]["image"] for i in range(20)]))
    assert provenance["reference"]["sha256"] == f"{digest:064x}"
    assert provenance["prompts"]["sha256"] == text_hash(held_out_prompts(16))
    assert provenance["feature_network"] == features().about
    assert (provenance["dtype"], provenance["ranks"], provenance["size"]) == ("32-true", 1, [64, 64])


def test_kid_precision_and_recall_are_computed_together_with_fid(tmp_path: Path, painter: type[Painter]) -> None:
    metrics = evaluate(tmp_path, resamples=3)["metrics"]
    assert {"fid", "kid", "precision", "recall", "fid_error", "kid_error"} <= metrics.keys()


def test_the_first_images_are_saved_as_tiles_for_ldm_compare(tmp_path: Path, painter: type[Painter]) -> None:
    evaluate(tmp_path, seed=3)
    about = read_metadata(tmp_path / "samples" / "tiles.png")
    assert about == {"captions": held_out_prompts(16), "seed": 3, "size": [64, 64]}
    with Image.open(tmp_path / "samples" / "tiles.png") as sheet:
        second = pixels(sheet.crop((64, 0, 128, 64)))
    assert torch.equal(second, painter(None).paint(held_out_prompts(2)[1], 4))


def test_too_few_images_for_fid_and_kid_cause_a_warning(tmp_path: Path, painter: type[Painter]) -> None:
    with pytest.warns(UserWarning, match="FID, KID, precision and recall are skipped: .* not 3 generated and 20 real"):
        metrics = evaluate(tmp_path, prompts=3)["metrics"]
    assert "fid" not in metrics and "accuracy" in metrics


def test_an_evaluation_prints_a_table_and_saves_a_grid(
    tmp_path: Path, painter: type[Painter], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(tmp_path, Throughput())
    printed = capsys.readouterr()
    names = [line.split()[0] for line in printed.out.splitlines()]
    parts = ["color", "shape", "size", "relation", "background", "count", "seen", "unseen"]
    assert names == ["accuracy", *parts, "FID", "training", "sampling", "files"]
    assert "sampling: 16/16 images" in printed.err
    with Image.open(tmp_path / "samples" / "final.png") as sheet:
        assert sheet.width > 4 * 64


def test_a_run_stopped_before_its_evaluation_is_evaluated_when_resumed(tmp_path: Path, painter: type[Painter]) -> None:
    ema = EMA(0.5)
    trainer(tmp_path, ema, Checkpoint(tmp_path)).fit(Model(), Batches())
    evaluation = Evaluation(tmp_path, Shapes(0, "held_out", length=4), features(), prompts=2)
    again = trainer(tmp_path, EMA(0.5), Throughput(), evaluation)
    again.fit(Model(), Batches(), ckpt_path=tmp_path / "last.ckpt")
    assert json.loads((tmp_path / "metrics.json").read_text())["provenance"]["steps"] == 4
    averages = torch.cat([average.flatten() for average in ema.averages.values()])
    assert torch.equal(painter.calls[0][2], averages)


def test_metrics_of_an_earlier_step_do_not_prevent_an_evaluation(tmp_path: Path, painter: type[Painter]) -> None:
    trainer(tmp_path, Checkpoint(tmp_path)).fit(Model(), Batches())
    for measured, calls in ((2, 1), (4, 0)):
        write_json(tmp_path / "metrics.json", {"metrics": {}, "provenance": {"steps": measured}})
        painter.calls.clear()
        evaluation = Evaluation(tmp_path, Shapes(0, "held_out", length=4), features(), prompts=2)
        trainer(tmp_path, evaluation).fit(Model(), Batches(), ckpt_path=tmp_path / "last.ckpt")
        assert len(painter.calls) == calls


def test_without_prompts_nothing_is_generated_or_written(tmp_path: Path, painter: type[Painter]) -> None:
    evaluation = Evaluation(tmp_path, Shapes(length=9), features(), prompts=0)
    trainer(tmp_path, evaluation).fit(Model(), Batches())
    assert not painter.calls and not (tmp_path / "metrics.json").exists()

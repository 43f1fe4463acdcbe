from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.evaluation.run import EvaluationJob, collect, measure
from ldm.metrics.features import ClipFeatures
from ldm.metrics.measure import ImageMetrics
from ldm.nn.clip import ImageTower
from ldm.pipeline.pipeline import Pipeline
from tests.tiny import save_tiny_model

CAPTIONS = ["red circle", "blue square", "a red square on white background"]


def captions(ids: range) -> list[str]:
    return [CAPTIONS[i % 3] for i in ids]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.load(str(save_tiny_model(tmp_path_factory.mktemp("model"))), "cpu")


@pytest.fixture(scope="module")
def image_metrics() -> ImageMetrics:
    torch.manual_seed(0)
    return ImageMetrics(ClipFeatures(ImageTower(16, 16, 8, 1, 2)))


@pytest.fixture
def job(tmp_path: Path, pipeline: Pipeline) -> EvaluationJob:
    return EvaluationJob(
        tmp_path / "job", captions, count=7, batch=3, seed=10, settings=replace(pipeline.settings, steps=2)
    )


def run(batches: Iterator[int]) -> list[int]:
    return list(batches)


def test_each_row_has_the_prompt_and_seed_of_its_index(
    job: EvaluationJob, pipeline: Pipeline, image_metrics: ImageMetrics
) -> None:
    assert run(measure(job, pipeline, image_metrics)) == [3, 3, 1]
    found = collect(job)
    images = pipeline(captions(range(3, 6)), seeds=[13, 14, 15], steps=2, batch_size=3).images
    assert torch.equal(found.rows["features"][3:6], image_metrics.features(images))
    assert torch.equal(found.images[3:6], images)
    assert found.captions == captions(range(7)) and found.rows.keys() == {"features"}
    assert found.calls == 7 * 2 * 2 and found.seconds > 0  # guidance calls the network for two samples per step


def test_a_stopped_job_resumes_with_the_unfinished_batch(
    job: EvaluationJob, pipeline: Pipeline, image_metrics: ImageMetrics
) -> None:
    complete = replace(job, folder=job.folder.with_name("complete"))
    run(measure(complete, pipeline, image_metrics))
    started = measure(job, pipeline, image_metrics)
    next(started)
    del started
    (job.folder / ".00000003.safetensors.1234.tmp").write_bytes(b"half")
    assert [ids.start for ids in job.todo()] == [3, 6]
    assert run(measure(job, pipeline, image_metrics)) == [3, 1]
    assert torch.equal(collect(job).rows["features"], collect(complete).rows["features"])


def test_several_ranks_give_the_same_rows_as_one(
    job: EvaluationJob, pipeline: Pipeline, image_metrics: ImageMetrics
) -> None:
    alone = replace(job, folder=job.folder.with_name("alone"))
    run(measure(alone, pipeline, image_metrics))
    assert [run(measure(job, pipeline, image_metrics, rank, 2)) for rank in (1, 0)] == [[3], [3, 1]]
    assert torch.equal(collect(job).rows["features"], collect(alone).rows["features"])


def test_only_the_first_images_are_kept(
    job: EvaluationJob, pipeline: Pipeline, image_metrics: ImageMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.evaluation.run.MAX_KEPT_IMAGES", 4)
    run(measure(job, pipeline, image_metrics))
    assert len(collect(job).images) == 4 and len(collect(job).rows["features"]) == 7


def test_a_corrupt_file_is_named(job: EvaluationJob, pipeline: Pipeline, image_metrics: ImageMetrics) -> None:
    run(measure(job, pipeline, image_metrics))
    job.file(range(3, 6)).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"00000003.safetensors is corrupt .*; delete it and run"):
        collect(job)

import json
from pathlib import Path
from typing import Any

import pytest

from ldm.report.comparison import Comparison, compare, plain
from ldm.report.runs import Run, read_run, read_runs
from ldm.report.statistics import holm
from tests.report.run_folders import PROVENANCE, write_run

FLOW, COSINE = "A", "B"


def comparison_of(
    folder: Path, flow: list[Any], cosine: list[Any], metric: str = "fid", **provenance: Any
) -> Comparison:
    """Compares runs with seeds 1, 2 …; `provenance` is that of the cosine runs."""
    runs = [
        write_run(folder / f"{schedule}{seed}", seed, schedule, {metric: value}, about, curves=False)
        for schedule, values, about in (("Flow", flow, {}), ("Cosine", cosine, provenance))
        for seed, value in enumerate(values, 1)
    ]
    return compare([read_run(run) for run in runs])


def test_a_significant_difference_is_reported_with_its_interval(tmp_path: Path) -> None:
    found = comparison_of(tmp_path, [11.9, 12.4, 11.6, 12.2, 11.8], [10.1, 10.5, 9.9, 10.3, 10.1])
    (text,) = found.sentences
    assert text == (f"{COSINE} beats {FLOW} by 1.80 ± 0.12 FID, 5 seeds, 512 images, p < 0.0001.")


def test_higher_accuracy_is_better(tmp_path: Path) -> None:
    found = comparison_of(tmp_path, [0.91, 0.92, 0.93], [0.5, 0.52, 0.51], metric="accuracy")
    assert found.sentences[0].startswith(f"{FLOW} beats {COSINE} by 41.0 ± 2.5 points accuracy")


LOSS = "val/shapes/loss"
SETS = {"shapes": {"count": 256, "sha256": "f" * 64, "schedule": {"name": "flow", "shift": 1.0}}}


def test_validation_metrics_are_the_headline_only_without_generated_images(tmp_path: Path) -> None:
    for folder, image_metrics in (("a", {}), ("b", {"fid": 3.0})):
        losses = {"Flow": [0.30, 0.31, 0.35], "Cosine": [0.20, 0.21, 0.22]}
        runs = [
            write_run(
                tmp_path / folder / f"{name}{i}", i, name, {LOSS: loss} | image_metrics, {"sets": SETS}, curves=False
            )
            for name, values in losses.items()
            for i, loss in enumerate(values)
        ]
        found = compare([read_run(run) for run in runs])
        assert found.means[LOSS][1].value == pytest.approx(0.21)  # type: ignore[union-attr]
        texts = [text for text in found.sentences if "validation loss on shapes" in text]
        assert bool(texts) == (not image_metrics)
        assert all(text.startswith(f"{COSINE} beats {FLOW} by 0.110 ") for text in texts)


def test_validation_losses_of_different_objectives_are_not_ranked(tmp_path: Path) -> None:
    other = {"shapes": {**SETS["shapes"], "schedule": {"name": "cosine"}}}
    runs = [
        write_run(tmp_path / "a", 1, "Flow", {LOSS: 0.3}, {"sets": SETS}),
        write_run(tmp_path / "b", 1, "Cosine", {LOSS: 0.1}, {"sets": other}),
    ]
    (text,) = compare([read_run(run) for run in runs]).sentences
    reason = "validations on shapes differ in schedule (flow 1.0 and cosine)"
    assert text == f"validation loss on shapes of A and B cannot be compared: {reason}."


def test_validation_compares_a_run_without_images_with_a_run_that_has_them(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", 1, "Flow", {LOSS: 0.3, "fid": 2.0}, {"sets": SETS}),
        write_run(tmp_path / "b", 1, "Cosine", {LOSS: 0.1}, {"sets": SETS, "prompts": None, "feature_network": None}),
    ]
    found = compare([read_run(run) for run in runs])
    assert found.means["fid"][1] is None and [pair.metric.key for pair in found.pairs] == [LOSS]
    assert (found.pairs[0].a, found.pairs[0].b) == (1, 0)
    assert found.sentences == ["Too little to claim a difference in validation loss on shapes: 1 seed of at least 3."]


def test_higher_validation_retrieval_accuracy_is_better(tmp_path: Path) -> None:
    found = comparison_of(tmp_path, [0.9], [0.5], metric="val/shapes/picture_found")
    assert (found.pairs[0].a, found.pairs[0].b) == (0, 1)


def test_a_difference_within_its_interval_is_not_shown(tmp_path: Path) -> None:
    found = comparison_of(tmp_path, [10.0, 12.0, 11.0], [11.5, 10.2, 11.9])
    assert found.sentences[0].startswith("No difference shown in FID (p from ")


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("images", [8, 99, 100])
def test_no_difference_is_claimed_from_fewer_than_3_seeds_or_100_images(
    tmp_path: Path, seeds: int, images: int
) -> None:
    runs = [
        write_run(
            tmp_path / f"{schedule}{seed}",
            *(seed, schedule, {"fid": fid + seed % 3 / 100}, {"prompts": {"count": images, "sha256": "c" * 64}}),
        )
        for schedule, fid in (("Flow", 10.0), ("Cosine", 5.0))
        for seed in range(seeds)
    ]
    found = compare([read_run(run) for run in runs])
    (text,), (pair,) = found.sentences, found.pairs
    enough = seeds >= 3 and images >= 100
    assert ("beats" in text) == enough == (pair.p is not None) == (pair.few == [])
    assert (f"{seeds} seed{'s' if seeds > 1 else ''} of at least 3" in text) == (seeds < 3)
    assert (f"{images} images of at least 100" in text) == (images < 100)
    assert enough or text.startswith("Too little to claim a difference in FID: ")


def test_metrics_of_different_reference_images_are_not_compared(tmp_path: Path) -> None:
    other = {"data": "Folder", "count": 2048, "sha256": "e" * 64}
    found = comparison_of(tmp_path, [10.0, 11.0], [5.0, 6.0], reference=other)
    assert found.sentences == [
        "FID of A and B cannot be compared: reference images differ (bbbbbbbbbbbb and eeeeeeeeeeee)."
    ]
    assert found.pairs[0].contrast is None
    assert found.not_comparable["fid"] == [[], ["reference images differ (bbbbbbbbbbbb and eeeeeeeeeeee)"]]


def test_seeds_that_were_measured_differently_are_not_averaged(tmp_path: Path) -> None:
    other = {"count": 100, "sha256": "c" * 64}
    runs = [
        write_run(tmp_path / "1", 1, metrics={"fid": 3.0}),
        write_run(tmp_path / "2", 2, metrics={"fid": 9.0}, provenance={"prompts": other}),
    ]
    found = compare([read_run(run) for run in runs])
    assert [mean.value for mean in found.means["fid"] if mean] == [3.0, 9.0]
    assert found.not_comparable["fid"] == [[], ["numbers of generated images differ (512 and 100)"]]


def noises(path: Path, fingerprint: str, fids: list[float], error: float) -> list[Run]:
    """Writes evaluations of one model with different noise, as separate files, and reads them."""
    found = []
    for noise, fid in enumerate(fids):
        prompts = PROVENANCE["prompts"] | {"seeds": [noise * 512, noise * 512 + 511]}
        about = PROVENANCE | {"seed": 3, "prompts": prompts, "model": {"fingerprint": fingerprint}}
        about["validation"] = {"count": 128}
        file = path / f"{fingerprint}{noise}.json"
        file.write_text(json.dumps({"metrics": {"fid": fid, "noise_loss": error}, "provenance": about}))
        found += read_runs(file)
    return found


def test_evaluations_with_other_noise_are_repetitions_of_what_depends_on_it(tmp_path: Path) -> None:
    runs = [*noises(tmp_path, "a", [1.0, 1.2, 1.1], 0.5), *noises(tmp_path, "b", [2.0, 2.1, 2.2], 0.4)]
    found = compare(runs)
    fid, error = (found.means[metric][0] for metric in ("fid", "noise_loss"))
    assert fid is not None and error is not None
    assert (fid.value, fid.count) == (pytest.approx(1.1), 3) and (error.value, error.count) == (0.5, 1)
    assert found.sentences == [
        "A beats B by 1.00 ± 0.25 FID, 3 seeds, 512 images, p = 0.0033.",
        "Too little to claim a difference in x0 error over noise levels: 1 seed of at least 3.",
    ]


def test_p_values_are_adjusted_for_the_pairs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{schedule}{seed}", seed, schedule, {"fid": start + noise})
        for schedule, start in (("Flow", 10.0), ("Cosine", 11.0), ("Linear", 12.0))
        for seed, noise in enumerate([0.0, 0.3, -0.1 * start])
    ]
    found = compare([read_run(run) for run in runs])
    alone = [pair.contrast.p for pair in found.pairs if pair.contrast is not None and pair.contrast.p is not None]
    assert len(alone) == 3 and [pair.p for pair in found.pairs] == holm(alone) != alone
    assert len(found.sentences) == 2  # the best group against each of the others


def test_insignificant_differences_come_last_in_one_sentence(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{schedule}{seed}", seed, schedule, {"fid": fid + noise, "clip_score": score + noise})
        for schedule, fid, score in (("Flow", 1.0, 20.0), ("Cosine", 1.0, 60.0), ("Linear", 1.0, 40.0))
        for seed, noise in enumerate([0.0, 0.3, -0.1 * score / 20])
    ]
    *shown, insignificant = compare([read_run(run) for run in runs]).sentences
    assert len(shown) == 2 and all(text.startswith("B beats ") for text in shown)
    assert insignificant.startswith("No difference shown in FID (p from ")


def test_metrics_that_show_nothing_share_one_sentence_for_each_cause(tmp_path: Path) -> None:
    numbers = {"fid": 3.0, "kid": 1.0, "recall": 0.5}
    few = {"prompts": {"count": 8, "sha256": "c" * 64}}
    runs = [write_run(tmp_path / name, 1, name, numbers, few) for name in ("Flow", "Cosine")]
    other = few | {"reference": {"sha256": "e" * 64, "count": 2048}}
    runs += [write_run(tmp_path / name, 1, name, numbers, other) for name in ("Linear", "Sigmoid")]
    reason = "reference images differ (bbbbbbbbbbbb and eeeeeeeeeeee)"
    assert compare([read_run(run) for run in runs]).sentences == [
        "Too little to claim a difference in FID, KID and recall: 1 seed of at least 3 and 8 images of at least 100.",
        f"FID, KID and recall of A cannot be compared with those of C and D: {reason}.",
    ]


def test_neither_other_data_nor_a_single_lucky_seed_counts_as_the_best(tmp_path: Path) -> None:
    other = {"reference": {"sha256": "e" * 64}}
    runs = [
        write_run(tmp_path / f"{schedule}{seed}", seed, schedule, {"fid": value}, about)
        for schedule, values, about in (
            ("Flow", [10.0, 10.1], {}),
            ("Cosine", [12.0, 12.2], {}),
            ("Lucky", [1.0], {}),
            ("Other", [2.0, 2.1], other),
        )
        for seed, value in enumerate(values)
    ]
    found = compare([read_run(run) for run in runs])
    best = [pair for pair in found.pairs if found._has_best(pair)]
    assert len(best) == 3 and all(0 in (pair.a, pair.b) for pair in best)


def test_a_comparison_converts_to_json(tmp_path: Path) -> None:
    found = plain(comparison_of(tmp_path, [10.0, 11.0], [5.0]))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["groups"][0]["metrics"]["fid"]["mean"] == 10.5
    assert found["groups"][1]["settings"] == {"schedule": "Cosine"}


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of these folders contains a run"):
        compare([read_run(tmp_path)])

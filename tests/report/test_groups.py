import json
from pathlib import Path

from ldm.report.groups import described, group_runs
from ldm.report.runs import read_run
from tests.report.run_folders import PROVENANCE, write_run


def test_runs_that_differ_only_in_their_seed_are_one_group(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / f"{schedule}{seed}", seed, schedule))
        for schedule in ("Flow", "Cosine")
        for seed in (2, 1)
    ]
    groups, differences = group_runs(runs)
    assert [[run.seed for run in group.runs] for group in groups] == [[1, 2], [1, 2]]
    assert [group.name for group in groups] == ["A: schedule=Flow", "B: schedule=Cosine"]
    assert [(d.key, d.values) for d in differences] == [("schedule", ["Flow", "Cosine"])]


def test_a_setting_that_a_config_repeats_is_listed_once(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / schedule, 0, schedule)) for schedule in ("Flow", "Cosine")]
    (difference,) = group_runs(runs)[1]
    assert difference.also == ["training.schedule._target_"]


def test_a_subordinate_setting_is_in_the_label_only_if_groups_need_it(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / schedule, 0, schedule)) for schedule in ("Flow", "Cosine")]
    runs[1].config["schedule.offset"] = 0.008
    groups, differences = group_runs(runs)
    assert [group.label for group in groups] == ["schedule=Flow", "schedule=Cosine"]
    assert [d.key for d in differences] == ["schedule", "schedule.offset"]
    runs.append(read_run(write_run(tmp_path / "third", 0, "Cosine")))
    runs[2].config["schedule.offset"] = 0.01
    labels = [group.label for group in group_runs(runs)[0]]
    assert labels == ["schedule=Flow", "schedule=Cosine, offset=0.008", "schedule=Cosine, offset=0.01"]


def test_a_run_is_described_by_no_more_settings_than_distinguish_it(tmp_path: Path) -> None:
    counts = (16, 16, 2048)
    runs = [
        read_run(write_run(tmp_path / name, 0, schedule, {"fid": 1.0}, {"reference": {"count": count}}))
        for name, schedule, count in zip("abc", ("Flow", "Cosine", "Cosine"), counts, strict=True)
    ]
    for run, count in zip(runs, counts, strict=True):
        run.config.update({f"schedule.{name}": run.config["schedule._target_"] for name in ("offset", "steps")})
        run.config.update({f"evaluation.{name}": count for name in ("count", "length", "validation")})
    _, differences = group_runs(runs)
    described_as = [described(differences, position) for position in range(3)]
    assert described_as == ["schedule=Flow, count=16", "schedule=Cosine, count=16", "schedule=Cosine, count=2048"]


def test_settings_that_only_some_groups_record_do_not_describe_them(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / schedule, 0, schedule)) for schedule in ("Flow", "Cosine")]
    (tmp_path / "of_a_file.json").write_text(json.dumps({"metrics": {"fid": 1.0}, "provenance": PROVENANCE}))
    groups, differences = group_runs([*runs, read_run(tmp_path / "of_a_file.json")])
    assert [described(differences, position) for position in range(3)] == ["schedule=Flow", "schedule=Cosine", ""]
    assert [group.label for group in groups] == ["schedule=Flow", "schedule=Cosine", "of_a_file.json"]
    assert {"trainer.max_steps", "sampling.steps"} <= {difference.key for difference in differences}


def test_settings_of_the_evaluation_divide_a_group_only_if_they_change_what_is_measured(tmp_path: Path) -> None:
    other = {"prompts": {"count": 100, "sha256": "e" * 64}}
    runs = [
        read_run(write_run(tmp_path / str(seed), seed, metrics=metrics, provenance=about))
        for seed, metrics, about in (
            (1, {"fid": 3.0}, {}),
            (2, {"fid": 4.0}, {}),
            (3, {"fid": 9.0}, other),
            (4, None, {}),
        )
    ]
    runs[1].config["evaluation.batch_size"] = 8
    runs[2].config["evaluation.prompts"] = 100
    groups, differences = group_runs(runs)
    assert [[run.seed for run in group.runs] for group in groups] == [[1, 2, 4], [3]]
    assert [(d.key, d.values) for d in differences] == [("evaluation.prompts", ["–", "100"])]


def test_values_of_one_seed_are_averaged(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / str(k), seed, metrics={"fid": fid}))
        for k, (seed, fid) in enumerate([(1, 3.0), (2, 4.0), (2, 6.0)])
    ]
    (group,) = group_runs(runs)[0]
    assert group.values("fid") == {1: 3.0, 2: 5.0}


def test_a_single_run_is_named_after_its_folder(tmp_path: Path) -> None:
    groups, differences = group_runs([read_run(write_run(tmp_path / "mine"))])
    assert groups[0].name == "mine" and not differences


def test_empty_folders_belong_to_no_group(tmp_path: Path) -> None:
    assert group_runs([read_run(tmp_path)]) == ([], [])

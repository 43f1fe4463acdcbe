import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ldm.report.runs import read_runs
from ldm.report.sweep import aligned, beside, write_sweep
from tests.report.run_folders import PROVENANCE


def evaluation(steps: int, noise: int, fid: float, nfe: float) -> dict[str, Any]:
    about = copy.deepcopy(PROVENANCE)
    about["sampling"]["steps"] = steps
    about["prompts"]["seeds"] = [noise * 512, noise * 512 + 511]  # 512 prompts per evaluation
    return {"metrics": {"fid": fid, "nfe": nfe, "sampling_seconds": 51.2 * nfe}, "provenance": about}


def saved(path: Path, *evaluations: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"evaluations": evaluations}))
    return path


def test_each_evaluation_of_a_sweep_is_read_as_a_run_with_its_noise(tmp_path: Path) -> None:
    runs = read_runs(saved(tmp_path / "s.json", evaluation(5, 0, 3.0, 10), evaluation(5, 2, 4.0, 10)))
    assert [(run.noise, run.metrics["fid"], run.path.name) for run in runs] == [
        (0, 3.0, "s.json[0]"),
        (2, 4.0, "s.json[1]"),
    ]


def test_the_table_marks_the_pareto_front_of_quality_and_network_calls(tmp_path: Path) -> None:
    file = saved(
        tmp_path / "s.json",
        *(evaluation(5, seed, 3.0 + seed, 10) for seed in (0, 1)),
        *(evaluation(10, seed, 5.0, 20) for seed in (0, 1)),
        *(evaluation(20, seed, 1.0, 40) for seed in (0, 1)),
    )
    output = write_sweep(file)
    table, covered = (tmp_path / "s.md").read_text().split("\n\n")
    assert "over the noise seeds of the evaluation of one trained model" in covered
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0] == ["", "steps", "NFE", "s/image", "FID ↓"]
    assert [row[:3] for row in rows[2:]] == [["●", "5", "10"], ["", "10", "20"], ["●", "20", "40"]]
    assert rows[2][4] == "3.5 ± 6.4" and rows[4][3:] == ["4", "1"]
    assert {path.name for path in tmp_path.glob("s_fid_by_*")} == {
        f"s_fid_by_{cost}.{suffix}" for cost in ("nfe", "seconds") for suffix in ("svg", "pdf")
    }
    assert str(tmp_path / "s_fid_by_nfe.pdf") in output
    for name in ("s2.md", "s.txt", "s_notes.svg"):
        (tmp_path / name).touch()
    assert {path.name for path in beside(file)} == {"s.md", *(path.name for path in tmp_path.glob("s_fid_by_*"))}


def test_a_sweep_without_a_ranked_metric_is_refused(tmp_path: Path) -> None:
    bare = evaluation(5, 0, 3.0, 10)
    del bare["metrics"]["fid"]
    with pytest.raises(ValueError, match="has too few images for any metric; use more prompts"):
        write_sweep(saved(tmp_path / "s.json", bare))


def test_markdown_tables_have_aligned_columns() -> None:
    assert aligned(["a", "long"], [["wide", "1"]]) == "| a    | long |\n| ---- | ---- |\n| wide | 1    |"

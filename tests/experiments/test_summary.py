import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.finetuning.runs import Run
from experiments.finetuning.summary import collect


def write_measurements(folder: Path, *seeds: int) -> Path:
    """Writes measurements of a run with these seeds, in which one of 128 old prompts is lost."""
    folder.mkdir(parents=True)
    old = {"old": "1" * 128}
    base = {"base": "model", "dtype": "float32", "word_is_unknown": {}, "right": old, "decoded": old}
    (folder / "base.json").write_text(json.dumps(base))
    for seed in seeds:
        added = [{**asdict(Run("style", "lora", "none", 1e-3, 10, seed=seed)), "weight": 1.0}]
        right = {"old": "0" + "1" * 127}
        record = {"added": added, "right": right, "cpu_seconds": {"training": 1.0}}
        (folder / f"run_seed{seed}.json").write_text(json.dumps(record))
    return folder


def test_earlier_results_of_the_same_base_are_extended_by_further_seeds(tmp_path: Path) -> None:
    earlier: dict[str, Any] = collect(write_measurements(tmp_path / "first" / "aaaa", 0, 1))
    (cell,) = collect(write_measurements(tmp_path / "second" / "aaaa", 1, 2), earlier)["cells"]
    assert cell["seeds"] == 3 and cell["lost"]["value"] == round(100 / 128, 2)
    assert sorted(one["added"][0]["seed"] for one in cell["measured"]) == [0, 1, 2]


def test_results_of_another_base_or_without_measurements_are_replaced(tmp_path: Path) -> None:
    folder = write_measurements(tmp_path / "aaaa", 0)
    for about in ({"fingerprint": "bbbb"}, {}):
        assert collect(folder, {"base": about, "cells": [{"added": []}]}) == collect(folder)

"""The benchmark of a GPU runs on a CPU with tiny networks, and keeps its time limits."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmark.gpu import STAGES, Line, Stage, goals, parts_of, run
from experiments.benchmark.gpu_stages.context import Context
from experiments.benchmark.gpu_stages.training import fastest_backend

# Runs "fine", "fail" and "again" as a worker does; "hang" never ends, and "die" ends the process.
WORKER = """
    import json, os, sys, time
    for name in map(str.strip, sys.stdin):
        print(json.dumps({"process": os.getpid()}), flush=True)
        if name == "hang":
            time.sleep(60)
        if name == "die":
            os._exit(3)
        if name == "fail":
            print(json.dumps({"error": "RuntimeError: no"}), flush=True)
        if name == "break":
            print(json.dumps({"error": "AcceleratorError: CUDA error: misaligned address"}), flush=True)
        if name == "poison":
            print(json.dumps({"error": "RuntimeError: Triton Error [CUDA]: an illegal address"}), flush=True)
            os._exit(1)
        print("{}", flush=True)
"""
MINUTE = 60.0


@pytest.fixture
def cpu(tmp_path: Path) -> Iterator[Context]:
    yield Context.of("tiny", "cpu", tmp_path)
    torch.compiler.set_stance("default")


def lines_of(names: list[str], seconds: float = MINUTE, **changed: Stage) -> dict[str, Line]:
    kinds = "fine", "again", "fail", "hang", "die", "break", "poison"
    stages = {name: Stage("", "one", 20.0) for name in kinds} | changed
    emitted: list[Line] = []
    done = run(names, [sys.executable, "-c", textwrap.dedent(WORKER)], seconds, stages, emitted.append)
    assert [line["stage"] for line in emitted] == names and emitted == [*done.values()]
    return done


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu_with_tiny_networks(cpu: Context) -> None:
    lines: dict[str, Line] = {}
    for name in STAGES:
        line: Line = {}
        for part in parts_of(name, cpu):
            line |= part
        lines[name] = line
        assert "error" not in line and line, (name, line)
    json.dumps(lines)
    assert {"peak memory", "torch.compile"} <= {*lines["compiled"]["not_run"]}
    assert lines["noise"]["normal"]["different"] == lines["noise"]["uniform"]["different"] == 0
    assert lines["regressions"]["layouts"]["layout_lost"] == 0
    assert lines["regressions"]["out_of_memory"] == {"recognised": True, "batches": [1, 1, 1], "warnings": 1}
    assert lines["checkpoint"]["deterministic"]["exit_code_of_the_killed_run"] == -9
    assert lines["checkpoint"]["deterministic"]["largest_difference_after_resuming"] == 0
    found = goals(lines)
    assert all(
        found[name]["measured"] for name in ("images_per_second", "share_of_matmul_rate", "seconds_for_50_steps")
    )
    assert found["peak_over_plan"]["measured"] is None


def test_stages_of_a_group_share_a_process_and_others_do_not() -> None:
    done = lines_of(["fine", "again", "fail"], fail=Stage("", "two", 20.0))
    assert done["fine"]["process"] == done["again"]["process"] != done["fail"]["process"]
    assert done["fail"]["error"] == "RuntimeError: no"


@pytest.mark.parametrize(
    ("name", "error"), [("hang", "stopped after the limit of 2 seconds"), ("die", "the process ended with exit code 3")]
)
def test_a_stage_that_hangs_or_dies_keeps_its_parts_and_the_next_one_runs(name: str, error: str) -> None:
    done = lines_of([name, "fine"], **{name: Stage("", "one", 2.0 if name == "hang" else 20.0)})
    assert done[name]["error"] == error and (name == "hang" or "process" in done[name])
    assert "error" not in done["fine"] and done["fine"]["process"] != done[name].get("process")


def test_a_stage_is_skipped_if_its_limit_exceeds_the_remaining_time() -> None:
    done = lines_of(["again", "fine"], 30.0, fine=Stage("", "one", 31.0))
    assert "process" in done["again"] and done["fine"]["skipped"].startswith("may take 31 seconds, but")


def test_a_stage_without_its_packages_or_its_predecessor_is_skipped() -> None:
    after = Stage("", "one", 20.0, after="fine")
    assert lines_of(["fine"], fine=Stage("", "one", 20.0, ("no_such_package",)))["fine"]["skipped"] == (
        "needs no_such_package"
    )
    assert "skipped" in lines_of(["fail", "again"], again=after)["again"]
    assert "process" in lines_of(["fine", "again"], again=after)["again"]


def test_a_broken_gpu_is_left_to_a_new_process() -> None:
    done = lines_of(["break", "fine", "fail", "again"])
    assert done["break"]["process"] != done["fine"]["process"] == done["fail"]["process"] == done["again"]["process"]


def test_the_error_of_a_stage_whose_process_ends_is_its_own_and_the_next_stage_gets_another_process() -> None:
    done = lines_of(["poison", "fine"])
    assert done["poison"]["error"] == "RuntimeError: Triton Error [CUDA]: an illegal address"
    assert done["poison"]["process"] != done["fine"]["process"] and "error" not in done["fine"]


def test_goals_are_compared_with_the_best_measurements() -> None:
    done: dict[str, Any] = {
        "machine": {"matmul_flops_per_second": {"bfloat16": 800.0}},
        "eager": {"flops_per_image": 2.0, "images_per_second": 300.0, "peak_over_plan": 1.1},
        "compiled": {"images_per_second": 140.0, "peak_over_plan": 0.8},
        "graph": {"images_per_second": 160.0},
        "lora": {"plain": {"images_per_second": 200.0, "peak_over_plan": 0.7}},
        "drawing": {"fastest_seconds": 0.9},
        "drawing_compiled": {"fastest_seconds": 0.5},
    }
    found = goals(done)
    assert found["images_per_second"] == {"measured": 160.0, "goal": 150, "reached": True}
    assert found["share_of_matmul_rate"] == {"measured": 0.4, "goal": 0.45, "reached": False}
    assert found["seconds_for_50_steps"] == {"measured": 0.5, "goal": 0.6, "reached": True}
    assert found["peak_over_plan"] == {"measured": 0.7, "goal": [0.85, 1.15], "reached": False}
    assert goals({})["images_per_second"] == {"measured": None, "goal": 150, "reached": None}


def test_the_best_attention_is_the_fastest_backend_that_ran_every_shape() -> None:
    shapes = {
        "4096x77x40": {"seconds": {"flash": 2.0, "cudnn": 1.0, "math": 0.5}, "flops": 1},
        "64x64x160": {"seconds": {"flash": 1.0, "cudnn": 1.5, "math": "RuntimeError: x"}, "flops": 1},
    }
    assert fastest_backend({"stage": "attention", "errors": {}, **shapes}) == "cudnn"
    assert fastest_backend({}) == "cudnn"


def test_the_script_imports_no_torch_before_it_starts_a_stage() -> None:
    code = "import sys; import experiments.benchmark.gpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

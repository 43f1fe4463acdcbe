import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.__main__ import main
from ldm.commands.evaluate import command as evaluate
from ldm.commands.evaluate.arguments import SWEPT
from ldm.evaluation.result import training_of
from ldm.image import save_png, to_pil
from ldm.report.groups import group_runs
from ldm.report.runs import read_runs
from tests.data.tars import samples, write_tar
from tests.report.run_folders import PROVENANCE, write_run
from tests.tiny import save_tiny_model

WORDS = ("red circle", "blue square", "white square", "blue circle", "red square")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns the arguments for a tiny model and five images with captions."""
    folder = tmp_path_factory.mktemp("given")
    noise = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for index, words in enumerate(WORDS):
        save_png(to_pil(noise[index : index + 1])[0], folder / "images" / f"{index}.png", {})
        (folder / "images" / f"{index}.txt").write_text(words)
    counts = ["--batch", "2", "--validation", "2", "--device", "cpu"]
    return ["evaluate", str(save_tiny_model(folder)), "--data", str(folder / "images"), *counts]


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def alone(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "a.json"
    assert main([*given, "--out", str(out)]) == 0
    return out


def test_every_setting_of_a_sweep_has_a_parser() -> None:
    assert evaluate.PARSERS.keys() == SWEPT.keys()


def test_the_metrics_of_a_run_are_written_with_provenance(alone: Path, given: list[str]) -> None:
    found = read(alone)
    assert {"fid", "kid", "precision", "recall", "clip_score", "noise_loss", "nfe"} <= found["metrics"].keys()
    about = found["provenance"]
    assert (about["prompts"]["count"], about["reference"]["count"], about["prompts"]["seeds"]) == (5, 5, [0, 4])
    assert (about["model"]["weights"], about["reference"]["data"]) == (given[1], given[3])
    assert about["sampling"]["steps"] == 3
    assert found["metrics"]["nfe"] == 6 and len(found["curves"]["noise_loss"]["mean"]) > 3
    assert alone.with_suffix(".png").is_file() and not list(alone.parent.glob(".*"))


def test_the_recorded_steps_are_those_of_the_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics={"fid": 1.0}, provenance={"steps": 12})  # of trainer.max_steps=20
    assert training_of(run)["steps"] == 12
    (run / "checkpoints").mkdir()
    torch.save({"state_dict": {}, "global_step": 7}, run / "checkpoints" / "last.ckpt")  # the file with the weights
    assert training_of(run)["steps"] == 7


@pytest.mark.parametrize("sweep", [False, True])
def test_evaluations_of_models_that_differ_only_in_their_seed_are_one_group(tmp_path: Path, sweep: bool) -> None:
    files = []
    for schedule, seed in (("Flow", 0), ("Flow", 1), ("Cosine", 0)):
        trained = training_of(write_run(tmp_path / f"{schedule}{seed}", seed, schedule))
        about = PROVENANCE | {"seed": seed, "model": {"weights": schedule, "settings": trained["settings"]}}
        files.append(tmp_path / f"{schedule}{seed}.json")
        report = {"metrics": {"fid": 1.0}, "provenance": about}
        files[-1].write_text(json.dumps({"evaluations": [report]} if sweep else report))
    groups, differences = group_runs([run for file in files for run in read_runs(file)])
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [
        ("schedule=Flow", [0, 1]),
        ("schedule=Cosine", [0]),
    ]
    assert [difference.key for difference in differences] == ["schedule"]


def test_a_finished_evaluation_is_not_repeated_or_overwritten(
    alone: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = alone.read_bytes()
    assert main([*given, "--out", str(alone)]) == 0
    assert "already holds this evaluation" in capsys.readouterr().out
    assert main([*given, "--out", str(alone), "--steps", "2"]) == 1
    assert "exists and holds something else" in capsys.readouterr().err
    assert alone.read_bytes() == before


@pytest.mark.slow
def test_a_stopped_evaluation_resumes_with_the_same_results(
    alone: Path, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*arguments: Any) -> Any:
        yield next(measure(*arguments))
        raise KeyboardInterrupt

    measure = evaluate.measure
    monkeypatch.setattr(evaluate, "measure", stopped)
    assert main([*given, "--out", str(tmp_path / "a.json")]) == 130
    assert "stopped: 2 of 5 images are measured" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*given, "--out", str(tmp_path / "a.json")]) == 0
    assert same(read(tmp_path / "a.json"), read(alone))


def same(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.0) -> bool:
    """Returns whether all metrics except the time are equal."""
    names = a["metrics"].keys() - {"sampling_seconds"}
    assert names == b["metrics"].keys() - {"sampling_seconds"}
    return all(a["metrics"][name] == pytest.approx(b["metrics"][name], rel=tolerance, abs=0) for name in names)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(alone: Path, given: list[str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ldm", *given, "--out", str(tmp_path / "a.json")]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **rendezvous, "RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE)
        for r in "01"
    ]
    stderr = [rank.communicate(timeout=500)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], stderr
    assert "rank 1: 2/2 images" in stderr[1]
    assert same(read(tmp_path / "a.json"), read(alone), 1e-6)


@pytest.mark.slow
def test_a_sweep_writes_a_table_plots_and_comparable_runs(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep.json"
    swept = ["--steps", "1,2", "--seed", "0,1", "--validation", "0"]
    assert main([*given, *swept, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split("|")[2:4] == [" steps ", " NFE "]
    assert sum(line.startswith("|") for line in (tmp_path / "sweep.md").read_text().splitlines()) == 4
    assert (tmp_path / "sweep_fid_by_nfe.svg").is_file() and str(tmp_path / "sweep_fid_by_seconds.pdf") in printed
    runs = read_runs(out)
    assert [(run.config["sampling.steps"], run.noise) for run in runs] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert runs[1].provenance["prompts"]["seeds"] == [5, 9]
    assert runs[0].metrics["fid"] != runs[1].metrics["fid"]
    assert main(["compare", str(out), "--out", str(tmp_path / "report")]) == 0
    assert [group["noise"] for group in read(tmp_path / "report" / "report.json")["groups"]] == [[0, 1], [0, 1]]


def test_a_sampler_may_have_its_name_in_another_program(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "--prompts", "1", "--steps", "1", "--validation", "0"
    assert main([*given, *few, "--sampler", "DPM++ 2M Karras", "--out", str(tmp_path / "a.json")]) == 0
    assert "DPM++ 2M Karras is taken as sampler=dpmpp_2m spacing=karras" in capsys.readouterr().err
    sampling = read(tmp_path / "a.json")["provenance"]["sampling"]
    assert (sampling["sampler"], sampling["spacing"]) == ("dpmpp_2m", "karras")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "0"], 2, "--steps 0: expected an integer >= 1"),
        (["--guidance", "1,high"], 2, "--guidance 1,high: expected a number, or several"),
        (["--sampler", "ddim,eular"], 2, "--sampler ddim,eular: expected one of ddpm"),
        (["--seed", "1,1"], 2, "--seed 1,1: a value is given twice"),
        (["--sampler", "dpmpp_2m,DPM++ 2M"], 2, "--sampler dpmpp_2m,DPM++ 2M: a value is given twice"),
        (["--sampler", "DPM++ 2M Karras", "--spacing", "leading"], 1, "sampler=DPM++ 2M Karras means spacing="),
        (["--prompts", "0"], 2, "--prompts 0: expected 1 or more"),
        (["--data", "nowhere"], 1, "no shards at nowhere"),
        (["--data", "shapes"], 1, "shapes are 64x64 pixels, but the model's are 16x16"),
        (["--features", "nowhere.pth"], 1, "Inception weights nowhere.pth not found"),
        (["--ema-length", "0.1"], 1, "there are no snapshots in"),
        (["--ema-length", "2"], 2, "the length of an average is 2.0, but must be a fraction of training between"),
        (
            ["--seed", "9999999999999999999"],
            2,
            "--seed 9999999999999999999: expected an integer >= 0 with at most 18",
        ),
        (["--data", "shapes", "--held-out", "5"], 2, "--held-out is for data that a model may be trained on"),
    ],
)
def test_invalid_arguments_are_refused_in_one_sentence(
    arguments: list[str], code: int, message: str, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*given, "--out", str(tmp_path / "a.json"), *arguments]) == code
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("name", ["a.png", "a.md", "a_fid_by_nfe.svg"])
def test_files_written_by_other_programs_are_not_overwritten(
    name: str, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("theirs")
    assert main([*given, "--out", str(tmp_path / "a.json"), "--steps", "1,2"]) == 1
    assert f"{name} was not written by ldm evaluate" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "theirs"


def test_an_output_inside_the_data_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir(given[3]))
    assert main([*given, "--out", f"{given[3]}/a.json"]) == 1
    assert f"--out {given[3]}/a.json is in the data {given[3]}, so that" in capsys.readouterr().err
    assert sorted(os.listdir(given[3])) == before


def test_the_reference_file_must_differ_from_the_output(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "a.json")
    assert main([*given, "--out", out, "--reference", f"{tmp_path}/../{tmp_path.name}/a.json"]) == 2
    assert f"is a file that --out {out} writes; give another" in capsys.readouterr().err


def test_other_files_beside_partial_results_are_kept(given: list[str], tmp_path: Path) -> None:
    (tmp_path / ".a.json.parts").mkdir()
    (tmp_path / ".a.json.parts" / "notes.txt").touch()
    assert main([*given, "--out", str(tmp_path / "a.json"), "--steps", "1", "--validation", "0"]) == 0
    assert os.listdir(tmp_path / ".a.json.parts") == ["notes.txt"]


def test_an_unreadable_image_is_replaced_with_a_warning(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(given[3], tmp_path / "images")
    (tmp_path / "images" / "1.png").write_bytes(b"")
    arguments = ["--data", str(tmp_path / "images"), "--validation", "0", "--steps", "1"]
    assert main([*given, *arguments, "--out", str(tmp_path / "a.json")]) == 0
    assert "an unreadable image was replaced by another: " in capsys.readouterr().err
    assert read(tmp_path / "a.json")["provenance"]["prompts"]["count"] == 5


def test_an_empty_folder_is_refused(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([*given, "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "a.json")]) == 1
    assert "has no images" in capsys.readouterr().err


def test_the_precision_of_the_model_does_not_change_the_reference(given: list[str], tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", samples(3))
    stage = ["--first-stage", str(Path(given[1]).with_name("vae.safetensors"))]
    cache = tmp_path / "cache"
    assert main(["encode", str(tmp_path / "x.tar"), *stage, "--out", str(cache), "--size", "16", "--workers", "0"]) == 0
    for precision in ("32", "bf16"):
        arguments = ["--data", str(cache), "--held-out", "0", "--validation", "0", "--precision", precision]
        assert main([*given, *arguments, "--steps", "1", "--out", str(tmp_path / f"{precision}.json")]) == 0
    first, second = (read(tmp_path / f"{precision}.json")["provenance"]["reference"] for precision in ("32", "bf16"))
    assert first == second

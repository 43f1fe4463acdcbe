"""A diffusion transformer through everything that a run and a model go through."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.__main__ import main
from ldm.callbacks.checkpointing import checkpoint_file
from ldm.commands.info.command import describe
from ldm.nn.dit import DiT
from ldm.pipeline.pipeline import Pipeline
from ldm.weights.contents import open_contents
from ldm.weights.model import read_model
from tests.runs import ALONE, TINY_DIT, refusal, run

ROOT = Path(__file__).parents[1]
SAME = ("precision=fp32", "optimizer=adamw")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to its end, with pictures and their measures."""
    pictures = "evaluation.prompts=4", "evaluation.count=8", *ALONE[1:]
    return run(tmp_path_factory.mktemp("trained"), *TINY_DIT, *SAME, *pictures, "trainer.max_steps=4")


def test_a_run_leaves_what_it_promises(trained: Path) -> None:
    assert {"metrics", "provenance"} <= json.loads((trained / "metrics.json").read_text()).keys()
    assert Image.open(trained / "samples" / "final.png").size > (64, 64)
    for path in (trained, trained / "dit.safetensors"):
        assert isinstance(read_model(path).backbone, DiT)


def test_it_is_measured_as_a_run_ends(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())["metrics"]
    assert {"fid", "clip_score", "accuracy", "noise_loss"} <= metrics.keys()
    assert metrics["nfe"] == 2 * 2  # steps, with and without the prompt


def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_ends(trained: Path, tmp_path: Path) -> None:
    for steps in (2, 4):
        run(tmp_path, *TINY_DIT, *SAME, *ALONE, f"trainer.max_steps={steps}", "resume=auto")
    ours, theirs = (checkpoint_file.read(folder / "checkpoints" / "last.ckpt") for folder in (tmp_path, trained))
    for part in ("state_dict", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part]), part


@pytest.mark.slow
def test_a_run_of_another_backbone_is_not_resumed(trained: Path) -> None:
    told = refusal(trained, "trainer.max_steps=5", "resume=auto", "accept_changes=true", *ALONE)
    assert "another model than this config builds (kind dit → unet" in told


def test_it_trains_with_gradient_checkpointing(tmp_path: Path) -> None:
    run(tmp_path, *TINY_DIT, *SAME, *ALONE, "trainer.max_steps=1", "+model.checkpointing=true")
    assert (tmp_path / "dit.safetensors").is_file()


def test_it_draws_what_its_prompts_and_seeds_decide(trained: Path) -> None:
    pipeline = Pipeline.load(str(trained), "cpu")
    drawn = pipeline(["a red circle", "a blue square"], seeds=[1, 2])
    assert drawn.images.shape == (2, 3, 64, 64)
    alone = pipeline("a blue square", seeds=2).images
    assert int((drawn.images[1:].int() - alone.int()).abs().max()) <= 1


def test_sample_draws_from_its_run(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "sample.py", "a red circle", f"model={trained}", "size=32x48", f"out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "0000.png").size == (48, 32)


def test_info_says_what_it_is(trained: Path) -> None:
    told = describe(str(trained / "dit.safetensors"))
    assert told["kind"] == "a dit of ldm" and told["architecture"].startswith("channels=4, width=24, layers=2")
    assert told["parameters"] == f"{sum(p.numel() for p in read_model(trained).backbone.parameters()):,}"


def test_it_is_evaluated_from_the_command_line(trained: Path, tmp_path: Path) -> None:
    small = ["--data", "shapes", "--prompts", "4", "--count", "8", "--validation", "2", "--steps", "1"]
    assert main(["evaluate", str(trained), *small, "--out", str(tmp_path / "e.json")]) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["metrics"]["nfe"] == 2 and found["metrics"]["noise_loss"] > 0


def test_it_is_converted_to_files_of_ldm_and_to_no_other_format(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(trained), str(tmp_path / "own"), "--to", "ldm"]) == 0
    assert open_contents(tmp_path / "own").denoising.fingerprint == open_contents(trained).denoising.fingerprint
    assert main(["convert", str(trained), str(tmp_path / "m.safetensors")]) == 1
    assert "holds a dit, which only files of ldm can hold: give --to ldm" in capsys.readouterr().err


def test_the_plan_names_it_and_counts_its_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, *TINY_DIT, "debug=plan", "trainer.max_steps=1", "name=test")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    network = DiT(width=24, layers=2, heads=2, context_width=128)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert ["dit", f"{count / 1000:.2f}", "k", "trained"] in lines
    for pass_ in ("forward", "backward"):
        assert float(next(line[2] for line in lines if line[:2] == ["dit,", pass_])) > 0


@pytest.mark.parametrize("how", [(), ("debug=plan",)], ids=["training", "plan"])
def test_a_size_that_patches_do_not_cover_is_refused_before_training(tmp_path: Path, how: tuple[str, ...]) -> None:
    told = refusal(tmp_path, *TINY_DIT, *ALONE, "trainer.max_steps=1", "training.size=[64,72]", *how)
    assert told == "training.size is 64x72, but this model takes heights and widths that are multiples of 16"


@pytest.mark.parametrize("data", ["shapes", "shapes_online"])  # of latents and of images
def test_data_of_another_size_are_refused_before_training(tmp_path: Path, data: str) -> None:
    sizes = f"data={data}", "model.patch=3", "training.size=[96,96]"
    told = refusal(tmp_path, *TINY_DIT, *ALONE, *sizes, "trainer.max_steps=1")
    assert told.startswith("the images of data.module.train are 64x64, but training.size is [96, 96]")


@pytest.mark.slow
def test_two_ranks_with_half_of_the_weights_train_and_resume_as_one_process_does(tmp_path: Path) -> None:
    how = *TINY_DIT, *SAME, *ALONE
    halves = "strategy=fsdp", "trainer.devices=2", "data.batch_size=2", f"run_dir={tmp_path}/two", "resume=auto"
    whole = "data.batch_size=4", f"run_dir={tmp_path}/one"
    for more in ((*whole, "trainer.max_steps=6"), (*halves, "trainer.max_steps=3"), (*halves, "trainer.max_steps=6")):
        command = [sys.executable, "train.py", *how, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (checkpoint_file.read(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two"))
    for part in ("state_dict", "ema"):
        for name, weight in one[part].items():  # means over two batches of 2 are rounded otherwise than over 4
            torch.testing.assert_close(two[part][name], weight, rtol=1e-4, atol=1e-5)
    exported = load_file(tmp_path / "two" / "dit.safetensors")
    assert all(torch.equal(exported[name], average) for name, average in two["ema"].items())

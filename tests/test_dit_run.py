"""Tests training, sampling, evaluation and conversion of a diffusion transformer."""

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
from tests.callbacks.ranks import train_on_two
from tests.runs import ALONE, TINY_DIT, refusal, run

ROOT = Path(__file__).parents[1]
SAME = ("precision=fp32", "optimizer=adamw")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished and evaluated run."""
    evaluation = "evaluation.prompts=4", "evaluation.count=8", *ALONE[1:]
    return run(tmp_path_factory.mktemp("trained"), *TINY_DIT, *SAME, *evaluation, "trainer.max_steps=4")


def test_a_finished_run_writes_all_of_its_files(trained: Path) -> None:
    assert {"metrics", "provenance"} <= json.loads((trained / "metrics.json").read_text()).keys()
    assert Image.open(trained / "samples" / "final.png").size > (64, 64)
    for path in (trained, trained / "dit.safetensors"):
        assert isinstance(read_model(path).backbone, DiT)


def test_a_dit_is_evaluated_at_the_end_of_its_run(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())["metrics"]
    assert {"fid", "clip_score", "accuracy", "noise_loss"} <= metrics.keys()
    assert metrics["nfe"] == 2 + 1  # the first step is guided: with and without the prompt


def test_a_resumed_run_ends_bit_for_bit_like_the_uninterrupted_one(trained: Path, tmp_path: Path) -> None:
    for steps in (2, 4):
        run(tmp_path, *TINY_DIT, *SAME, *ALONE, f"trainer.max_steps={steps}", "resume=auto")
    ours, theirs = (checkpoint_file.read(folder / "checkpoints" / "last.ckpt") for folder in (tmp_path, trained))
    for part in ("state_dict", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part]), part


@pytest.mark.slow
def test_resuming_a_run_of_another_backbone_is_refused(trained: Path) -> None:
    message = refusal(trained, "trainer.max_steps=5", "resume=auto", "accept_changes=true", *ALONE)
    assert "a different model than this config builds (kind dit → unet" in message


def test_a_dit_trains_with_gradient_checkpointing(tmp_path: Path) -> None:
    run(tmp_path, *TINY_DIT, *SAME, *ALONE, "trainer.max_steps=1", "+model.checkpointing=true")
    assert (tmp_path / "dit.safetensors").is_file()


def test_images_depend_only_on_prompt_and_seed(trained: Path) -> None:
    pipeline = Pipeline.load(str(trained), "cpu")
    result = pipeline(["a red circle", "a blue square"], seeds=[1, 2])
    assert result.images.shape == (2, 3, 64, 64)
    alone = pipeline("a blue square", seeds=2).images
    assert int((result.images[1:].int() - alone.int()).abs().max()) <= 1


@pytest.mark.slow
def test_sample_py_generates_images_from_the_run(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "sample.py", "a red circle", f"model={trained}", "size=32x48", f"out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "0000.png").size == (48, 32)


def test_info_describes_the_dit(trained: Path) -> None:
    described = describe(str(trained / "dit.safetensors"))
    assert described["kind"] == "a dit written by ldm" and described["architecture"].startswith(
        "channels=8, width=24, layers=2"
    )
    assert described["parameters"] == f"{sum(p.numel() for p in read_model(trained).backbone.parameters()):,}"


def test_ldm_evaluate_measures_the_dit(trained: Path, tmp_path: Path) -> None:
    small = ["--data", "shapes", "--prompts", "4", "--count", "8", "--validation", "2", "--steps", "1"]
    assert main(["evaluate", str(trained), *small, "--out", str(tmp_path / "e.json")]) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["metrics"]["nfe"] == 2 and result["metrics"]["noise_loss"] > 0


def test_a_dit_is_converted_to_the_ldm_format_only(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(trained), str(tmp_path / "own"), "--to", "ldm"]) == 0
    assert open_contents(tmp_path / "own").denoising.fingerprint == open_contents(trained).denoising.fingerprint
    assert main(["convert", str(trained), str(tmp_path / "m.safetensors")]) == 1
    assert "holds a dit, which only ldm's own format can store: give --to ldm" in capsys.readouterr().err


def test_the_plan_lists_parameters_and_work_of_the_dit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, *TINY_DIT, "debug=plan", "trainer.max_steps=1", "name=test")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    network = DiT(channels=8, width=24, layers=2, heads=2, context_width=128)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert ["dit", f"{count / 1000:.2f}", "k", "trained"] in lines
    for pass_ in ("forward", "backward"):
        assert float(next(line[2] for line in lines if line[:2] == ["dit,", pass_])) > 0


@pytest.mark.parametrize("how", [(), ("debug=plan",)], ids=["training", "plan"])
def test_a_size_that_patches_do_not_divide_is_refused_before_training(tmp_path: Path, how: tuple[str, ...]) -> None:
    message = refusal(tmp_path, *TINY_DIT, *ALONE, "trainer.max_steps=1", "training.size=[64,72]", *how)
    expected = "training.size is 64x72, but this model takes heights and widths that are positive multiples of 16"
    assert message == expected


@pytest.mark.parametrize("data", ["shapes", "shapes_online"])  # of latents and of images
def test_data_of_another_size_is_refused_before_training(tmp_path: Path, data: str) -> None:
    sizes = f"data={data}", "model.patch=3", "training.size=[96,96]"
    message = refusal(tmp_path, *TINY_DIT, *ALONE, *sizes, "trainer.max_steps=1")
    assert message.startswith("the images of data.module.train are 64x64, but training.size is [96, 96]")


@pytest.mark.slow
def test_two_ranks_with_sharded_weights_train_and_resume_like_one_process(tmp_path: Path) -> None:
    how = *TINY_DIT, *SAME, *ALONE
    sharded = "strategy=fsdp", "trainer.devices=2", "data.batch_size=2", "resume=auto"
    run(tmp_path / "one", *how, "data.batch_size=4", "trainer.max_steps=6")
    for steps in (3, 6):
        more = *how, *sharded, f"trainer.max_steps={steps}"
        codes, stderr = train_on_two(tmp_path, lambda _, more=more: run(tmp_path / "two", *more) and None)  # type: ignore[misc]
        assert codes == [0, 0], stderr
    one, two = (checkpoint_file.read(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two"))
    for part in ("state_dict", "ema"):
        for name, weight in one[part].items():  # means over two batches of 2 are rounded differently than over 4
            torch.testing.assert_close(two[part][name], weight, rtol=1e-4, atol=1e-5)
    exported = load_file(tmp_path / "two" / "dit.safetensors")
    assert all(torch.equal(exported[name], average) for name, average in two["ema"].items())

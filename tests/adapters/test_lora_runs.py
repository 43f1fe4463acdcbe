"""Tests training a LoRA with train.py and using the run in the other commands."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.__main__ import main
from ldm.commands.info.command import describe
from ldm.commands.sample import command as sample
from ldm.image import read_metadata
from ldm.weights.adapters.reader import open_adapter
from ldm.weights.model import read_model
from tests.runs import ALONE, TINY, refusal, run

pytestmark = pytest.mark.slow
LORA = ("adapter=lora", "adapter.rank=2")
ADAM = (*TINY, *ALONE, "optimizer=adamw", "optimizer.lr=1e-2")
SMALL = ["--data", "shapes", "--prompts", "2", "--count", "8", "--validation", "2", "--steps", "1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("base"), *ADAM, "trainer.max_steps=2")


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA run that was stopped and resumed."""
    folder, how = tmp_path_factory.mktemp("adapted"), (*ADAM, *LORA, f"training.start={base}")
    run(folder, *how, "trainer.max_steps=1")
    return run(folder, *how, "trainer.max_steps=3", "resume=auto")


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(base: Path, adapted: Path, tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", *ADAM, *LORA, f"training.start={base}", "trainer.max_steps=3")
    one, two = (load_file(folder / "adapter.safetensors") for folder in (straight, adapted))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if name.endswith("lora_up.weight"))


def test_sampling_from_the_run_equals_sampling_from_base_and_lora(base: Path, adapted: Path, tmp_path: Path) -> None:
    prompt = ("a red circle", "steps=2", "precision=32")
    exported = [*prompt, f"model={adapted / 'adapter.safetensors'}", f"out={tmp_path / 'a'}"]
    added = [*prompt, f"model={base}", f"lora={adapted}", f"out={tmp_path / 'b'}"]
    assert sample.main(exported) == sample.main(added) == 0
    one, two = (Image.open(tmp_path / name / "0000.png").tobytes() for name in "ab")
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1
    assert read_metadata(tmp_path / "b" / "0000.png")["lora"][0]["path"] == str(adapted)


def test_info_describes_the_base_and_the_settings(base: Path, adapted: Path) -> None:
    described = describe(str(adapted / "adapter.safetensors"))
    assert described["base"].startswith(f"{base} (") and "rank=2" in described["settings"]


def test_a_run_can_be_converted_to_the_diffusers_layout(adapted: Path, tmp_path: Path) -> None:
    assert main(["convert", str(adapted), str(tmp_path / "folder")]) == 0
    file = open_adapter(tmp_path / "folder")
    assert file.layout == "diffusers" and {layer.network for layer in file.layers} == {"unet"}


def test_a_run_can_be_merged_into_its_base(base: Path, adapted: Path, tmp_path: Path) -> None:
    assert main(["merge", str(base), str(adapted), "--out", str(tmp_path / "merged"), "--to", "ldm"]) == 0
    one, two = (read_model(path).backbone.state_dict() for path in (adapted, tmp_path / "merged"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_power_averages_of_any_length_can_be_evaluated(base: Path, tmp_path: Path) -> None:
    average = "ema=power", "ema.every_n_train_steps=1", "trainer.max_steps=3"
    folder = run(tmp_path / "run", *ADAM, *LORA, f"training.start={base}", *average)
    assert main(["ema", str(folder), "--length", "0.1"]) == 0
    found = []
    for arguments in ([str(folder), "--ema-length", "0.1"], [str(folder / "ema_0.100.safetensors")], [str(folder)]):
        out = tmp_path / f"{len(found)}.json"
        assert main(["evaluate", *arguments, *SMALL, "--out", str(out)]) == 0
        found.append(json.loads(out.read_text())["metrics"]["noise_loss"])
    assert found[0] == found[1] != found[2]


def test_training_and_planning_work_with_a_bfloat16_base(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = "adapter.base_dtype=bfloat16"
    folder = run(
        tmp_path / "run", *ADAM, *LORA, half, "precision=bf16-mixed", f"training.start={base}", "trainer.max_steps=2"
    )
    assert {weight.dtype for weight in read_model(folder).backbone.parameters()} == {torch.float32}
    capsys.readouterr()
    weights = []
    for how in ((), (half,)):
        run(tmp_path, *ADAM, *LORA, *how, "precision=bf16-mixed", "debug=plan", "trainer.max_steps=1")
        lines = capsys.readouterr().out.splitlines()
        number, unit = next(line.split()[1:3] for line in lines if line.split()[:1] == ["weights"])
        weights.append(float(number) * {"KiB": 1, "MiB": 1024}[unit])
    assert weights[1] < 0.7 * weights[0]


def test_a_bfloat16_base_requires_mixed_precision(base: Path, tmp_path: Path) -> None:
    how = "adapter.base_dtype=bfloat16", "precision=fp32", f"training.start={base}", "trainer.max_steps=1"
    assert "adapter.base_dtype=bfloat16 needs a precision that casts the inputs" in refusal(
        tmp_path, *ADAM, *LORA, *how
    )


def test_targets_that_match_no_layer_of_the_network_are_refused(base: Path, tmp_path: Path) -> None:
    how = "adapter.targets=[attn2]", f"training.start={base}", "trainer.max_steps=1"
    assert "attn2 selects no linear or convolution layer" in refusal(tmp_path, *ADAM, *LORA, *how)


def test_a_lora_of_a_dit_can_be_trained(tmp_path: Path) -> None:
    dit = ("model=shapes_dit", "model.width=24", "model.layers=2", "model.heads=2", *TINY[4:], *ADAM[len(TINY) :])
    base = run(tmp_path / "base", *dit, "trainer.max_steps=1")
    folder = run(
        tmp_path / "run", *dit, *LORA, "adapter.targets=transformer", f"training.start={base}", "trainer.max_steps=2"
    )
    assert all(name.startswith("lora_unet_blocks_") for name in load_file(folder / "adapter.safetensors"))
    assert read_model(folder).backbone.kind == "dit"

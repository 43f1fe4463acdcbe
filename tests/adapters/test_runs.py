"""Adapters trained by train.py, and used by the other commands."""

import json
import re
from pathlib import Path

import pytest
import torch

from ldm.__main__ import main
from ldm.commands.info.command import describe
from ldm.weights.native import read_about
from tests.runs import ALONE, TINY, refusal, run

ADAPTER = "adapter=cross_attention"
ADAM = (*TINY, *ALONE, "optimizer=adamw", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, trained until the text affects its output, because the text layers are initialised to zero."""
    return run(tmp_path_factory.mktemp("base"), *ADAM, "trainer.max_steps=4")


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter run that was stopped and resumed."""
    folder, how = tmp_path_factory.mktemp("adapted"), (*ADAM, ADAPTER, f"training.start={base}")
    run(folder, *how, "trainer.max_steps=1")
    return run(folder, *how, "trainer.max_steps=3", "resume=auto")


def test_a_run_exports_an_adapter_instead_of_a_network(base: Path, adapted: Path) -> None:
    assert (adapted / "adapter.safetensors").is_file() and not (adapted / "unet.safetensors").exists()
    about, network = read_about(adapted / "adapter.safetensors"), read_about(base / "unet.safetensors")
    assert about["kind"] == "adapter" and about["config"] == {"name": "train_only", "names": ["*.text_attention.*"]}
    assert about["base"]["weights"] == str(base)
    assert about["base"]["network"] == {name: network[name] for name in ("kind", "config")}
    assert about["model"] == network["model"]


def test_its_checkpoint_does_not_contain_the_frozen_weights(base: Path, adapted: Path) -> None:
    sizes = [(folder / "checkpoints" / "last.ckpt").stat().st_size for folder in (base, adapted)]
    state = torch.load(adapted / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    full = torch.load(base / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    frozen = sum(tensor.nbytes for name, tensor in full.items() if name not in state)
    assert sizes[0] - sizes[1] > 4 * frozen  # weights, their average and Adam's two moments


@pytest.mark.parametrize("file", ["", "adapter.safetensors", "checkpoints/last.ckpt"])
def test_info_shows_the_base_and_the_number_of_trained_parameters(base: Path, adapted: Path, file: str) -> None:
    described = describe(str(adapted / file))
    fingerprint = read_about(adapted / "adapter.safetensors")["base"]["fingerprint"]
    assert described["base"] == f"{base} ({fingerprint[:12]})"
    assert described["base's network"].startswith("unet, in_channels=8")
    assert described["settings"] == "name=train_only, names=['*.text_attention.*']"
    names = torch.load(adapted / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert described["parameters"] == f"{sum(tensor.numel() for tensor in names.values()):,}"


def test_info_shows_no_base_for_a_model(base: Path) -> None:
    assert "base" not in describe(str(base))


@pytest.mark.slow
def test_an_adapter_is_evaluated_like_a_model(adapted: Path, base: Path, tmp_path: Path) -> None:
    small = ["--data", "shapes", "--prompts", "4", "--count", "8", "--validation", "2", "--steps", "1"]
    results = []
    for model in (base, adapted):
        out = tmp_path / f"{model.name}.json"
        assert main(["evaluate", str(model), *small, "--out", str(out)]) == 0
        results.append(json.loads(out.read_text()))
    assert results[0]["metrics"]["noise_loss"] != results[1]["metrics"]["noise_loss"]


@pytest.mark.slow
def test_an_average_of_any_length_of_an_adapter_is_evaluated(base: Path, tmp_path: Path) -> None:
    average = "ema=power", "ema.every_n_train_steps=1", "trainer.max_steps=3"
    folder = run(tmp_path / "run", *ADAM, ADAPTER, f"training.start={base}", *average)
    assert main(["ema", str(folder), "--length", "0.1"]) == 0
    small = ["--data", "shapes", "--prompts", "2", "--count", "8", "--validation", "2", "--steps", "1"]
    results = []
    for arguments in ([str(folder), "--ema-length", "0.1"], [str(folder / "ema_0.100.safetensors")]):
        out = tmp_path / f"{len(results)}.json"
        assert main(["evaluate", *arguments, *small, "--out", str(out)]) == 0
        results.append(json.loads(out.read_text())["metrics"]["noise_loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_conversion_of_an_adapter_is_refused(adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(adapted), str(tmp_path / "m.safetensors")]) == 1
    assert re.search("is an adapter of .* give the complete model", capsys.readouterr().err)


def test_an_adapter_of_an_adapter_is_refused(adapted: Path, tmp_path: Path) -> None:
    message = refusal(tmp_path, *TINY, *ALONE, ADAPTER, f"training.start={adapted}", "trainer.max_steps=1")
    assert "holds no denoising network (it holds adapter)" in message


def test_an_adapter_without_a_model_to_start_from_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, *TINY, *ALONE, ADAPTER, "trainer.max_steps=1")
    assert message == "an adapter needs the weights of a trained model: give training.start=MODEL"


def test_an_adapter_of_a_run_without_a_denoising_network_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "experiment=shapes_vae", "data.shards=none.tar", *ALONE[1:], ADAPTER)
    assert message.startswith("an adapter needs a denoising network, but this experiment trains none")


def test_names_that_match_no_weight_are_refused(base: Path, tmp_path: Path) -> None:
    message = refusal(tmp_path, *TINY, *ALONE, ADAPTER, "adapter.names=[attn2.*]", f"training.start={base}")
    assert message.startswith("adapter.names=['attn2.*'] matches no weight of this unet")


def test_a_run_does_not_resume_on_another_base(adapted: Path, tmp_path: Path) -> None:
    other = run(tmp_path / "other", *ADAM, "trainer.max_steps=1", "seed=1")
    how = f"training.start={other}", f"resume={adapted}/checkpoints/last.ckpt", "trainer.max_steps=4"
    message = refusal(tmp_path / "again", *ADAM, ADAPTER, *how, "accept_changes=true")
    assert re.match(
        r"the checkpoint contains a different model than this config builds \(base \w{64} → \w{64}\)", message
    )


def test_the_plan_counts_gradients_and_states_of_trained_weights_only(
    base: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = torch.load(adapted / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    count, plans = sum(tensor.numel() for tensor in trained.values()), {}
    for name, how in (("full", ()), ("adapter", (ADAPTER,))):
        run(tmp_path, *ADAM, "debug=plan", "trainer.max_steps=1", *how)
        plans[name] = capsys.readouterr().out.splitlines()
    assert f"{count / 1000:.2f} k of them trained" in next(line for line in plans["adapter"] if "of them" in line)

    def kib(name: str, row: str) -> float:
        """Returns the memory in a row of a plan, in KiB."""
        number, unit = next(line.split()[1:3] for line in plans[name] if line.split()[:1] == [row])
        return float(number) * {"KiB": 1, "MiB": 1024}[unit]

    assert kib("adapter", "gradients") == kib("adapter", "EMA") == pytest.approx(4 * count / 1024, rel=1e-2)
    assert kib("adapter", "optimizer") == pytest.approx(8 * count / 1024, rel=1e-2)
    assert kib("adapter", "weights") == kib("full", "weights")
    for row in ("gradients", "optimizer", "EMA", "activations", "all"):
        assert kib("adapter", row) < kib("full", row)

"""Tests `ldm merge` and `ldm extract`."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.__main__ import main
from ldm.adapters.change import LowRankChange
from ldm.adapters.targets import layers
from ldm.pipeline.pipeline import Pipeline
from ldm.weights.adapters.extraction import best, extract
from ldm.weights.adapters.reader import open_adapter
from ldm.weights.adapters.writer import write_adapter
from ldm.weights.contents import open_contents
from ldm.weights.convert import write
from ldm.weights.model import read_model
from tests.tiny import save_tiny_model, tiny_text_tower, tiny_unet
from tests.weights.adapters.made import changes
from tests.weights.foreign import ODD, full_model, networks

State = dict[str, Tensor]


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A Stable Diffusion model in a single file."""
    write(full_model(ODD), tmp_path / "m.safetensors", "single")
    return tmp_path / "m.safetensors"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    own = networks(ODD)
    made = {"unet": changes(own["unet"]), "text_encoder": changes(own["text_tower"], magnitude=0)}
    write_adapter(tmp_path / "lora.safetensors", made, "kohya", {})
    return tmp_path / "lora.safetensors"


def states(path: Path) -> dict[str, State]:
    return {kind: network.load().state_dict() for kind, network in open_contents(path).networks.items()}


@pytest.mark.parametrize(("name", "to"), [("out.safetensors", "single"), ("out", "diffusers"), ("own", "ldm")])
def test_a_merged_model_is_bit_identical_to_a_pipeline_with_the_adapters(
    name: str, to: str, single: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    assert main(["merge", str(single), f"{lora}:0.8", f"{lora}:-0.3", "--out", str(out), "--to", to]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    pipeline = Pipeline.load(str(single), "cpu", adapters=[(lora, 0.8), (lora, -0.3)])
    merged = states(out) if to != "ldm" else {"unet": read_model(out).backbone.state_dict()}
    for name, weight in pipeline.backbone.state_dict().items():
        assert torch.equal(weight, merged["unet"][name])
    plain, text = states(single), pipeline.text_encoder.towers[0].state_dict()
    if to != "ldm":
        assert all(torch.equal(weight, merged["text_tower"][name]) for name, weight in text.items())
        assert all(torch.equal(weight, merged["vae"][name]) for name, weight in plain["vae"].items())
    assert not all(torch.equal(text[name], plain["text_tower"][name]) for name in text)


def test_a_merged_model_keeps_its_dtypes_unless_dtype_is_given(single: Path, lora: Path, tmp_path: Path) -> None:
    half, out = tmp_path / "half.safetensors", tmp_path / "out.safetensors"
    assert main(["convert", str(single), str(half), "--dtype", "float16"]) == 0
    assert main(["merge", str(half), str(lora), "--out", str(out)]) == 0
    assert {header.dtype for header in open_contents(out).networks["unet"].tensors.values()} == {"F16"}
    assert main(["merge", str(half), str(lora), "--out", str(out), "--dtype", "float32", "--overwrite"]) == 0
    assert {header.dtype for header in open_contents(out).networks["unet"].tensors.values()} == {"F32"}


def test_merge_errors_are_one_line(
    single: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny").mkdir()
    other = save_tiny_model(tmp_path / "tiny")
    assert main(["merge", str(other), str(lora), "--out", str(tmp_path / "x"), "--to", "ldm"]) == 1
    assert main(["merge", str(single), str(tmp_path / "nowhere:0.5"), "--out", str(tmp_path / "x")]) == 1
    assert main(["merge", str(single), str(lora), "--out", str(lora), "--overwrite"]) == 1
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (
        "is one of another model" in printed[0]
        and "there is no adapter" in printed[1]
        and "is the source" in printed[2]
    )


def test_the_residual_of_the_best_change_is_the_smaller_singular_values() -> None:
    difference = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for rank in (1, 3, 6, 9):
        change = best(difference, rank)
        left = (difference - change.delta()).square().sum()
        values = torch.linalg.svdvals(difference.flatten(1))
        torch.testing.assert_close(left, values[rank:].square().sum(), rtol=1e-4, atol=1e-8)
        assert change.rank == min(rank, 6) == change.alpha


def test_extract_recovers_a_lora_from_a_merged_model() -> None:
    base, tuned = tiny_unet(), tiny_unet()
    names = {name: layer for name, layer in layers(tuned).items() if name.endswith(("to_q", "conv1"))}
    for layer in names.values():
        outputs, inputs, *kernel = layer.weight.shape
        change = LowRankChange(torch.randn(2, inputs, *kernel), torch.randn(outputs, 2, *[1] * len(kernel)), 1.0)
        layer.weight.data = change.changed(layer.weight.data)
    found = extract(base, tuned, 2)
    assert found.changes.keys() == names.keys() and found.error < 1e-4 and not found.others
    for name, change in found.changes.items():
        torch.testing.assert_close(
            change.changed(layers(base)[name].weight.detach()), names[name].weight.detach(), rtol=1e-3, atol=1e-4
        )
    assert extract(base, tuned, 1).error > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_the_base_with_an_extracted_lora_reproduces_the_tuned_model(
    layout: str, single: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    assert main(["merge", str(single), str(lora), "--out", str(tuned)]) == 0
    assert main(["extract", str(single), str(tuned), "--rank", "64", "--out", str(out), "--to", layout]) == 0
    printed = capsys.readouterr().out
    assert float(re.search(r"unet: \d+ layers; (\S+)% of the difference's norm is missing", printed)[1]) < 0.01  # type: ignore[index]
    file = open_adapter(out)
    assert file.layout == layout and file.metadata["ss_sd_model_name"] == "m.safetensors"
    ours, theirs = (Pipeline.load(str(path), "cpu", adapters=how) for path, how in ((single, [out]), (tuned, [])))
    for one, two in zip(ours.backbone.parameters(), theirs.backbone.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_extract_lists_differences_that_a_lora_cannot_represent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = tiny_unet(), tiny_unet()
    tuned.norm_out.weight.data += 1
    tuned.conv_in.weight.data += 1
    next(iter(layers(tuned.down).values())).weight.data += torch.randn(8, 8, 3, 3)
    found = extract(base, tuned, 8)
    assert {*found.others} == {"norm_out.weight", "conv_in.weight"}
    assert found.left_out == pytest.approx(8 + 8 * 4 * 9, rel=1e-5)
    assert found.error == pytest.approx((found.left_out / found.total) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(("rank", "message"), [("0", "the rank is 0"), ("4", "there is nothing to extract")])
def test_extract_refuses_equal_models_and_rank_0(
    rank: str, message: str, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["extract", str(single), str(single), "--rank", rank, "--out", str(tmp_path / "x.safetensors")]
    assert main(argv) == 1 and message in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_the_error_for_different_architectures_contains_both_shapes(
    single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_model(tmp_path)
    argv = ["extract", str(single), str(other), "--rank", "2", "--out", str(tmp_path / "x.safetensors")]
    assert main(argv) == 1
    assert re.search(r"another architecture than that of .*: \S+ is (\[.*\]|absent) there and", capsys.readouterr().err)


def test_a_lora_of_the_text_tower_is_extracted() -> None:
    base, tuned = tiny_text_tower(), tiny_text_tower(seed=7)
    found = extract(base, tuned, 64)
    assert len(found.changes) == 6 and "token_embedding.weight" in found.others


def test_extract_includes_the_text_encoder_that_a_model_of_ldm_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, lora, out = save_tiny_model(tmp_path), tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    write_adapter(lora, {"text_encoder": changes(tiny_text_tower(), "attention")}, "kohya", {})
    assert main(["merge", str(base), str(lora), "--out", str(tmp_path / "tuned"), "--to", "ldm"]) == 0
    assert main(["extract", str(base), str(tmp_path / "tuned"), "--rank", "16", "--out", str(out)]) == 0
    assert "text_encoder: 4 layers; 0.00% of" in capsys.readouterr().out
    assert open_adapter(out).networks == ["text_encoder"]
    tower = tmp_path / "tuned" / "text_tower.safetensors"
    assert main(["extract", str(base), str(tower), "--rank", "16", "--out", str(out), "--overwrite"]) == 0
    assert f"unet: not compared, because only {base} contains it" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["lora", "lora.bin"])
def test_extract_writes_only_safetensors(
    name: str, single: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["extract", str(single), str(single), "--rank", "2", "--out", str(single.with_name(name))]
    assert main(argv) == 2 and "is written to a .safetensors file" in capsys.readouterr().err

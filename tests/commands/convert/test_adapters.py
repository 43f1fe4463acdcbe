"""Tests `ldm convert` and `ldm info` on adapters and textual inversions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.__main__ import main
from ldm.commands.info.command import describe
from ldm.weights.adapters.reader import open_adapter
from ldm.weights.adapters.writer import write_adapter
from tests.tiny import save_tiny_model, tiny_text_tower, tiny_unet
from tests.weights.adapters.made import changes, same

FACTS = {"modelspec.license": "CC-BY-4.0", "ss_sd_model_name": "v1-5.safetensors", "ss_steps": "800"}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    made = {"unet": changes(tiny_unet(), magnitude=0), "text_encoder": changes(tiny_text_tower(), magnitude=0)}
    write_adapter(tmp_path / "lora.safetensors", made, "kohya", FACTS)
    return tmp_path / "lora.safetensors"


@pytest.fixture
def embedding(tmp_path: Path) -> Path:
    save_file({"emb_params": torch.randn(3, 16)}, tmp_path / "zorp.safetensors")
    return tmp_path / "zorp.safetensors"


def test_converting_an_adapter_to_diffusers_and_back_is_lossless(lora: Path, tmp_path: Path) -> None:
    assert main(["convert", str(lora), str(tmp_path / "folder")]) == 0
    file = tmp_path / "folder" / "pytorch_lora_weights.safetensors"
    assert open_adapter(file).layout == "diffusers"
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "back.safetensors")]) == 0
    one, two = load_file(lora), load_file(tmp_path / "back.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with safe_open(tmp_path / "back.safetensors", "pt") as found:
        assert FACTS.items() <= found.metadata().items()


def test_converting_to_float16_keeps_the_alphas(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    assert main(["convert", str(lora), str(out), "--to", "kohya", "--dtype", "float16"]) == 0
    made = changes(tiny_unet(), magnitude=0)
    found = open_adapter(out).by_public_name()["unet"]
    assert all(
        change.down.dtype == torch.float16 and change.alpha == made[name].alpha for name, change in found.items()
    )  # type: ignore[attr-defined]


def test_overwrite_replaces_only_files_that_a_conversion_wrote(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    argv = ["convert", str(lora), str(out)]
    assert main(argv) == 0 and main(argv) == 1 and main([*argv, "--overwrite"]) == 0
    save_file({"a": torch.ones(1)}, out)
    assert main([*argv, "--overwrite"]) == 1
    assert main(["convert", str(lora), str(lora), "--overwrite"]) == 1
    message = capsys.readouterr().err
    assert (
        "already exists" in message
        and "was not written by a conversion" in message
        and "a destination outside" in message
    )


def test_converting_an_embedding_to_diffusers_and_back_is_lossless(embedding: Path, tmp_path: Path) -> None:
    assert main(["convert", str(embedding), str(tmp_path / "folder")]) == 0
    file = tmp_path / "folder" / "learned_embeds.safetensors"
    assert [*load_file(file)] == ["zorp"]
    (tmp_path / "back").mkdir()
    assert main(["convert", str(file), str(tmp_path / "back" / "zorp.safetensors")]) == 0
    assert torch.equal(
        load_file(tmp_path / "back" / "zorp.safetensors")["emb_params"], load_file(embedding)["emb_params"]
    )


@pytest.mark.parametrize(
    "options", [["--part", "unet"], ["--shard", "1GB"], ["--raw"], ["--to", "single"], ["--to", "ldm"]], ids=" ".join
)
def test_options_for_models_are_usage_errors_for_adapters(
    options: list[str], lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(lora), str(tmp_path / "x.safetensors"), *options]) == 2
    assert f"to which {options[0]}" in capsys.readouterr().err


def test_the_kohya_layout_is_refused_for_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path)
    assert main(["convert", str(model), str(tmp_path / "x.safetensors"), "--to", "kohya"]) == 2
    assert "--to kohya is for adapters" in capsys.readouterr().err


def test_info_describes_the_layers_and_metadata_of_an_adapter(lora: Path) -> None:
    described, made = describe(str(lora)), changes(tiny_unet())
    assert described["kind"] == "a LoRA with magnitudes (DoRA) in the layout of kohya"
    assert described["unet"] == f"{len(made)} layers, rank 2 to 3, alpha 1 to 4"
    assert described["text encoder"].startswith("6 layers, rank 2 to 3")
    assert (
        described["base"] == "v1-5.safetensors" and described["licence"] == "CC-BY-4.0" and described["steps"] == "800"
    )
    with safe_open(lora, "pt") as file:
        sizes = [file.get_tensor(name).numel() for name in file.keys() if not name.endswith("alpha")]  # noqa: SIM118
    assert described["parameters"] == f"{sum(sizes):,}"


def test_info_describes_the_token_and_vectors_of_a_textual_inversion(embedding: Path, tmp_path: Path) -> None:
    described = describe(str(embedding))
    assert described["kind"] == "a textual inversion in the layout of kohya" and described["token"] == "zorp"
    assert described["text encoder"] == "3 vectors of width 16"
    torch.save({"string_to_param": {"*": torch.ones(1, 768)}, "name": "cat", "step": 5}, tmp_path / "a.pt")
    described = describe(str(tmp_path / "a.pt"))
    assert described["kind"].endswith("of A1111") and described["token"] == "cat" and described["step"] == "5"


def test_info_names_other_adapter_algorithms(tmp_path: Path) -> None:
    label = "lora_unet_down_blocks_1_attentions_0_proj_in"
    parts = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(8, 8)}
    save_file({f"{label}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "a.safetensors")
    described = describe(str(tmp_path / "a.safetensors"))
    assert described["kind"] == "a LoKr in the layout of kohya" and described["unet"] == "1 layers"


def test_the_error_for_an_adapter_given_as_a_model_suggests_the_option(
    lora: Path, embedding: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, key in ((lora, "lora=FILE"), (embedding, "embedding=FILE")):
        assert main(["merge", str(path), str(lora), "--out", "x"]) == 1
        assert key in capsys.readouterr().err


def test_written_metadata_of_peft_contain_the_alpha_of_each_layer(lora: Path, tmp_path: Path) -> None:
    assert main(["convert", str(lora), str(tmp_path / "a.safetensors"), "--to", "diffusers"]) == 0
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    made = changes(tiny_unet(), magnitude=0)
    for name, change in made.items():
        alpha = settings["unet.alpha_pattern"].get(name, settings["unet.lora_alpha"])
        assert alpha == change.alpha  # type: ignore[attr-defined]
    again = open_adapter(tmp_path / "a.safetensors").by_public_name()["unet"]
    assert all(same(again[name], change) for name, change in made.items())

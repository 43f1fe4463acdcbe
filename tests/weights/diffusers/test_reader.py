import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.weights.contents import open_contents
from ldm.weights.convert import part, write
from ldm.weights.diffusers.reader import PARTS, read_folder, weights_file
from tests.weights.foreign import ODD, SAMPLING, SCHEDULE, full_model, loaded, networks, same


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_each_network_is_read_from_its_folder(folder: Path) -> None:
    expected = networks(ODD)
    read = {"unet": loaded(folder / "unet", "unet"), "vae": loaded(folder / "vae", "vae")}
    read["text_tower"] = loaded(folder / "text_encoder", "text_tower")
    for kind, network in read.items():
        assert network.config == expected[kind].config and not network.training
        assert same(network.state_dict(), expected[kind].state_dict())


def test_a_missing_subfolder_is_named(folder: Path) -> None:
    for name in ("vae", "tokenizer"):
        shutil.rmtree(folder / name)
    with pytest.raises(FileNotFoundError, match=r"m lacks vae, tokenizer; a diffusers folder consists of unet, vae"):
        read_folder(folder)


@pytest.mark.parametrize("name", PARTS)
def test_an_empty_subfolder_is_named(folder: Path, name: str) -> None:
    for file in (folder / name).iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}"):
        read_folder(folder)


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_unsupported_pipelines_are_refused_by_name(folder: Path, name: str) -> None:
    edited(folder / "model_index.json", _class_name=name)
    with pytest.raises(ValueError, match=f"is a {name}, which ldm does not read"):
        read_folder(folder)


def test_edited_configs_override_the_stored_settings(folder: Path) -> None:
    edited(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction", timestep_spacing="trailing")
    model = read_folder(folder).model
    assert model["prediction"] == "v" and model["sampling"]["spacing"] == "trailing"
    assert model["schedule"] == SCHEDULE and model["sampling"]["guidance"] == SAMPLING["guidance"]


def test_a_folder_of_another_tool_is_sampled_with_the_defaults_of_diffusers(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        save_file(load_file(file), file)
    model = read_folder(folder).model
    assert model["size"] == [16, 16] and model["sampling"] == SAMPLING | {"steps": 50, "guidance": 7.5}


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("convolution", [False, True])
def test_both_old_forms_of_autoencoder_attention_are_read(folder: Path, convolution: bool) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = {}
    for name, tensor in load_file(file).items():
        for new, old in OLD.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, old)
                tensor = tensor[:, :, None, None] if convolution and tensor.ndim == 2 else tensor
        state[name] = tensor
    assert any("query" in name for name in state)
    save_file(state, file)
    assert same(loaded(folder / "vae", "vae").state_dict(), networks(ODD)["vae"].state_dict())


def test_a_text_tower_is_read_with_or_without_the_text_model_prefix(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    state = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    save_file(state | {"embeddings.position_ids": torch.arange(9)[None]}, file)
    tower = loaded(folder / "text_encoder", "text_tower")
    assert same(tower.state_dict(), networks(ODD)["text_tower"].state_dict())


def test_bin_files_are_read(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert same(loaded(folder / "unet", "unet").state_dict(), networks(ODD)["unet"].state_dict())


def test_plain_files_are_preferred_to_variants_and_safetensors_to_bin(tmp_path: Path) -> None:
    names = [
        "diffusion_pytorch_model.fp16.bin",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors",
    ]
    expected: list[str] = []
    for name in names:
        (tmp_path / name).touch()
        expected.append(weights_file(tmp_path).name)
    assert expected == [names[0], names[1], names[1], names[1], names[4], names[5], names[6]]
    assert weights_file(tmp_path, "fp16").name == names[1]
    with pytest.raises(FileNotFoundError, match=r"no weights of variant bf16 \(available: fp16, plain\)"):
        weights_file(tmp_path, "bf16")


def test_a_weights_file_is_read_with_the_config_beside_it(folder: Path) -> None:
    contents = open_contents(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert contents.network("unet").full_config == networks(ODD)["unet"].config


def test_both_towers_of_a_clip_folder_are_read(tmp_path: Path) -> None:
    configs: dict[str, Any] = {
        "text_tower": {"width": 6, "layers": 1, "heads": 3, "vocab_size": 20, "context": 5, "projection": 4},
        "image_tower": {"size": 8, "patch": 4, "width": 9, "layers": 2, "heads": 3, "projection": 4},
    }
    model = replace(full_model(configs), model={})
    configs_of = {}
    for kind, section in (("text_tower", "text_config"), ("image_tower", "vision_config")):
        write(part(model, kind), tmp_path / kind, "diffusers")
        configs_of[section] = json.loads((tmp_path / kind / "config.json").read_text())
    both = load_file(tmp_path / "text_tower" / "model.safetensors")
    both |= load_file(tmp_path / "image_tower" / "model.safetensors") | {"logit_scale": torch.tensor(4.6)}
    (tmp_path / "clip").mkdir()
    save_file(both, tmp_path / "clip" / "model.safetensors")
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", **configs_of}))
    expected = networks(configs)
    assert same(loaded(tmp_path / "clip", "text_tower").state_dict(), expected["text_tower"].state_dict())
    assert same(loaded(tmp_path / "clip", "image_tower").state_dict(), expected["image_tower"].state_dict())


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_corrupt_config_is_named(folder: Path, content: str) -> None:
    (folder / "vae" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"vae/config\.json is not a JSON file of settings"):
        read_folder(folder)


@pytest.mark.parametrize(
    "changes", [{"block_out_channels": "wide"}, {"block_out_channels": [0, 0]}, {"layers_per_block": None}]
)
def test_a_config_that_describes_no_network_is_named(folder: Path, changes: dict[str, Any]) -> None:
    edited(folder / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=f"{next(iter(changes))}|do not match the expected UNet"):
        loaded(folder, "unet")


def test_an_unsupported_config_is_named(folder: Path) -> None:
    edited(folder / "vae" / "config.json", _class_name="AutoencoderTiny")
    with pytest.raises(ValueError, match=r"config\.json is the config of a model of type AutoencoderTiny, which"):
        read_folder(folder)


def test_all_differences_between_config_and_weights_are_listed(folder: Path) -> None:
    edited(folder / "unet" / "config.json", cross_attention_dim=13)
    with pytest.raises(ValueError, match=r"expected UNet \(\d+ of the wrong shape: .*to_k\.weight \[\d+, 12\] instead"):
        loaded(folder / "unet", "unet")

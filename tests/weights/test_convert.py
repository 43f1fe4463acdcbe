import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.weights.contents import open_contents
from ldm.weights.convert import part, verified, with_frozen_parts, write
from ldm.weights.formats import format_of
from tests.tiny import save_tiny_model
from tests.weights.foreign import ODD, ODD2, SD1, SD2, full_model, same, tensors_of

FORMATS = {
    "file": ("m.safetensors", "single"),
    "checkpoint": ("m.ckpt", "single"),
    "folder": ("m", "diffusers"),
    "ldm": ("m", "ldm"),
}


def converted(contents: Any, folder: Path, form: str) -> Path:
    name, to = FORMATS[form]
    folder.mkdir()
    write(verified(with_frozen_parts(contents)), folder / name, to)
    return folder / name


SD2_LIKE = ODD2 | {"text_tower": ODD["text_tower"] | {"activation": "gelu"}}  # every text layer is used
INPAINTING = ODD | {"unet": ODD["unet"] | {"in_channels": 9}}


FORWARDS, BACKWARDS = ("checkpoint", "folder", "ldm", "file"), ("ldm", "folder", "checkpoint", "file")


@pytest.mark.parametrize(
    "configs, names",
    [
        (INPAINTING, FORWARDS),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((ODD, FORWARDS), (ODD, BACKWARDS), (SD2_LIKE, FORWARDS))
        ),
    ],
)
def test_a_round_trip_through_all_formats_preserves_every_byte(
    tmp_path: Path, configs: dict[str, dict[str, Any]], names: tuple[str, ...]
) -> None:
    model = full_model(configs, prediction="v", pad=0)
    path = first = converted(model, tmp_path / "first", "file")
    for name in names:
        path = converted(open_contents(path), tmp_path / name, name)
        if name == "checkpoint":  # the same names in another container
            assert same(tensors_of(first), tensors_of(path))
    assert same(tensors_of(first), tensors_of(path))
    back = open_contents(path)
    assert back.model == model.model and back.pad == 0
    assert {kind: network.full_config for kind, network in back.networks.items()} == {
        kind: network.full_config for kind, network in model.networks.items()
    }
    index = json.loads((tmp_path / "folder" / "m" / "model_index.json").read_text())
    assert ("Inpaint" in index["_class_name"]) == ("inpainting" in back.description) == (configs is INPAINTING)


def test_converting_to_diffusers_drops_only_unused_text_layers(tmp_path: Path) -> None:
    model = full_model(ODD2, prediction="v", pad=0)
    first = converted(model, tmp_path / "1", "file")
    back = converted(open_contents(converted(open_contents(first), tmp_path / "2", "folder")), tmp_path / "3", "file")
    before, after = tensors_of(first), tensors_of(back)
    lost = before.keys() - after.keys()
    assert lost and all("resblocks.1." in name or name.endswith("text_projection") for name in lost)
    assert same(after, {name: before[name] for name in after})
    tokens = torch.tensor([[7, 5, 9]])
    towers = [open_contents(path).network("text_tower").load() for path in (first, back)]
    assert torch.equal(towers[0](tokens), towers[1](tokens))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_can_be_written_in_half_precision(tmp_path: Path, form: str) -> None:
    name, to = FORMATS[form]
    write(verified(full_model(ODD), torch.float16), tmp_path / name, to)
    network = with_frozen_parts(open_contents(tmp_path / name)).network("unet")
    expected = full_model(ODD).network("unet").load(torch.float16)
    assert same(network.load(None).state_dict(), expected.state_dict())


def test_a_folder_is_split_into_shards_of_at_most_the_given_size(tmp_path: Path) -> None:
    write(full_model(ODD), tmp_path / "m", "diffusers", shard=50_000)
    shards = sorted((tmp_path / "m" / "unet").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 50_000 for shard in shards)
    expected, network = full_model(ODD).network("unet"), open_contents(tmp_path / "m").network("unet")
    assert same(network.load().state_dict(), expected.load().state_dict())


@pytest.mark.parametrize("kind", ["unet", "vae", "text_tower"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_standalone_network_survives_a_round_trip(tmp_path: Path, form: str, kind: str) -> None:
    name, to = FORMATS[form]
    path = tmp_path / (name if form != "ldm" else "m.safetensors")
    write(part(full_model(ODD), kind), path, to)
    expected = full_model(ODD).network(kind)
    assert same(open_contents(path).network(kind).load().state_dict(), expected.load().state_dict())
    assert open_contents(path).network(kind).full_config == expected.full_config


def test_a_standalone_image_tower_survives_a_round_trip(tmp_path: Path) -> None:
    configs = {"image_tower": {"size": 8, "patch": 4, "width": 6, "layers": 2, "heads": 3, "projection": 5}}
    for form in FORMATS:
        name, to = FORMATS[form]
        path = tmp_path / form / (name if form != "ldm" else "m.safetensors")
        write(replace(full_model(configs), model={}), path, to)
        network, expected = open_contents(path).network("image_tower"), full_model(configs).network("image_tower")
        assert network.full_config == expected.full_config
        assert same(network.load().state_dict(), expected.load().state_dict())


def test_a_folder_in_the_own_format_can_be_moved(tmp_path: Path) -> None:
    converted(full_model(ODD), tmp_path / "1", "ldm")
    (tmp_path / "1" / "m").rename(tmp_path / "moved")
    assert set(with_frozen_parts(open_contents(tmp_path / "moved")).networks) == {"unet", "vae", "text_tower"}


def test_an_existing_destination_is_overwritten_only_on_request(tmp_path: Path) -> None:
    for name, to in FORMATS.values():
        path, vae = tmp_path / name, part(full_model(ODD), "vae")
        if not path.exists():
            write(vae, path, to)
        with pytest.raises(FileExistsError, match="already exists; give another name, or --overwrite"):
            write(vae, path, to)
        write(vae, path, to, overwrite=True)


@pytest.mark.parametrize("name", ["checkpoints", "notes.txt"])
def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path, name: str) -> None:
    write(full_model(ODD), tmp_path / "m", "diffusers")
    (tmp_path / "m" / name).touch()
    for to in ("diffusers", "ldm"):
        with pytest.raises(FileExistsError, match=f"m/{name} was not written by a conversion"):
            write(full_model(ODD), tmp_path / "m", to, overwrite=True)
    assert (tmp_path / "m" / name).exists() and open_contents(tmp_path / "m").networks


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "m").touch()
    with pytest.raises(FileExistsError, match="m was not written by a conversion"):
        write(full_model(ODD), tmp_path / "m", "diffusers", overwrite=True)
    with pytest.raises(NotADirectoryError, match="m is not a folder; give another folder"):
        write(full_model(ODD), tmp_path / "m" / "x", "diffusers")


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_reported_in_one_sentence_and_leaves_no_files(tmp_path: Path, form: str) -> None:
    name, to = FORMATS[form]
    model, limit = full_model(ODD), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match=f"^cannot write {tmp_path / name}: the file exceeds the size limit there"):
            write(model, tmp_path / name, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_a_refused_conversion_leaves_no_files(tmp_path: Path) -> None:
    write(full_model(SD1), tmp_path / "m.safetensors", "single")
    state = load_file(tmp_path / "m.safetensors")
    save_file(state | {"first_stage_model.quant_conv.bias": torch.full((8,), torch.nan)}, tmp_path / "m.safetensors")
    for name, to in (("x.safetensors", "single"), ("x", "diffusers"), ("y", "ldm")):
        with pytest.raises(ValueError, match=r"quant_conv\.bias are NaN"):
            write(verified(open_contents(tmp_path / "m.safetensors")), tmp_path / name, to)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_tensors_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write(full_model(SD2), tmp_path / "m.safetensors", "single")
    state = load_file(tmp_path / "m.safetensors")
    del state["cond_stage_model.model.ln_final.bias"]
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"expected TextTower \(1 missing: ln_final\.bias\)"):
        verified(open_contents(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("form", ["file", "checkpoint", "folder"])
def test_a_model_that_other_tools_cannot_build_is_refused_for_them(tmp_path: Path, form: str) -> None:
    name, to = FORMATS[form]
    path = save_tiny_model(tmp_path)
    with pytest.raises(ValueError, match="no other tool has the tensor known of this text_tower"):
        write(with_frozen_parts(open_contents(path)), tmp_path / "out" / name, to)


@pytest.mark.parametrize("changes", [{"multipliers": (2, 1, 1)}, {"middle_depth": 0}, {"middle_depth": 2}])
def test_a_unet_that_diffusers_cannot_build_can_still_be_a_single_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = full_model(ODD | {"unet": ODD["unet"] | changes})
    with pytest.raises(ValueError, match="a UNet that diffusers cannot build"):
        write(model, tmp_path / "m", "diffusers")
    write(model, tmp_path / "m.safetensors", "single")
    back = open_contents(tmp_path / "m.safetensors").network("unet")
    assert same(back.load().state_dict(), model.network("unet").load().state_dict())


def test_an_unknown_extension_or_one_that_contradicts_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.gguf, but weights are written to"):
        format_of(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="is a folder, but --to single writes a file here"):
        write(full_model(ODD), tmp_path / "m", "single")
    with pytest.raises(ValueError, match="is a file, but --to ldm writes a folder here"):
        write(full_model(ODD), tmp_path / "m.safetensors", "ldm")


def test_a_number_too_large_for_float16_is_named_instead_of_called_corrupt(tmp_path: Path) -> None:
    write(full_model(ODD), tmp_path / "m.safetensors", "single")
    state = load_file(tmp_path / "m.safetensors")
    name = "model.diffusion_model.out.0.bias"
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(state | {name: torch.full_like(state[name], 70_000)}, tmp_path / "m.safetensors", metadata)
    contents = verified(open_contents(tmp_path / "m.safetensors"), torch.float16)
    with pytest.raises(ValueError, match=r"70000, but the largest number of float16 is 65504; convert to bfloat16"):
        write(contents, tmp_path / "half.safetensors", "single")

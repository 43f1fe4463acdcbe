import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.pipeline.pipeline import Pipeline
from ldm.weights import native
from ldm.weights.convert import verified, write
from ldm.weights.formats import format_of
from ldm.weights.model import model_fingerprint, open_model, read_model, save_model
from ldm.weights.storage import tensors
from tests.tiny import save_part, save_tiny_model, tiny_about, tiny_unet, tiny_vae
from tests.weights.foreign import ODD, SD1, full_model


def save_run(folder: Path, prefix: str = "backbone.", **changes: Any) -> Path:
    """Writes a checkpoint of a run whose averages are all 1 and whose raw weights are all 2."""
    state = tiny_unet().state_dict()
    checkpoint = {
        "ldm": tiny_about(folder),
        "global_step": 7,
        "state_dict": {prefix + name: torch.full_like(tensor, 2) for name, tensor in state.items()}
        | {"other.weight": torch.zeros(1)},
        "ema": {name: torch.ones_like(tensor) for name, tensor in state.items()},
    }
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    torch.save(checkpoint | changes, path)
    return path


def test_a_saved_model_is_loaded_with_its_frozen_parts(tmp_path: Path) -> None:
    model = read_model(save_tiny_model(tmp_path))
    assert native.fingerprint(model.backbone.state_dict()) == native.fingerprint(tiny_unet().state_dict())
    assert model.about == tiny_about(tmp_path) and not model.backbone.training
    assert model.first_stage.network.factor == 2 and model.text_encoder.network.context == 16


def test_the_name_shapes_refers_to_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="does not include the default model"):
        read_model("shapes")
    save_tiny_model(tmp_path)
    assert open_model("shapes").source == open_model("assets:unet.safetensors").source == tmp_path / "unet.safetensors"


def test_the_averages_of_a_run_are_loaded(tmp_path: Path) -> None:
    checkpoint = save_run(tmp_path)
    for path in (tmp_path, checkpoint):
        assert all((parameter == 1).all() for parameter in read_model(path).backbone.parameters())
    assert open_model(tmp_path).notes == ("moving average after 7 steps",)


@pytest.mark.parametrize("averages", [None, {}])
def test_the_raw_weights_of_a_run_without_averages_are_loaded(tmp_path: Path, averages: dict[str, Any] | None) -> None:
    save_run(tmp_path, ema=averages)
    assert all((parameter == 2).all() for parameter in read_model(tmp_path).backbone.parameters())


@pytest.mark.parametrize("averages", [True, False])
def test_a_run_of_version_0_1_whose_weights_are_named_unet_is_loaded(tmp_path: Path, averages: bool) -> None:
    save_run(tmp_path, "unet.", **({} if averages else {"ema": None}))
    expected = 1 if averages else 2
    assert all((parameter == expected).all() for parameter in read_model(tmp_path).backbone.parameters())


def test_the_fingerprint_depends_only_on_what_determines_the_samples(tmp_path: Path) -> None:
    about = tiny_about(tmp_path)

    def saved(seed: int = 0, **changes: Any) -> str:
        model = about["model"] | changes
        save_model(tmp_path / "m.safetensors", tiny_unet(seed).state_dict(), about | {"model": model})
        return model_fingerprint(tmp_path / "m.safetensors")

    first = saved()
    assert saved(sampling={"steps": 50}, size=[32, 32]) == first
    assert first not in (saved(seed=9), saved(prediction="v"), saved(schedule={"name": "flow", "shift": 3.0}))


@pytest.mark.parametrize("read", [read_model, model_fingerprint])
def test_a_missing_tensor_is_named(tmp_path: Path, read: Any) -> None:
    state = tiny_unet().state_dict()
    del state["conv_out.bias"]
    save_model(tmp_path / "m.safetensors", state, tiny_about(tmp_path))
    with pytest.raises(ValueError, match=r"expected UNet \(1 missing: conv_out\.bias\)"):
        read(tmp_path / "m.safetensors")


def test_a_model_of_an_earlier_included_autoencoder_names_the_remedy(tmp_path: Path) -> None:
    about = tiny_about(tmp_path)
    about["model"]["first_stage"] = {"weights": "assets:vae.safetensors", "fingerprint": "0123456789abcdef"}
    save_model(tmp_path / "m.safetensors", tiny_unet().state_dict(), about)
    with pytest.raises(ValueError, match=r"use the version of ldm that included the file .* begins with 0123456789ab"):
        read_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("part", ["first stage", "text encoder"])
def test_a_frozen_part_that_changed_since_training_is_refused(tmp_path: Path, part: str) -> None:
    about = tiny_about(tmp_path)
    about["model"][part.replace(" ", "_")]["fingerprint"] = "0123456789abcdef"
    save_model(tmp_path / "m.safetensors", tiny_unet().state_dict(), about)
    with pytest.raises(
        ValueError, match=f"trained with the {part} .*, which has changed since: .* begins with 0123456789ab"
    ):
        read_model(tmp_path / "m.safetensors")


def test_a_missing_frozen_part_is_named_with_its_model(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    (tmp_path / "vae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"unet\.safetensors was trained with the first stage .*vae"):
        read_model(path)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no model .*nowhere; give a run folder"):
        read_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("path", "fetched"),
    [
        ("stabilityai/sd-vae-ft-mse", True),
        ("runs/mine/unet.safetensors", False),
        ("someone/unet.safetensors", False),
        ("tests/nowhere", False),
        ("nowhere", False),
    ],
)
def test_the_name_of_a_repository_is_answered_with_how_to_fetch_it(
    path: str, fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(FileNotFoundError, match=f"there is no model {path}; ") as error:
        read_model(path)
    command = f"`hf download {path} --local-dir {path.partition('/')[2]}`"
    assert ("nothing is downloaded" in str(error.value)) == (command in str(error.value)) == fetched


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"contains none of checkpoints/last\.ckpt, unet\.safetensors, dit"):
        read_model(tmp_path)


@pytest.mark.parametrize("name", ["sd.safetensors", "sd.ckpt", "folder"])
def test_complete_models_of_other_tools_are_loaded(tmp_path: Path, name: str) -> None:
    contents = full_model(ODD, prediction="v")
    write(contents, tmp_path / name, format_of(tmp_path / name))
    model = read_model(tmp_path / name)
    assert model.about["model"]["prediction"] == "v" and model.about["config"] == model.backbone.config
    for kind, network in (
        ("unet", model.backbone),
        ("vae", model.first_stage.network),
        ("text_tower", model.text_encoder.network.towers[0]),
    ):
        expected = contents.network(kind).load()
        assert native.fingerprint(network.state_dict()) == native.fingerprint(expected.state_dict())
        assert network.config == expected.config


def test_models_of_other_tools_generate_images(tmp_path: Path) -> None:
    configs = ODD | {"text_tower": ODD["text_tower"] | {"vocab_size": 49408}}
    write(full_model(configs), tmp_path / "m.safetensors", "single")
    images = Pipeline.load(str(tmp_path / "m.safetensors"))(["a cat", "a dog"], steps=2).images
    assert images.shape == (2, 3, 16, 16)


def test_half_precision_weights_are_loaded_in_any_dtype(tmp_path: Path) -> None:
    write(verified(full_model(ODD), torch.float16), tmp_path / "m.safetensors", "single")
    for dtype, expected in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (None, torch.float16)):
        backbone = read_model(tmp_path / "m.safetensors", dtype).backbone
        assert {parameter.dtype for parameter in backbone.parameters()} == {expected}


def test_a_model_without_its_autoencoder_is_refused(tmp_path: Path) -> None:
    write(full_model(SD1), tmp_path / "m.safetensors", "single")
    state = load_file(tmp_path / "m.safetensors")
    save_file({name: t for name, t in state.items() if "first_stage" not in name}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"is a single file of Stable Diffusion 1\.x and holds no vae"):
        read_model(tmp_path / "m.safetensors")


def test_a_standalone_autoencoder_is_not_a_model(tmp_path: Path) -> None:
    save_part(tmp_path / "vae.safetensors", "vae", tiny_vae())
    with pytest.raises(ValueError, match="holds a vae, but a model is needed"):
        read_model(tmp_path / "vae.safetensors")


def test_incomplete_metadata_is_refused_on_saving_too(tmp_path: Path) -> None:
    about = tiny_about(tmp_path)
    del about["model"]["prediction"], about["model"]["size"]
    with pytest.raises(ValueError, match="lacks prediction, size"):
        save_model(tmp_path / "m.safetensors", {}, about)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short"])
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        read_model(tmp_path / "x.ckpt")


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save_run(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is truncated"):
        read_model(path)


class Payload:
    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.ran,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, zipped: bool) -> None:
    path, ran = tmp_path / "x.ckpt", tmp_path / "ran"
    if zipped:
        torch.save({"ldm": Payload(ran)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ValueError, match="is not a checkpoint"):
        read_model(path)
    assert not ran.exists()


def test_a_checkpoint_without_a_known_network_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="holds no network that ldm knows"):
        read_model(tmp_path / "x.ckpt")


def test_tensors_that_do_not_fit_the_architecture_are_named(tmp_path: Path) -> None:
    save_run(tmp_path, ema={"conv_in.weight": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"do not match the expected UNet .* missing: .* conv_in\.weight \[1\] instead"
    ):
        read_model(tmp_path)


@pytest.mark.parametrize("config", [{"colour": 1}, {"depth": [1]}, {"width": "wide"}])
def test_an_invalid_architecture_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    about = tiny_about(tmp_path)
    save_model(tmp_path / "m.safetensors", {}, about | {"config": config})
    with pytest.raises(ValueError, match="describes no network that this version of ldm can build"):
        read_model(tmp_path / "m.safetensors")

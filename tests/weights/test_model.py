import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.pipeline.pipeline import Pipeline
from ldm.weights import native
from ldm.weights.convert import format_of, verified, write
from ldm.weights.model import model_fingerprint, open_model, read_model, save_model
from ldm.weights.storage import tensors
from tests.tiny import save_part, save_tiny_model, tiny_about, tiny_unet, tiny_vae
from tests.weights.foreign import ODD, SD1, full_model


def save_run(folder: Path, prefix: str = "backbone.", **changes: Any) -> Path:
    """A run's checkpoint, its averages all one, its weights all two."""
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


def test_a_saved_model_comes_back_with_its_parts(tmp_path: Path) -> None:
    model = read_model(save_tiny_model(tmp_path))
    assert native.fingerprint(model.backbone.state_dict()) == native.fingerprint(tiny_unet().state_dict())
    assert model.about == tiny_about(tmp_path) and not model.backbone.training
    assert model.first_stage.network.factor == 2 and model.text_encoder.network.context == 16


def test_the_name_shapes_means_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="comes without the default model"):
        read_model("shapes")
    save_tiny_model(tmp_path)
    assert open_model("shapes").source == open_model("assets:unet.safetensors").source == tmp_path / "unet.safetensors"


def test_of_a_run_the_averages_are_read(tmp_path: Path) -> None:
    checkpoint = save_run(tmp_path)
    for path in (tmp_path, checkpoint):
        assert all((parameter == 1).all() for parameter in read_model(path).backbone.parameters())
    assert open_model(tmp_path).notes == ("moving average after 7 steps",)


@pytest.mark.parametrize("averages", [None, {}])
def test_of_a_run_without_averages_the_weights_are_read(tmp_path: Path, averages: dict[str, Any] | None) -> None:
    save_run(tmp_path, ema=averages)
    assert all((parameter == 2).all() for parameter in read_model(tmp_path).backbone.parameters())


@pytest.mark.parametrize("averages", [True, False])
def test_a_run_of_version_0_1_whose_weights_are_named_unet_is_read(tmp_path: Path, averages: bool) -> None:
    save_run(tmp_path, "unet.", **({} if averages else {"ema": None}))
    expected = 1 if averages else 2
    assert all((parameter == expected).all() for parameter in read_model(tmp_path).backbone.parameters())


def test_the_fingerprint_is_that_of_what_the_model_draws(tmp_path: Path) -> None:
    about = tiny_about(tmp_path)

    def saved(seed: int = 0, **changes: Any) -> str:
        model = about["model"] | changes
        save_model(tmp_path / "m.safetensors", tiny_unet(seed).state_dict(), about | {"model": model})
        return model_fingerprint(tmp_path / "m.safetensors")

    first = saved()
    assert saved(sampling={"steps": 50}, size=[32, 32]) == first
    assert first not in (saved(seed=9), saved(prediction="v"), saved(schedule={"name": "flow", "shift": 3.0}))


@pytest.mark.parametrize("look", [read_model, model_fingerprint])
def test_a_network_that_lacks_a_tensor_is_refused_by_its_name(tmp_path: Path, look: Any) -> None:
    state = tiny_unet().state_dict()
    del state["conv_out.bias"]
    save_model(tmp_path / "m.safetensors", state, tiny_about(tmp_path))
    with pytest.raises(ValueError, match=r"another UNet \(1 missing: conv_out\.bias\)"):
        look(tmp_path / "m.safetensors")


@pytest.mark.parametrize("part", ["first stage", "text encoder"])
def test_another_frozen_part_than_in_training_is_refused(tmp_path: Path, part: str) -> None:
    about = tiny_about(tmp_path)
    about["model"][part.replace(" ", "_")]["fingerprint"] = "0123456789abcdef"
    save_model(tmp_path / "m.safetensors", tiny_unet().state_dict(), about)
    with pytest.raises(ValueError, match=f"trained with another {part} .* begins with 0123456789ab"):
        read_model(tmp_path / "m.safetensors")


def test_a_missing_frozen_part_is_named_with_the_model_that_needs_it(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    (tmp_path / "vae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"unet\.safetensors was trained with the first stage .*vae"):
        read_model(path)


def test_nothing_at_the_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no model .*nowhere; give a run folder"):
        read_model(tmp_path / "nowhere")


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds none of checkpoints/last\.ckpt, unet\.safetensors, dit"):
        read_model(tmp_path)


@pytest.mark.parametrize("name", ["sd.safetensors", "sd.ckpt", "folder"])
def test_models_of_other_tools_are_read_whole(tmp_path: Path, name: str) -> None:
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


def test_models_of_other_tools_draw(tmp_path: Path) -> None:
    drawing = ODD | {"text_tower": ODD["text_tower"] | {"vocab_size": 49408}}
    write(full_model(drawing), tmp_path / "m.safetensors", "single")
    images = Pipeline.load(str(tmp_path / "m.safetensors"))(["a cat", "a dog"], steps=2).images
    assert images.shape == (2, 3, 16, 16)


def test_weights_of_half_precision_are_read_in_any_type(tmp_path: Path) -> None:
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


def test_a_file_of_one_part_is_no_model(tmp_path: Path) -> None:
    save_part(tmp_path / "vae.safetensors", "vae", tiny_vae())
    with pytest.raises(ValueError, match="holds a vae, but a model is needed"):
        read_model(tmp_path / "vae.safetensors")


def test_an_incomplete_description_is_refused_on_saving_too(tmp_path: Path) -> None:
    about = tiny_about(tmp_path)
    del about["model"]["prediction"], about["model"]["size"]
    with pytest.raises(ValueError, match="lacks prediction, size"):
        save_model(tmp_path / "m.safetensors", {}, about)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short"])
def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_model(tmp_path / "x.ckpt")


def test_a_cut_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save_run(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is cut short"):
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
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_model(path)
    assert not ran.exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="holds no network that ldm knows"):
        read_model(tmp_path / "x.ckpt")


def test_weights_that_do_not_fit_the_architecture_are_named(tmp_path: Path) -> None:
    save_run(tmp_path, ema={"conv_in.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"those of another UNet .* missing: .* conv_in\.weight \[1\] instead"):
        read_model(tmp_path)


@pytest.mark.parametrize("config", [{"colour": 1}, {"depth": [1]}, {"width": "wide"}])
def test_an_architecture_that_cannot_be_built_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    about = tiny_about(tmp_path)
    save_model(tmp_path / "m.safetensors", {}, about | {"config": config})
    with pytest.raises(ValueError, match="describes no network that this ldm can build"):
        read_model(tmp_path / "m.safetensors")

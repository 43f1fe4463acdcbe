from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.nn.clip import CLIP
from ldm.weights.convert import part, verified, write
from ldm.weights.info import OPENAI, PixelStats
from ldm.weights.native import save_network
from ldm.weights.parts import Frozen, caption_encoder, first_stage, image_encoder, text_encoder
from tests.tiny import tiny_text_encoder
from tests.weights.foreign import ODD, full_model, networks, same, without_metadata


@pytest.fixture(params=["m.safetensors", "m.ckpt", "folder"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / request.param
    write(full_model(ODD, pad=0), path, "diffusers" if request.param == "folder" else "single")
    return path


def test_frozen_parts_are_loaded_from_complete_models_of_other_tools(model: Path) -> None:
    vae, text = first_stage(str(model)), text_encoder(str(model))
    assert same(vae.network.state_dict(), networks(ODD)["vae"].state_dict())
    assert same(text.network.towers[0].state_dict(), networks(ODD)["text_tower"].state_dict())
    assert vae.source["weights"] == text.source["weights"] == str(model)
    (tokenizer,) = text.network.tokenizers
    assert tokenizer.pad == 0 and tokenizer.context == 9


def test_an_autoencoder_has_the_same_fingerprint_standalone_and_in_a_model(tmp_path: Path, model: Path) -> None:
    write(part(full_model(ODD), "vae"), tmp_path / "vae.safetensors", "single")
    assert (
        first_stage(str(tmp_path / "vae.safetensors")).source["fingerprint"]
        == (first_stage(str(model)).source["fingerprint"])
    )


def test_half_precision_weights_are_loaded_as_float32(tmp_path: Path) -> None:
    write(verified(part(full_model(ODD), "vae"), torch.float16), tmp_path / "v.safetensors", "single")
    assert {p.dtype for p in first_stage(str(tmp_path / "v.safetensors")).network.parameters()} == {torch.float32}


def test_a_standalone_sd2_text_tower_is_padded_with_token_0(tmp_path: Path) -> None:
    tower = {"width": 64, "heads": 1, "layers": 2, "context": 6, "vocab_size": 49408, "activation": "gelu"}
    write(part(full_model({"text_tower": tower}), "text_tower"), tmp_path / "t.safetensors", "single")
    assert text_encoder(str(without_metadata(tmp_path / "t.safetensors"))).network.tokenizers[0].pad == 0


def test_a_file_without_the_requested_network_is_refused(tmp_path: Path) -> None:
    write(part(full_model(ODD), "vae"), tmp_path / "v.safetensors", "single")
    with pytest.raises(ValueError, match=r"v\.safetensors is a standalone vae and holds no text_tower"):
        text_encoder(str(tmp_path / "v.safetensors"))


def test_an_image_tower_is_read_from_a_clip_in_any_format(tmp_path: Path) -> None:
    tower = {"size": 8, "patch": 4, "width": 6, "layers": 1, "heads": 2, "projection": 4}
    text = {"width": 6, "layers": 1, "heads": 2, "context": 5, "vocab_size": 9, "projection": 4}
    configs = {"text_tower": text, "image_tower": tower}
    write(replace(full_model(configs), model={}), tmp_path / "other_tool.safetensors", "single")
    clip = CLIP(*networks(configs).values())  # type: ignore[arg-type]
    save_network(tmp_path / "ldm.safetensors", "clip", clip.config, clip.state_dict())
    for name in ("other_tool", "ldm"):
        network = image_encoder(str(tmp_path / f"{name}.safetensors")).network
        assert same(network.state_dict(), clip.image.state_dict()) and network.config == clip.image.config


def test_a_text_tower_is_read_from_a_clip_in_the_own_format(tmp_path: Path) -> None:
    text = {"width": 6, "layers": 1, "heads": 2, "context": 5, "vocab_size": 9, "projection": 4}
    image = {"size": 8, "patch": 4, "width": 6, "layers": 1, "heads": 2, "projection": 4}
    clip = CLIP(*networks({"text_tower": text, "image_tower": image}).values())  # type: ignore[arg-type]
    save_network(tmp_path / "clip.safetensors", "clip", clip.config, clip.state_dict())
    encoder = text_encoder(str(tmp_path / "clip.safetensors")).network
    assert same(encoder.towers[0].state_dict(), clip.text.state_dict()) and encoder.tokenizers[0].context == 5


PIXELS = PixelStats((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(("name", "to"), [("m.safetensors", "single"), ("m.safetensors", "ldm"), ("m", "diffusers")])
@pytest.mark.parametrize("pixels", [PixelStats(), OPENAI, PIXELS])
def test_every_format_stores_the_normalisation_of_an_image_tower(
    tmp_path: Path, name: str, to: str, pixels: PixelStats
) -> None:
    tower = {"size": 8, "patch": 4, "width": 6, "layers": 1, "heads": 2}
    write(replace(full_model({"image_tower": tower}), model={}, pixels=pixels), tmp_path / name, to)
    assert image_encoder(str(tmp_path / name)).pixels == pixels


def test_image_towers_normalise_like_openai_by_default_unless_ldm_wrote_them(tmp_path: Path) -> None:
    tower = {"size": 8, "patch": 4, "width": 64, "layers": 1, "heads": 1}
    path = tmp_path / "m.safetensors"
    write(replace(full_model({"image_tower": tower}), model={}, pixels=PIXELS), path, "single")
    assert image_encoder(str(without_metadata(path))).pixels == OPENAI
    network = networks({"image_tower": tower})["image_tower"]
    save_network(path, "image_tower", network.config, network.state_dict())  # type: ignore[arg-type]
    assert image_encoder(str(path)).pixels == PixelStats()


def test_a_caption_encoder_takes_its_gpu_at_its_first_call_when_each_rank_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = Frozen(tiny_text_encoder(), {})
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)  # moving to a GPU would be an error
        encode = caption_encoder(text)
    assert encode is not None and encode(["a red circle"]).shape == (1, 16, 16)

"""Tests loading of the weights that training starts from."""

from pathlib import Path

import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.nn.inpainting import INPAINTING
from ldm.nn.unet import UNet
from ldm.training.start import check_adaptable, first_stage_from, start_from
from ldm.weights.contents import Contents, StoredNetwork
from ldm.weights.convert import write
from ldm.weights.keymaps import NATIVE
from ldm.weights.native import fingerprint
from ldm.weights.storage.values import in_memory
from tests.tiny import save_part, save_tiny_model, tiny_dit, tiny_inpainting_unet, tiny_unet, tiny_vae


def test_a_network_starts_from_the_weights_of_a_model_and_returns_their_fingerprint(tmp_path: Path) -> None:
    model, unet = str(save_tiny_model(tmp_path)), tiny_unet(seed=5)
    base = start_from(unet, model)
    assert all(map(torch.equal, unet.state_dict().values(), tiny_unet().state_dict().values()))
    assert base == {"weights": model, "fingerprint": fingerprint(tiny_unet().state_dict())}


def test_start_weights_of_other_shapes_are_refused(tmp_path: Path) -> None:
    wider = UNet(width=16, multipliers=(1, 2), blocks=1, depth=(0, 1), heads=2, context_width=16, groups=4)
    with pytest.raises(ValueError, match="do not match the expected UNet"):
        start_from(wider, str(save_tiny_model(tmp_path)))


def test_start_weights_of_another_kind_of_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains a unet, but model is a dit"):
        start_from(tiny_dit(), str(save_tiny_model(tmp_path)))


@pytest.mark.parametrize("key", ["groups", "heads"])
def test_start_weights_that_fit_but_have_another_meaning_are_refused(tmp_path: Path, key: str) -> None:
    model, config = save_tiny_model(tmp_path), tiny_unet().config
    half = config[key] // 2
    with pytest.raises(ValueError, match=f"was trained with {key} {config[key]}, and model.{key} is {half}: make"):
        start_from(UNet(**{**config, key: half}), str(model))


@pytest.mark.parametrize("name", ["vae.safetensors", "vae"])
def test_an_autoencoder_can_start_from_a_file_or_folder(tmp_path: Path, name: str) -> None:
    vae = tiny_vae(seed=7)
    save_part(tmp_path / "vae.safetensors", "vae", vae)
    stored = {"vae": StoredNetwork("vae", vae.config, NATIVE, in_memory(tmp_path / "memory", vae.state_dict()))}
    write(Contents(tmp_path / "memory", "in memory", stored), tmp_path / "vae", "diffusers")
    started = first_stage_from(tiny_vae(), str(tmp_path / name), decoder_only=False)
    assert torch.equal(started.encoder.conv_in.weight, vae.encoder.conv_in.weight)


def test_an_autoencoder_without_a_start_keeps_its_own_weights() -> None:
    vae = tiny_vae()
    assert first_stage_from(vae, None, decoder_only=False) is vae
    assert all(map(torch.equal, vae.state_dict().values(), tiny_vae().state_dict().values()))


def test_decoder_only_requires_start_weights() -> None:
    with pytest.raises(ValueError, match=r"training\.start=FILE"):
        first_stage_from(tiny_vae(), None, decoder_only=True)


def test_an_inpainting_network_initially_predicts_like_the_network_without_masks(tmp_path: Path) -> None:
    inpainting, plain = tiny_inpainting_unet(), tiny_unet()
    start_from(inpainting, str(save_tiny_model(tmp_path)))
    x, time, text = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 5, 16)
    hinted = Conditioning(text=text).with_hint(INPAINTING, torch.randn(2, 5, 8, 8))
    torch.testing.assert_close(inpainting(x, time, hinted), plain(x, time, Conditioning(text=text)))


def test_an_adapter_of_a_network_with_more_inputs_than_its_base_is_refused(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path))
    check_adaptable(tiny_unet(), model)
    with pytest.raises(ValueError, match=r"does not read masks, .* choose adapter=none"):
        check_adaptable(tiny_inpainting_unet(), model)

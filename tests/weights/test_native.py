from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.nn.vae import VAE
from ldm.weights.native import build, check_fits, fill, fingerprint, load_network, locate, read_about, save_network
from tests.tiny import save_part, tiny_text_tower, tiny_unet, tiny_vae


@pytest.fixture
def vae_file(tmp_path: Path) -> Path:
    save_part(tmp_path / "vae.safetensors", "vae", tiny_vae())
    return tmp_path / "vae.safetensors"


def test_a_loaded_network_has_the_saved_architecture_weights_and_buffers(vae_file: Path) -> None:
    original, loaded = tiny_vae(), load_network(vae_file, "vae")
    assert isinstance(loaded, VAE) and loaded.config == original.config and not loaded.training
    z = torch.ones(1, 4, 4, 4)
    assert torch.equal(loaded.decode(z), original.decode(z))


def test_a_loaded_text_tower_has_the_saved_vocabulary(tmp_path: Path) -> None:
    original = tiny_text_tower()
    save_part(tmp_path / "tower.safetensors", "text_tower", original)
    loaded = load_network(tmp_path / "tower.safetensors", "text_tower")
    tokens = torch.tensor([[49406, 320, 7, 49407]])
    assert torch.equal(loaded(tokens), original(tokens))


def test_metadata_is_read_without_the_tensors(tmp_path: Path) -> None:
    save_network(tmp_path / "v.safetensors", "vae", {"blocks": 1}, {}, note="naïve")
    assert read_about(tmp_path / "v.safetensors") == {"kind": "vae", "config": {"blocks": 1}, "note": "naïve"}


def test_weights_are_cast_on_loading_unless_dtype_is_none(tmp_path: Path) -> None:
    vae = tiny_vae()
    half = {name: tensor.half() for name, tensor in vae.state_dict().items()}
    save_network(tmp_path / "v.safetensors", "vae", vae.config, half)
    for dtype, expected in ((torch.float32, torch.float32), (None, torch.float16)):
        loaded = load_network(tmp_path / "v.safetensors", "vae", dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights file nowhere/x\.safetensors"):
        locate("nowhere/x.safetensors")


def test_a_network_of_the_wrong_kind_is_refused(vae_file: Path) -> None:
    with pytest.raises(ValueError, match="holds a vae, but a unet is needed"):
        load_network(vae_file, "unet")


def test_a_truncated_file_is_refused(vae_file: Path) -> None:
    vae_file.write_bytes(vae_file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_network(vae_file, "vae")


def test_a_file_that_ldm_did_not_write_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="was not written by ldm"):
        read_about(tmp_path / "w.safetensors")


def test_missing_unexpected_and_misshapen_weights_are_all_named() -> None:
    state = tiny_unet().state_dict()
    del state["conv_in.bias"]
    state |= {"more": torch.zeros(1), "conv_in.weight": torch.zeros(2, 3)}
    with pytest.raises(ValueError) as caught:
        fill(tiny_unet(), state, "x.safetensors")
    for part in (
        "1 missing: conv_in.bias",
        "1 unexpected: more",
        "conv_in.weight [2, 3] instead of [8, 4, 3, 3]",
    ):
        assert part in str(caught.value)


def test_a_fingerprint_depends_on_values_names_dtypes_and_shapes_only() -> None:
    w = torch.arange(6.0)
    states = [
        {"w": w},
        {"v": w},
        {"w": w + 1},
        {"w": w.double()},
        {"w": w.view(2, 3)},
        {"w": w, "v": torch.tensor(1)},
    ]
    assert len({fingerprint(state) for state in states}) == len(states)
    assert fingerprint({"a": w, "w": w}) == fingerprint({"w": w.clone().requires_grad_(), "a": w})


def test_weights_that_do_not_fit_are_refused_in_one_sentence() -> None:
    network = nn.Linear(2, 3)
    check_fits(network, network.state_dict(), "the checkpoint")
    for other, difference in (
        (nn.Linear(2, 4), r"weight \[4, 2\] instead of \[3, 2\]"),
        (nn.Linear(2, 3, bias=False), "bias"),
    ):
        with pytest.raises(
            ValueError, match=rf"the weights in the checkpoint do not match the expected Linear .*{difference}"
        ):
            check_fits(network, other.state_dict(), "the checkpoint")


@pytest.mark.parametrize(
    "config", [{"blocks": 10**9}, {"multipliers": [1] * 10**5}, {"width": 2**40}, {"depth": [999] * 99}]
)
def test_a_network_too_large_to_build_is_refused_immediately(config: dict[str, Any]):
    with pytest.raises(ValueError, match="which no model has"):
        build({"kind": "unet", "config": config}, "m.safetensors")


@pytest.mark.parametrize("change", [{"heads": True}, {"multipliers": [True, 2]}, {"width": False}])
def test_a_boolean_in_place_of_a_number_is_refused(change: dict[str, Any]) -> None:
    config = tiny_unet().config
    build({"kind": "unet", "config": config | {"checkpointing": True}}, "a file")
    with pytest.raises(ValueError, match=f"a file describes a unet whose {next(iter(change))} is "):
        build({"kind": "unet", "config": config | change}, "a file")


def test_a_boolean_in_a_tower_of_clip_is_refused() -> None:
    config = {"text": tiny_text_tower().config | {"heads": True}, "image": {}}
    with pytest.raises(ValueError, match="a file describes a text_tower whose heads is True"):
        build({"kind": "clip", "config": config}, "a file")

from pathlib import Path

import pytest
import torch

from ldm.commands.info import describe
from tests.tiny import save_tiny_model, tiny_about, tiny_unet


def test_a_model_file_is_described(tmp_path: Path) -> None:
    told = describe(str(save_tiny_model(tmp_path)))
    assert told["kind"] == "unet"
    assert told["parameters"] == f"{sum(p.numel() for p in tiny_unet().parameters()):,}"
    assert "width=8, multipliers=[1, 2]" in told["architecture"]
    assert told["schedule"] == "name=flow, shift=1.0" and told["prediction"] == "flow" and told["size"] == "16x16"
    assert told["sampling"] == "sampler=dpmpp_2m, spacing=trailing, steps=3, guidance=2.0"
    assert told["first stage"].startswith(f"{tmp_path / 'vae.safetensors'} (")


def test_a_run_says_how_long_it_was_trained(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoint = {"ldm": tiny_about(tmp_path), "state_dict": {}, "global_step": 12}
    torch.save(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    assert describe(str(tmp_path))["weights"] == "raw weights after 12 steps"


def test_a_file_of_one_network_is_described_without_its_long_lists(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    told = describe(str(tmp_path / "text_tower.safetensors"))
    assert told["kind"] == "text_tower" and "token_ids=[" in told["architecture"]
    assert set(told) == {"file", "kind", "parameters", "architecture"}


def test_the_frozen_parts_are_not_needed(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    for part in ("vae.safetensors", "text_tower.safetensors"):
        (tmp_path / part).unlink()
    assert describe(str(path))["kind"] == "unet"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        describe(str(tmp_path / "x.safetensors"))
    with pytest.raises(FileNotFoundError, match="there is no model"):
        describe(str(tmp_path / "nowhere.safetensors"))

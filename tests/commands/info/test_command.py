import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ldm.commands.info.command import describe
from ldm.evaluation.data import split_hash_of
from ldm.weights.convert import write
from ldm.weights.formats import format_of
from tests.tiny import save_tiny_model, tiny_about, tiny_unet
from tests.weights.foreign import ODD, SD2, full_model, networks, without_metadata


def test_a_model_file_is_described(tmp_path: Path) -> None:
    lines = describe(str(save_tiny_model(tmp_path)))
    assert lines["kind"] == "a unet written by ldm"
    assert lines["parameters"] == f"{sum(p.numel() for p in tiny_unet().parameters()):,}"
    assert "width=8, multipliers=[1, 2]" in lines["architecture"]
    assert lines["schedule"] == "name=flow, shift=1.0" and lines["prediction"] == "flow" and lines["size"] == "16x16"
    assert lines["sampling"] == "sampler=dpmpp_2m, spacing=trailing, steps=3, guidance=2.0"
    assert lines["first stage"].startswith(f"{tmp_path / 'vae.safetensors'} (")


def test_the_number_of_steps_of_a_run_is_shown(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoint = {"ldm": tiny_about(tmp_path), "state_dict": {}, "global_step": 12}
    torch.save(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    assert describe(str(tmp_path))["weights"] == "raw weights after 12 steps"


def test_long_lists_in_the_architecture_are_abbreviated(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    lines = describe(str(tmp_path / "text_tower.safetensors"))
    assert lines["kind"] == "a text_tower written by ldm" and "token_ids=[" in lines["architecture"]
    assert set(lines) == {"file", "kind", "parameters", "architecture"}


def test_the_frozen_parts_are_not_needed(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    for part in ("vae.safetensors", "text_tower.safetensors"):
        (tmp_path / part).unlink()
    assert describe(str(path))["kind"] == "a unet written by ldm"


def test_a_path_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        describe(str(tmp_path / "x.safetensors"))
    with pytest.raises(FileNotFoundError, match="there is no model"):
        describe(str(tmp_path / "nowhere.safetensors"))


def run_folder(folder: Path, config: str, **model: Any) -> Path:
    (folder / "checkpoints").mkdir()
    about = tiny_about(folder)
    about["model"] |= model
    torch.save({"ldm": about, "state_dict": {}, "global_step": 1}, folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text(config)
    return folder


def test_contradictory_settings_of_a_run_are_listed(tmp_path: Path) -> None:
    config = """
        weighting: {_target_: ldm.diffusion.weighting.min_snr, gamma: 5.0}
        training: {caption_dropout: 0.0, offset_noise: 0.1, other: "${oc.env:HOME}"}
        """
    text = describe(str(run_folder(tmp_path, config, prediction="eps")))["contradictions"]
    for words in ("prediction=eps divides by alpha", "caption_dropout=0", "offset_noise=0.1"):
        assert words in text
    assert "weighting" not in text
    (tmp_path / "config.yaml").write_text(config.replace("min_snr, gamma: 5.0", "p2"))
    assert "contradictions" in describe(str(tmp_path))


@pytest.mark.parametrize("read", [describe, split_hash_of])
def test_a_config_that_is_no_yaml_is_refused(tmp_path: Path, read: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=r"config.yaml cannot be read: while parsing"):
        read(str(run_folder(tmp_path, "{: bad")))


def test_a_run_whose_training_and_sampling_sizes_differ_is_found(tmp_path: Path) -> None:
    config = "{data: {size: 128}, training: {size: [64, 64]}}"
    text = describe(str(run_folder(tmp_path, config)))["contradictions"]
    assert text.startswith("data.size is 128 and training.size is [64, 64], so that the model would train on")


def test_a_consistent_run_has_no_contradictions(tmp_path: Path) -> None:
    config = "weighting: {_target_: os.system, command: 'touch touched'}"
    assert describe(str(run_folder(tmp_path, config)))["contradictions"] == "none"
    assert not Path("touched").exists()


class HeadersOnly:
    """A safetensors file whose tensors cannot be read."""

    def __init__(self, path: Path, framework: str) -> None:
        self.path = path

    def __enter__(self) -> Any:
        with safe_open(self.path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
            return SimpleNamespace(keys=slices.keys, get_slice=slices.get, metadata=lambda: metadata)

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("name", ["m.safetensors", "folder"])
def test_models_of_other_tools_are_described_without_reading_tensors(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(full_model(ODD, prediction="v"), tmp_path / name, format_of(tmp_path / name))
    monkeypatch.setattr("ldm.weights.storage.opening.safe_open", HeadersOnly)
    lines = describe(str(tmp_path / name))
    assert "Stable" in lines["kind"] and lines["prediction"] == "v" and "sampler=ddim" in lines["sampling"]
    parameters = [sum(p.numel() for p in network.parameters()) for network in networks(ODD).values()]
    assert lines["parameters"] == f"{sum(parameters):,}"
    assert lines["unet"].startswith(f"{parameters[0]:,} parameters, ") and "multipliers=[1, 2, 3]" in lines["unet"]


IMPORTED = """
import sys
from ldm.__main__ import main
main(["info", sys.argv[1]])
print({"torch", "transformers", "lightning", "omegaconf"} & set(sys.modules))
"""


@pytest.mark.parametrize("name", ["m.safetensors", "folder", "vae.safetensors"])
def test_weights_are_described_without_importing_torch(tmp_path: Path, name: str) -> None:
    if name == "vae.safetensors":
        save_tiny_model(tmp_path)
    else:
        write(full_model(ODD), tmp_path / name, format_of(tmp_path / name))
    command = [sys.executable, "-c", IMPORTED, tmp_path / name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "parameters" in done.stdout and done.stdout.endswith("set()\n")


def test_a_missing_path_is_reported_without_importing_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTED, tmp_path / "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "there is no model" in done.stderr and done.stdout == "set()\n"


def test_a_guessed_prediction_is_noted(tmp_path: Path) -> None:
    write(full_model(SD2), tmp_path / "m.safetensors", "single")
    lines = describe(str(without_metadata(tmp_path / "m.safetensors")))
    assert (
        "2.x" in lines["kind"] and "prediction=v" in lines["weights"] and "tensors do not show it" in lines["weights"]
    )

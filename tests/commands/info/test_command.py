import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ldm.commands.info.command import describe
from ldm.weights.convert import format_of, write
from tests.tiny import save_tiny_model, tiny_about, tiny_unet
from tests.weights.foreign import ODD, SD2, full_model, networks, without_metadata


def test_a_model_file_is_described(tmp_path: Path) -> None:
    told = describe(str(save_tiny_model(tmp_path)))
    assert told["kind"] == "a unet of ldm"
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
    assert told["kind"] == "a text_tower of ldm" and "token_ids=[" in told["architecture"]
    assert set(told) == {"file", "kind", "parameters", "architecture"}


def test_the_frozen_parts_are_not_needed(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    for part in ("vae.safetensors", "text_tower.safetensors"):
        (tmp_path / part).unlink()
    assert describe(str(path))["kind"] == "a unet of ldm"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no readable safetensors file"):
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


def test_someone_s_run_is_told_what_in_it_contradicts_itself(tmp_path: Path) -> None:
    config = """
        weighting: {_target_: ldm.diffusion.weighting.min_snr, gamma: 5.0}
        training: {caption_dropout: 0.0, offset_noise: 0.1, other: "${oc.env:HOME}"}
        """
    told = describe(str(run_folder(tmp_path, config, prediction="eps")))["contradictions"]
    for words in ("prediction=eps divides by alpha", "caption_dropout=0", "offset_noise=0.1"):
        assert words in told
    assert "weighting" not in told
    (tmp_path / "config.yaml").write_text(config.replace("min_snr, gamma: 5.0", "p2"))
    assert "contradictions" in describe(str(tmp_path))


def test_a_run_that_trained_at_one_size_and_drew_another_is_found(tmp_path: Path) -> None:
    config = "{data: {size: 128}, training: {size: [64, 64]}}"
    told = describe(str(run_folder(tmp_path, config)))["contradictions"]
    assert told.startswith("data.size is 128 and training.size is [64, 64], so that the model would be trained on")


def test_a_run_in_which_all_agrees_is_told_so(tmp_path: Path) -> None:
    config = "weighting: {_target_: os.system, command: 'touch touched'}"
    assert describe(str(run_folder(tmp_path, config)))["contradictions"] == "none"
    assert not Path("touched").exists()


class Closed:
    """A safetensors file of which no tensor can be got."""

    def __init__(self, path: Path, framework: str) -> None:
        self.path = path

    def __enter__(self) -> Any:
        with safe_open(self.path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            told = file.metadata()
            return SimpleNamespace(keys=slices.keys, get_slice=slices.get, metadata=lambda: told)

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("name", ["m.safetensors", "folder"])
def test_models_of_others_are_described_without_their_tensors(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(full_model(ODD, prediction="v"), tmp_path / name, format_of(tmp_path / name))
    monkeypatch.setattr("ldm.weights.storage.opening.safe_open", Closed)
    told = describe(str(tmp_path / name))
    assert "Stable" in told["kind"] and told["prediction"] == "v" and "sampler=ddim" in told["sampling"]
    parameters = [sum(p.numel() for p in network.parameters()) for network in networks(ODD).values()]
    assert told["parameters"] == f"{sum(parameters):,}"
    assert told["unet"].startswith(f"{parameters[0]:,} parameters, ") and "multipliers=[1, 2, 3]" in told["unet"]


IMPORTED = """
import sys
from ldm.__main__ import main
main(["info", sys.argv[1]])
print({"torch", "transformers", "lightning", "omegaconf"} & set(sys.modules))
"""


@pytest.mark.parametrize("name", ["m.safetensors", "folder", "vae.safetensors"])
def test_weights_are_described_without_torch_whose_import_takes_seconds(tmp_path: Path, name: str) -> None:
    if name == "vae.safetensors":
        save_tiny_model(tmp_path)
    else:
        write(full_model(ODD), tmp_path / name, format_of(tmp_path / name))
    command = [sys.executable, "-c", IMPORTED, tmp_path / name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "parameters" in done.stdout and done.stdout.endswith("set()\n")


def test_a_path_that_is_not_there_is_told_without_torch_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTED, tmp_path / "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "there is no model" in done.stderr and done.stdout == "set()\n"


def test_what_of_a_second_model_is_a_guess_is_said(tmp_path: Path) -> None:
    write(full_model(SD2), tmp_path / "m.safetensors", "single")
    told = describe(str(without_metadata(tmp_path / "m.safetensors")))
    assert "2.x" in told["kind"] and "prediction=v" in told["weights"] and "tensors do not tell" in told["weights"]

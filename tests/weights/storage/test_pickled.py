import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.weights.storage.pickled import read_pickled


class Payload:
    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.ran),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_named_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path, ran = tmp_path / "x.ckpt", tmp_path / "ran"
    if zipped:
        torch.save({"state_dict": Payload(ran)}, path)
    else:
        path.write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ValueError, match=r"could run code: it was not opened; look for a \.safetensors") as caught:
        read_pickled(path)
    assert not ran.exists() and (not zipped or "mkdir" in str(caught.value))


@pytest.fixture
def lightning_one(monkeypatch: pytest.MonkeyPatch) -> type:
    """Defines the class that checkpoints of Stable Diffusion 1.x name, which is rarely installed today."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    return ModelCheckpoint


@pytest.mark.parametrize("zipped", [True, False])
def test_callback_states_in_sd_checkpoints_are_read_without_their_classes(
    tmp_path: Path, lightning_one: type, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    score = {"best_model_score": np.float64(0.5), "monitor": "val/loss"}
    saved = {"state_dict": {"w": torch.ones(2)}, "callbacks": {lightning_one: score}, "global_step": 7}
    torch.save(saved, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "pytorch_lightning.callbacks.model_checkpoint")
    read = read_pickled(tmp_path / "x.ckpt")
    assert torch.equal(read["state_dict"]["w"], torch.ones(2)) and read["global_step"] == 7
    assert "pytorch_lightning.callbacks.model_checkpoint" not in sys.modules


def test_writing_to_a_memory_mapped_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "x.ckpt")
    read_pickled(tmp_path / "x.ckpt")["w"].fill_(1)
    assert torch.equal(read_pickled(tmp_path / "x.ckpt")["w"], torch.zeros(3))

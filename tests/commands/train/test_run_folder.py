from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ldm.callbacks.checkpointing.checkpoint_file import write
from ldm.commands.train.run_folder import keep_earlier_settings


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ({"settings": {"data": {"root": "x"}}}, "crc32"),
        ({"settings": {"data": {"split_hash": "mixed"}}}, "mixed"),
        ({"settings": {"data": {"split_hash": "crc32"}}}, "crc32"),  # resumed before
        ({}, "crc32"),
    ],
)
def test_a_run_resumed_from_an_earlier_checkpoint_keeps_its_split(
    checkpoint: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    write(tmp_path / "last.ckpt", checkpoint)
    config = OmegaConf.create({"data": {"split_hash": "mixed", "module": {"split_hash": "${data.split_hash}"}}})
    keep_earlier_settings(config, str(tmp_path / "last.ckpt"))
    assert config.data.module.split_hash == expected


def test_data_without_a_split_are_unchanged(tmp_path: Path) -> None:
    write(tmp_path / "last.ckpt", {"settings": {}})
    config = OmegaConf.create({"data": {"count": 3}})
    keep_earlier_settings(config, str(tmp_path / "last.ckpt"))
    assert config == {"data": {"count": 3}}

from pathlib import Path

import pytest

from ldm.evaluation.data import split_hash_of


@pytest.mark.parametrize(
    ("config", "expected"),
    [("data: {held_out_every: 16}", "crc32"), ("data: {split_hash: mixed}", "mixed"), ("seed: 0", "crc32")],
)
@pytest.mark.parametrize("model", ["run", "run/unet.safetensors", "run/checkpoints/last.ckpt"])
def test_held_out_data_match_the_run_that_trained_the_model(
    model: str, config: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(config)
    assert split_hash_of(str(tmp_path / model)) == expected


def test_a_model_outside_of_a_run_has_the_current_split(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert split_hash_of(str(tmp_path / "model.safetensors")) == "mixed" == split_hash_of("assets:unet.safetensors")

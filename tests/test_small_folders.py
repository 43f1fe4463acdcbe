"""Small image folders train without further settings."""

import json
from pathlib import Path

import pytest

from tests.data.tars import image_file
from tests.runs import ALONE, TINY, run

SETTINGS = (*(setting for setting in TINY if "count" not in setting), *ALONE[1:], "data=folder", "trainer.max_steps=2")


@pytest.mark.slow
@pytest.mark.parametrize("repeats", ["true", "false"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_twenty_images_without_captions_train_and_are_evaluated(repeats: str, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "10_sks dog"
    folder.mkdir(parents=True)
    for k in range(20):
        (folder / f"{k}.bmp").write_bytes(image_file(k, (64, 64), "BMP"))
    data = (f"data.root={folder.parent}", f"data.repeats={repeats}", "metrics=pictures", "evaluation.prompts=2")
    report = json.loads((run(tmp_path / "run", *SETTINGS, *data) / "metrics.json").read_text())
    assert report["provenance"]["steps"] == 2 and report["provenance"]["prompts"]["count"] >= 1

import io
from pathlib import Path

from PIL import Image

from ldm.report.groups import group_runs
from ldm.report.images import side_by_side
from ldm.report.runs import read_run
from tests.report.run_folders import save_tiles, write_run

CAPTIONS = ["a red circle", "a blue star"]


def test_images_of_the_same_prompt_and_noise_are_side_by_side(tmp_path: Path) -> None:
    for schedule in ("Flow", "Cosine"):
        save_tiles(write_run(tmp_path / schedule, 0, schedule), CAPTIONS)
    rows, notes = side_by_side(group_runs([read_run(tmp_path / s) for s in ("Flow", "Cosine")])[0])
    assert [row.caption for row in rows] == CAPTIONS and not notes
    for index, row in enumerate(rows):
        for png in row.images:
            assert png is not None
            with Image.open(io.BytesIO(png)) as image:
                assert image.size == (8, 8) and image.getpixel((0, 7)) == (10 * index,) * 3


def test_images_of_other_prompts_or_noise_are_left_out_with_a_note(tmp_path: Path) -> None:
    save_tiles(write_run(tmp_path / "Flow", 0, "Flow"), CAPTIONS)
    save_tiles(write_run(tmp_path / "Cosine", 0, "Cosine"), CAPTIONS, seed=5)
    write_run(tmp_path / "Linear", 0, "Linear")
    rows, notes = side_by_side(group_runs([read_run(tmp_path / s) for s in ("Flow", "Cosine", "Linear")])[0])
    assert [image is None for image in rows[0].images] == [False, True, True]
    assert notes == [
        "No images of prompts (samples/tiles.png): C",
        "Left out, with other prompts, other noise or another image size: B",
    ]


def test_runs_without_images_have_no_rows(tmp_path: Path) -> None:
    rows, notes = side_by_side(group_runs([read_run(write_run(tmp_path / "run"))])[0])
    assert rows == [] and "No run has images of prompts" in notes[0]

import io
from pathlib import Path

from PIL import Image

from ldm.report.groups import group_runs
from ldm.report.pictures import side_by_side
from ldm.report.runs import read_run
from tests.report.made import made_run, save_tiles

CAPTIONS = ["a red circle", "a blue star"]


def test_pictures_of_one_prompt_and_noise_are_side_by_side(tmp_path: Path) -> None:
    for schedule in ("Flow", "Cosine"):
        save_tiles(made_run(tmp_path / schedule, 0, schedule), CAPTIONS)
    rows, remarks = side_by_side(group_runs([read_run(tmp_path / s) for s in ("Flow", "Cosine")])[0])
    assert [row.caption for row in rows] == CAPTIONS and not remarks
    for index, row in enumerate(rows):
        for picture in row.pictures:
            assert picture is not None
            with Image.open(io.BytesIO(picture)) as image:
                assert image.size == (8, 8) and image.getpixel((0, 7)) == (10 * index,) * 3


def test_other_prompts_and_other_noise_are_left_out_and_told(tmp_path: Path) -> None:
    save_tiles(made_run(tmp_path / "Flow", 0, "Flow"), CAPTIONS)
    save_tiles(made_run(tmp_path / "Cosine", 0, "Cosine"), CAPTIONS, seed=5)
    made_run(tmp_path / "Linear", 0, "Linear")
    rows, remarks = side_by_side(group_runs([read_run(tmp_path / s) for s in ("Flow", "Cosine", "Linear")])[0])
    assert [picture is None for picture in rows[0].pictures] == [False, True, True]
    assert "B: schedule=Cosine drew other prompts" in remarks[0] and "C: schedule=Linear kept no single" in remarks[1]


def test_runs_without_pictures_have_no_rows(tmp_path: Path) -> None:
    rows, remarks = side_by_side(group_runs([read_run(made_run(tmp_path / "run"))])[0])
    assert rows == [] and "kept single pictures" in remarks[0]

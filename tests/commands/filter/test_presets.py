"""Tests each preset on a file with the columns and types of its data set."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm.__main__ import main
from ldm.commands.filter.recipe import presets
from tests.commands.filter.test_command import kept, rejected, run

CAPTION = "a small boat in a quiet harbour"
F64, F32, I64, TEXT = pa.float64(), pa.float32(), pa.int64(), pa.string()
# For each data set: a column's type, the value of a row that passes, and values of rows that do not, by reason.
DATACOMP = {
    "uid": (TEXT, "a1fa72ec57b1bc7b2c8c2d4c7c1e0f3e", {}),
    "url": (TEXT, "https://a.org/{i}.jpg", {"url": "data:image/png;base64,x"}),
    "text": (TEXT, CAPTION, {"caption_length": "boat"}),
    "original_width": (I64, 640, {"side": 200}),
    "original_height": (I64, 512, {"aspect": 1281}),
    "clip_b32_similarity_score": (F32, 0.31, {"similarity": 0.27}),
    "clip_l14_similarity_score": (F32, 0.2, {}),
    "face_bboxes": (pa.list_(pa.list_(F64)), [[0.1, 0.2, 0.3, 0.4]], {}),
    "sha256": (TEXT, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", {}),
}
COYO = {
    "id": (I64, 841814333321, {}),
    "url": (TEXT, "https://a.org/{i}.jpg", {"url": ""}),
    "text": (TEXT, CAPTION, {"caption_length": "boat"}),
    "width": (I64, 640, {"side": 511}),
    "height": (I64, 512, {}),
    "image_phash": (TEXT, "c9b6a7d8469c1959", {}),
    "text_length": (I64, 31, {}),
    "word_count": (I64, 7, {}),
    "num_faces": (I64, 0, {}),
    "clip_similarity_vitb32": (F64, 0.43, {"similarity": 0.2}),
    "clip_similarity_vitl14": (F64, 0.35, {}),
    "nsfw_score_opennsfw2": (F64, 0.0003, {"unsafe": 0.9}),
    "nsfw_score_gantman": (F64, 0.9, {}),
    "watermark_score": (F64, 0.1, {"watermark": 0.7}),
    "aesthetic_score_laion_v2": (F64, 6.6, {"aesthetic": 5.4}),
}
LAION_COCO = {
    "URL": (TEXT, "https://a.org/{i}.jpg", {}),
    "TEXT": (TEXT, "boat", {}),
    "WIDTH": (I64, 640, {"side": 300}),
    "HEIGHT": (I64, 512, {}),
    "similarity": (F64, 0.3, {"similarity": None}),
    "hash": (I64, -8526412741873186937, {}),
    "pwatermark": (F32, 0.1, {"watermark": 0.5}),
    "punsafe": (F32, 0.1, {"unsafe": float("nan")}),
    "top_caption": (TEXT, CAPTION, {"caption_length": None}),
    "all_captions": (pa.list_(TEXT), [CAPTION, "boats"], {}),
    "all_similarities": (pa.list_(F64), [0.3, 0.2], {}),
}
LAION_400M = {
    "SAMPLE_ID": (F64, 3060005000229.0, {}),
    "URL": (TEXT, "https://a.org/{i}.jpg", {}),
    "TEXT": (TEXT, CAPTION, {"caption_length": ""}),
    "HEIGHT": (F64, 512.0, {}),
    "WIDTH": (F64, 640.0, {"side": None}),
    "LICENSE": (TEXT, "?", {}),
    "NSFW": (TEXT, "UNLIKELY", {"nsfw": "UNSURE"}),
    "similarity": (F64, 0.34, {}),
}
SHAPES: dict[str, dict[str, tuple[pa.DataType, Any, dict[str, Any]]]] = {
    "datacomp": DATACOMP,
    "coyo": COYO,
    "laion_coco": LAION_COCO,
    "laion_400m": LAION_400M,
}


def write(path: Path, shape: dict[str, tuple[pa.DataType, Any, dict[str, Any]]]) -> list[str]:
    """Writes a row that passes and one for each reason to be rejected, and returns the reasons."""
    good = {name: value for name, (_, value, _) in shape.items()}
    bad = [(reason, name, value) for name, (_, _, values) in shape.items() for reason, value in values.items()]
    rows = [good, *(good | {name: value} for _, name, value in bad)]
    for i, row in enumerate(rows):
        row |= {name: row[name].format(i=i) for name in ("url", "URL") if name in row}
    arrays = {name: pa.array([row[name] for row in rows], kind) for name, (kind, _, _) in shape.items()}
    pq.write_table(pa.table(arrays), path)
    return sorted(reason for reason, _, _ in bad)


@pytest.mark.parametrize("preset", SHAPES)
def test_a_preset_filters_a_file_of_its_data_set(preset: str, tmp_path: Path) -> None:
    reasons = write(tmp_path / "a.parquet", SHAPES[preset])
    run(tmp_path / "a.parquet", tmp_path / "out", "--preset", preset)
    (row,) = kept(tmp_path / "out")
    assert row["url"] == "https://a.org/0.jpg" and row["caption"] == CAPTION
    assert (row["width"], row["height"]) == (640, 512)
    assert rejected(tmp_path / "out") == dict.fromkeys(reasons, 1)


def test_scores_and_identifiers_come_from_the_columns_of_the_preset(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", COYO)
    run(tmp_path / "a.parquet", tmp_path / "out", "--preset", "coyo")
    (row,) = kept(tmp_path / "out")
    scores = {"similarity": 0.43, "punsafe": 0.0003, "pwatermark": 0.1, "aesthetic": 6.6}
    assert {name: row[name] for name in scores} == {name: np.float32(value) for name, value in scores.items()}
    assert row["hash"] == "c9b6a7d8469c1959" and row["sample_id"] == 841814333321


def test_an_option_overrides_the_column_of_a_preset(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", DATACOMP)
    options = ["--column", "similarity=clip_l14_similarity_score", "--min-similarity", "0.2"]
    run(tmp_path / "a.parquet", tmp_path / "out", "--preset", "datacomp", *options)
    assert {row["similarity"] for row in kept(tmp_path / "out")} == {np.float32(0.2)}


@pytest.mark.parametrize("preset", SHAPES)
def test_without_a_preset_the_error_names_the_one_to_give(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.parquet", SHAPES[preset])
    assert main(["filter", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"give --preset {preset}\n" in error and error.count("\n") == 1


def test_conceptual_12m_is_a_tsv_without_a_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f"https://a.org/0.jpg\t{CAPTION}",
        'https://a.org/1.jpg\t"The boat" <PERSON> left in the harbour',
        'https://a.org/2.jpg\t"an unfinished quotation of some length',
        "https://a.org/3.jpg\tboat",
        "https://a.org/0.jpg\tthe same image with another caption",
    ]
    (tmp_path / "cc12m.tsv").write_bytes(
        b"\n".join(line.encode() for line in lines) + b"\nhttps://a.org/4.jpg\tcaf\xe9\n"
    )
    run(tmp_path / "cc12m.tsv", tmp_path / "out", "--preset", "cc12m")
    assert [row["caption"] for row in kept(tmp_path / "out")] == [line.split("\t")[1] for line in lines[:3]]
    assert rejected(tmp_path / "out") == {"caption_length": 2, "duplicate_url": 1}
    assert main(["filter", str(tmp_path / "cc12m.tsv"), "--out", str(tmp_path / "out2")]) == 1
    assert "cc12m.tsv has no header row" in (error := capsys.readouterr().err) and "--preset cc12m" in error


def test_an_added_header_is_not_read_as_a_row(tmp_path: Path) -> None:
    (tmp_path / "cc12m.tsv").write_text(f"url\tcaption\nhttps://a.org/0.jpg\t{CAPTION}\n")
    run(tmp_path / "cc12m.tsv", tmp_path / "out", "--preset", "cc12m")
    assert len(kept(tmp_path / "out")) == 1 and rejected(tmp_path / "out") == {}


def test_every_preset_is_tested() -> None:
    assert {*SHAPES, "cc12m", "laion_sd15"} == {*presets()}

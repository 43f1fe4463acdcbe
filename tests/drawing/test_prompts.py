from pathlib import Path

import pytest

from ldm.drawing.prompts import ImageSpec, image_specs, read_rows


def test_each_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffsteps=3\n\n  a blue square \n", encoding="utf-8")
    assert read_rows(str(tmp_path / "p.txt")) == [{"prompt": "steps=3"}, {"prompt": "a blue square"}]


def test_csv_columns_and_jsonl_keys_set_options_per_row(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('seed,prompt,negative,guidance\n7,"a, b\nc",,\n,d,e,1.5\n')
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a, b\\nc", "seed": 7, "n": null}\n\n{"prompt": "d", "negative": "e", "guidance": 1.5}\n'
    )
    expected = [{"prompt": "a, b\nc", "seed": 7}, {"prompt": "d", "negative": "e", "guidance": 1.5}]
    assert read_rows(str(tmp_path / "p.csv")) == read_rows(str(tmp_path / "p.jsonl")) == expected


def test_seeds_count_up_from_the_seed_of_the_row_or_job() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "seed": 7, "n": 1, "negative": "c", "guidance": 2.0}]
    assert image_specs(rows, 3, 2) == [ImageSpec("a", 3), ImageSpec("a", 4), ImageSpec("b", 7, "c", 2.0)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "holds no prompts"),
        ("p.csv", b"prompt\n", "holds no prompts"),
        ("p.txt", "é".encode("latin-1"), "is not UTF-8 text"),
        ("p.md", b"a", "has an unknown type"),
        ("p.csv", b"Prompt;seed\na;1\n", "has the columns 'Prompt;seed', but needs one that is named prompt: begin"),
        ("p.csv", b"seed,prompt\n1,\n", "line 2 has no prompt"),
        ("p.csv", b"prompt,steps\na,3\n", "line 2 sets 'steps', but a row may only set prompt, negative, seed"),
        ("p.csv", b"prompt,seed\na,-1\n", "line 2 has seed=-1, but seed must be an integer >= 0"),
        ("p.csv", b"prompt,seed\na,1,2\n", "line 2 does not have as many fields as the header"),
        ("p.csv", b'prompt\n"a\n', "cannot be read as CSV: unexpected end"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}', "line 2 has no prompt"),
        ("p.jsonl", b'["a"]', "line 1 has no prompt"),
        ("p.jsonl", b"a", "line 1 is not valid JSON"),
        ("p.jsonl", b'{"prompt": "a", "n": 0}', "line 1 has n=0, but n must be an integer >= 1"),
        ("p.jsonl", b'{"prompt": "a", "guidance": "high"}', "guidance must be a number"),
        ("p.jsonl", b'{"prompt": "a", "negative": 3}', "line 1 has the negative 3, which is not text"),
    ],
)
def test_an_unreadable_file_is_refused_with_the_line_number(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(str(tmp_path / name))

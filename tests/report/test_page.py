import re
from html.parser import HTMLParser
from pathlib import Path

from ldm.report.comparison import compare, plain
from ldm.report.figures import plots
from ldm.report.images import side_by_side
from ldm.report.page import conclusions, html, markdown, table_of_means
from ldm.report.runs import read_run
from tests.report.run_folders import save_tiles, write_run


class Links(HTMLParser):
    """Collects every URL in the page, and asserts that each tag that opens is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(*folders: Path, plotted: bool = False) -> str:
    comparison = compare([read_run(folder) for folder in folders])
    return html(comparison, plots(comparison) if plotted else [], *side_by_side(comparison.groups))


def test_the_page_loads_no_other_file(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / s, 0, s, {"fid": 3.0, "nfe": 20.0}) for s in ("Flow", "Cosine")]
    for folder in folders:
        save_tiles(folder, ["a red circle"])
    links = Links()
    links.feed(page(*folders, plotted=True))
    assert links.open == [] and len(links.found) > 6
    assert all(link.startswith("data:image/") for link in links.found)


def test_text_from_runs_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> $means"
    folder = write_run(tmp_path / "run", metrics={evil: 1.0}, provenance={"commit": evil})
    save_tiles(folder, [evil])
    text = page(folder)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 3
    assert "&lt;/script&gt; $means" in text


def test_a_value_that_is_not_comparable_is_marked_in_its_cell(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "Flow", 0, "Flow", {"fid": 3.0, "kid": 1.0}),
        write_run(tmp_path / "Cosine", 0, "Cosine", {"fid": 2.0}, {"reference": {"sha256": "e" * 64, "count": 2048}}),
    ]
    header, rows, notes = table_of_means(compare([read_run(folder) for folder in folders]), main=True)
    assert header == ["", "A", "B"] and rows == [["FID ↓", "3", "2 [1]"], ["KID ↓", "1", "–"]]
    note = "not comparable with the first value of the row: reference images differ (bbbbbbbbbbbb and eeeeeeeeeeee)"
    assert notes == [note] and note in page(*folders)


def test_a_value_from_few_images_is_marked_with_one_note_for_all_metrics(tmp_path: Path) -> None:
    few = {"prompts": {"count": 8, "sha256": "c" * 64}}
    folders = [
        write_run(tmp_path / "a", 0, "Flow", {"fid": 3.0, "clip_score": 1.0, "training_seconds": 5.0}, few),
        write_run(tmp_path / "b", 0, "Cosine", {"fid": 3.0}, {"feature_width": 512}),
    ]
    comparison = compare([read_run(folder) for folder in folders])
    _, rows, notes = table_of_means(comparison, main=True)
    assert rows == [["FID ↓", "3 [1]", "3 [2] [3]"], ["CLIP score ↑", "1 [1]", "–"]]
    assert notes[0] == "measured on 8 images, fewer than the 100 that a comparison needs"
    assert notes[2].startswith("FID from 2048 real and 512 generated images is strongly biased, because there are")
    assert table_of_means(comparison, main=False)[1] == [["training time in seconds ↓", "5", "–"]]


def test_many_groups_have_rows_instead_of_columns(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"s{k}", 0, f"Schedule{k}", {"fid": float(k)}, curves=False) for k in range(1, 9)]
    header, rows, _ = table_of_means(compare([read_run(folder) for folder in folders]), main=True)
    assert header == ["", "FID ↓"] and rows[:2] == [["A", "1"], ["B", "2"]] and len(rows) == 8


def test_the_page_opens_with_the_settings_once_then_images_chart_and_table(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / s, 0, s, {"fid": 3.0}) for s in ("Flow", "Cosine")]
    for folder in folders:
        save_tiles(folder, ["a red circle"])
    text = page(*folders, plotted=True).partition("<body>")[2]
    parts = ("schedule=Flow; seed 0", 'alt="A: a red circle"', 'alt="B: a red circle"', 'alt="Means"', "FID ↓</th>")
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions) and text.count("schedule=Flow") == 1


def test_images_beyond_the_first_prompts_are_folded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", metrics={"fid": 3.0})
    save_tiles(folder, [f"prompt {k}" for k in range(6)])
    shown, folded = page(folder).split("<summary>2 more prompts</summary>")
    assert shown.count(": prompt") == 4 and folded.count(": prompt") == 2


def test_a_run_that_was_never_evaluated_is_named_with_its_validation_loss(tmp_path: Path) -> None:
    sets = {"shapes": {"count": 256, "sha256": "f" * 64}}
    numbers = {"val/shapes/loss": 0.25, "training_seconds": 5.0}
    folders = [
        write_run(tmp_path / "evaluated", 0, "Flow", {"fid": 3.0} | numbers, {"sets": sets}),
        write_run(tmp_path / "only_trained", 0, "Cosine", numbers, {"sets": sets}),
    ]
    comparison = compare([read_run(folder) for folder in folders])
    assert ["validation loss on shapes ↓", "0.25", "0.25"] in table_of_means(comparison, main=True)[1]
    text = f"{folders[1]} (B) was never evaluated on generated images"
    assert any(line.startswith(text) for line in conclusions(comparison)) and text in page(*folders)
    report = plain(comparison)
    assert report["not_evaluated"] == [str(folders[1])]
    assert report["groups"][1]["metrics"]["val/shapes/loss"]["mean"] == 0.25


def test_runs_without_any_evaluation_are_not_listed_one_by_one(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / s, 0, s, {"val/shapes/loss": 0.25})) for s in ("Flow", "Cosine")]
    assert conclusions(compare(runs))[-1].startswith("None of these runs was evaluated on generated images")


def test_a_first_stage_is_evaluated_by_its_validation(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / s, 0, s, {"val/images/psnr": 30.0})) for s in ("Flow", "Cosine")]
    assert not any("evaluated" in text for text in conclusions(compare(runs)))


def test_the_page_lists_every_run_with_its_state(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folders = [write_run(tmp_path / "done", metrics={"fid": 1.0}), write_run(tmp_path / "going"), tmp_path / "empty"]
    text = re.sub("<[^>]+>", " ", page(*folders))
    for word in ("finished", "in progress", "empty", "no config.yaml"):
        assert word in text


def test_the_markdown_has_the_same_tables(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{s}{n}", n, s, {"fid": 3.0 + n}) for s in ("Flow", "Cosine") for n in range(3)]
    text = markdown(compare([read_run(folder) for folder in folders]))
    assert "- **A**: schedule=Flow; seeds 0, 1, 2" in text and "| FID ↓ | 4.0 ± 2.5 | 4.0 ± 2.5 |" in text
    assert "95 % interval over the seeds of training" in text
    assert "| schedule (+1) | Flow | Cosine |" in text
    assert "No difference shown in FID" in text

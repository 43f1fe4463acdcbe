import re
from html.parser import HTMLParser
from pathlib import Path

from ldm.report.comparison import compare
from ldm.report.figures import plots
from ldm.report.images import side_by_side
from ldm.report.page import html, markdown, table_of_means
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
    _, rows, notes = table_of_means(compare([read_run(folder) for folder in folders]))
    assert rows[0][2:] == ["3", "1"] and rows[1][2:] == ["2 [1]", "–"]
    assert notes == ["FID: not comparable with the first row: reference images differ (bbbbbbbbbbbb and eeeeeeeeeeee)"]
    assert "FID: not comparable with the first row: reference images differ" in page(*folders)


def test_a_value_from_few_images_is_marked_in_its_cell(tmp_path: Path) -> None:
    few = {"prompts": {"count": 8, "sha256": "c" * 64}}
    folders = [
        write_run(tmp_path / "a", 0, "Flow", {"fid": 3.0, "clip_score": 1.0, "training_seconds": 5.0}, few),
        write_run(tmp_path / "b", 0, "Cosine", {"fid": 3.0}, {"feature_width": 512}),
    ]
    _, rows, notes = table_of_means(compare([read_run(folder) for folder in folders]))
    assert rows[0][2:] == ["3 [1]", "1 [2]", "5"] and rows[1][2] == "3 [3] [4]"
    assert notes[0] == "FID: measured on 8 images, fewer than the 100 that a comparison needs"
    assert notes[3].startswith("FID: FID from 2048 real and 512 generated images is strongly biased, because there are")


def test_the_page_lists_every_run_with_its_state(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folders = [write_run(tmp_path / "done", metrics={"fid": 1.0}), write_run(tmp_path / "going"), tmp_path / "empty"]
    text = re.sub("<[^>]+>", " ", page(*folders))
    for word in ("finished", "in progress", "empty", "no config.yaml"):
        assert word in text


def test_the_markdown_has_the_same_tables(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{s}{n}", n, s, {"fid": 3.0 + n}) for s in ("Flow", "Cosine") for n in range(3)]
    text = markdown(compare([read_run(folder) for folder in folders]))
    assert "| A: schedule=Flow | 0, 1, 2 | 4.0 ± 2.5 |" in text
    assert "95 % interval over the seeds of training" in text
    assert "| schedule (+1) | Flow | Cosine |" in text
    assert "no difference shown" in text

from pathlib import Path

import pytest

from ldm.report.comparison import compare
from ldm.report.figures import front, plots, rendered
from ldm.report.runs import read_run
from tests.report.run_folders import write_run


def test_logged_curves_and_measured_metrics_are_plotted(tmp_path: Path) -> None:
    numbers = {"fid": 9.0, "sampling_seconds": 2.0, "nfe": 20.0, "training_seconds": 60.0}
    runs = [write_run(tmp_path / name, 0, name, numbers) for name in ("Flow", "Cosine")]
    figures = plots(compare([read_run(run) for run in runs]))
    assert [plot.name for plot in figures] == [
        "means",
        "error_by_noise",
        "val_shapes_loss_by_images",
        "val_shapes_loss_by_minutes",
        "train_loss_by_images",
        "train_loss_by_minutes",
        "fid_by_seconds",
        "fid_by_nfe",
        "fid_by_training",
    ]
    assert "objectives differ" in figures[2].note
    files = rendered(figures[1:2], "a_")
    assert {name: data[:4] for name, data in files.items()} == {
        "a_error_by_noise.svg": b"<?xm",
        "a_error_by_noise.pdf": b"%PDF",
    }


def test_parts_of_a_loss_have_no_plots(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    log = folder / "csv" / "metrics.csv"
    header, *rows = log.read_text().splitlines()
    names = "val/shapes/loss_by_log_snr/-2_to_0,train/loss_by_log_snr/-2_to_0"
    log.write_text("\n".join([f"{header},{names}", *(f"{row},0.1,0.1" for row in rows)]) + "\n")
    figures = [plot.name for plot in plots(compare([read_run(folder)]))]
    assert "val_shapes_loss_by_images" in figures and not any("log_snr" in name for name in figures)


def test_names_of_validation_plots_contain_no_slash(tmp_path: Path) -> None:
    numbers = {"val/shapes/loss": 0.5, "training_seconds": 60.0}
    runs = [write_run(tmp_path / name, 0, name, numbers, curves=False) for name in ("Flow", "Cosine")]
    figures = plots(compare([read_run(run) for run in runs]))
    assert figures[-1].name == "val_shapes_loss_by_training"
    assert not any("/" in name for name in rendered(figures, "a_"))


def test_runs_without_curves_and_metrics_have_no_plots(tmp_path: Path) -> None:
    assert plots(compare([read_run(write_run(tmp_path / "run", curves=False))])) == []


@pytest.mark.parametrize(("better", "expected"), [(-1, [(1, 9), (2, 5)]), (1, [(1, 9), (4, 10)])])
def test_the_front_contains_the_points_that_no_other_beats_in_cost_and_value(
    better: int, expected: list[tuple[float, float]]
) -> None:
    assert front([(2, 5), (1, 9), (3, 6), (4, 10)], better) == expected


def test_the_means_have_a_row_per_group_with_intervals_and_runs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{name}{seed}", seed, name, {"fid": 9.0 + seed, "accuracy": 0.5}, curves=False)
        for name in ("Flow", "Cosine")
        for seed in range(3)
    ]
    found = compare([read_run(run) for run in runs])
    chart = plots(found)[0]
    accuracy, fid = chart.figure.axes
    assert [axes.get_title() for axes in (accuracy, fid)] == ["accuracy, % ↑", "FID ↓"]
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["A", "B"]
    half = found.means["fid"][0].half  # type: ignore[union-attr]
    ends = fid.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert ends.tolist() == pytest.approx([10.0 - half, 10.0 + half])  # type: ignore[operator]


def test_only_files_name_the_groups_below_the_means(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 0, name, {"fid": 9.0}, curves=False) for name in ("Flow", "Cosine")]
    chart = plots(compare([read_run(run) for run in runs]))[0]
    assert [text.get_text() for text in chart.figure.legends[0].get_texts()] == [
        "A: schedule=Flow",
        "B: schedule=Cosine",
    ]
    page, file = chart.svg(), rendered([chart])["means.svg"]
    assert len(page) < len(file) and chart.figure.legends[0].get_visible()


def test_costs_on_a_logarithmic_axis_are_plain_numbers_and_groups_left_out_are_named(tmp_path: Path) -> None:
    other = {"reference": {"count": 2048, "sha256": "e" * 64}}
    runs = [
        write_run(tmp_path / name, 0, name, {"fid": 9.0, "sampling_seconds": seconds}, about, curves=False)
        for name, seconds, about in (("Flow", 51.2, {}), ("Cosine", 409.6, {}), ("Linear", 51.2, other))
    ]
    *_, plot = plots(compare([read_run(run) for run in runs]))
    assert plot.note.endswith("Left out, because not comparable: C.")
    ((axes,), (low, high)) = plot.figure.axes, plot.figure.axes[0].get_xlim()
    plot.svg()  # draws it
    texts = [tick.label1.get_text() for tick in axes.xaxis.get_minor_ticks() + axes.xaxis.get_major_ticks()]
    shown = sorted(float(text) for text in texts if text and low <= float(text) <= high)
    assert shown == [0.1, 0.2, 0.5]

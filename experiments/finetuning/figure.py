"""Draws what was learned against what was forgotten, and grids of images."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image

from experiments.finetuning.runs import Run
from experiments.finetuning.study import RATES, STEPS, recipe

Cell = dict[str, Any]
Pick = Callable[[Cell], dict[str, Any]]  # of a figure of a cell
COLORS = {"lora": "tab:blue", "full": "tab:orange", "inversion": "tab:green"}
MARKERS = {"shape": "o", "colour": "s", "style": "^"}
FILLS = {"none": "none", "class": "left", "many": "full"}
PRIORS = {"none": "no class images", "class": "class images of one prompt", "many": "class images of many prompts"}
SWEPT = {"rank": "tab:blue", "rate": "tab:red", "steps": "tab:green"}
GOAL: dict[str, Any] = {"alpha": 0.12, "color": "green", "zorder": 0}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws all parts of the study."""
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 10), layout="constrained")
    single = [cell for cell in results["cells"] if len(cell["added"]) == 1]
    plain = [cell for cell in single if cell["added"][0]["weight"] == 1]
    _methods(axes[0, 0], [cell for cell in plain if is_default(cell) or is_long(cell)])
    _curve(axes[0, 1], [cell for cell in plain if _one(cell, "concept", "method") == ("shape", "lora")])
    _weights(axes[1, 0], [cell for cell in single if _settings(cell) == _settings_of(recipe("shape", 0))])
    _merging(axes[1, 1], [cell for cell in results["cells"] if len(cell["added"]) == 2])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def is_default(cell: Cell) -> bool:
    """Whether the cell has the settings of the comparison of methods."""
    one = cell["added"][0]
    default = Run(one["concept"], one["method"], one["prior"], RATES[one["method"]], STEPS[one["method"]])
    return _settings(cell) == _settings_of(default)


def is_long(cell: Cell) -> bool:
    """Whether the cell is of the part with more images, whose captions mention sizes."""
    return bool(cell["added"][0]["sizes"])


def _settings(cell: Cell) -> dict[str, Any]:
    return {name: value for name, value in cell["added"][0].items() if name not in ("weight", "prior_images")}


def _settings_of(run: Run) -> dict[str, Any]:
    return {name: value for name, value in vars(run).items() if name not in ("seed", "prior_images")}


def _one(cell: Cell, *names: str) -> tuple[Any, ...]:
    return tuple(cell["added"][0][name] for name in names)


def _learned(cell: Cell) -> dict[str, Any]:
    learned: dict[str, Any] = cell[f"{cell['added'][0]['concept']}/singles"]
    return learned


def _half(figure: dict[str, Any]) -> float:
    return max((half for name, half in figure.items() if name != "value" and half is not None), default=0.0)


def _point(axes: Axes, cell: Cell, **how: Any) -> None:
    learned, lost = _learned(cell), cell["lost"]
    bars: dict[str, Any] = {"xerr": _half(lost), "yerr": _half(learned), "elinewidth": 0.6, "ecolor": "0.7"}
    axes.errorbar(lost["value"], learned["value"], linestyle="none", markersize=8, **bars, **how)


def _goal(axes: Axes) -> None:
    axes.fill_between([-5, 2], 90, 102, **GOAL)
    axes.set(xlabel="forgotten: points lost on old prompts", ylabel="learned: new prompts right, %")
    axes.set(xlim=(-5, 103), ylim=(-3, 103))
    axes.grid(alpha=0.3)


def _methods(axes: Axes, cells: Sequence[Cell]) -> None:
    for cell in cells:
        concept, method, prior = _one(cell, "concept", "method", "prior")
        how = {"marker": MARKERS[concept], "color": COLORS[method], "fillstyle": FILLS[prior]}
        _point(axes, cell, markerfacecoloralt="white", **how)
        if is_long(cell):
            place: dict[str, Any] = {"xytext": (9, -3), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(f"{cell['added'][0]['images']}", (cell["lost"]["value"], _learned(cell)["value"]), **place)
    entries: list[tuple[dict[str, Any], str]] = [
        ({"marker": marker, "color": "0.3"}, name) for name, marker in MARKERS.items()
    ]
    entries += [({"marker": "o", "color": color}, name) for name, color in COLORS.items()]
    entries += [
        ({"marker": "o", "color": "0.3", "fillstyle": fill, "markerfacecoloralt": "white"}, PRIORS[name])
        for name, fill in FILLS.items()
    ]
    for style, name in entries:
        axes.plot([], [], linestyle="none", label=name, **style)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    axes.set_title("Methods (green: the goal; numbers: images with sizes in captions)")
    _goal(axes)


def _curve(axes: Axes, cells: Sequence[Cell]) -> None:
    """Plots a line for each setting that varies, without class images (dashed) and with those of many prompts."""
    for prior, line in (("none", "--"), ("many", "-")):
        centre = _settings_of(recipe("shape", 0, prior=prior))
        for name, color in SWEPT.items():
            varied = [cell for cell in cells if {**_settings(cell), name: centre[name]} == centre]
            varied.sort(key=lambda cell: cell["added"][0][name])
            points = [(cell["lost"]["value"], _learned(cell)["value"]) for cell in varied]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), line, marker="o", markersize=4, color=color, linewidth=1)
            for cell, point in zip(varied, points, strict=True):
                text = "" if _settings(cell) == centre else f"{cell['added'][0][name]:g}"
                axes.annotate(text, point, fontsize=7, color=color, xytext=(4, 3), textcoords="offset points")
    for name, color in SWEPT.items():
        axes.plot([], [], color=color, label=name)
    for line, name in (("--", PRIORS["none"]), ("-", PRIORS["many"])):
        axes.plot([], [], line, color="0.3", label=name)
    axes.legend(fontsize=8, loc="upper right")
    axes.set_title("A new shape by LoRA: rank, rate and steps")
    _goal(axes)


def _lines(axes: Axes, cells: Iterable[Cell], lines: Mapping[str, Pick], style: str) -> None:
    ordered = sorted(cells, key=lambda cell: cell["added"][0]["weight"])
    for index, (name, pick) in enumerate(lines.items()):
        weights = [cell["added"][0]["weight"] for cell in ordered]
        values = [pick(cell) for cell in ordered]
        halves = [_half(value) for value in values]
        how: dict[str, Any] = {
            "color": f"C{index}",
            "linestyle": style,
            "marker": "o",
            "markersize": 4,
            "elinewidth": 0.6,
        }
        axes.errorbar(
            weights, [value["value"] for value in values], yerr=halves, label=name if style == "-" else None, **how
        )
    axes.set(xlabel="weight", ylabel="%", ylim=(-8, 103))
    axes.grid(alpha=0.3)


def _weights(axes: Axes, cells: Sequence[Cell]) -> None:
    lines = {"new prompts right": _learned, "lost on old prompts": lambda cell: cell["lost"]}
    _lines(axes, cells, lines, "-")
    axes.legend(fontsize=8)
    axes.set_title("A LoRA of a new shape, by weight")


def _merging(axes: Axes, cells: Sequence[Cell]) -> None:
    names = {"shape": "shape/singles", "colour": "colour/singles", "shape in colour": "both", "lost": "lost"}
    lines: dict[str, Pick] = {name: operator.itemgetter(key) for name, key in names.items()}
    for prior, style in (("none", "--"), ("many", "-")):
        chosen = [cell for cell in cells if cell["added"][0]["prior"] == prior]
        _lines(axes, chosen, lines, style)
        axes.plot([], [], color="0.3", linestyle=style, label=PRIORS[prior])
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    axes.set_title("Shape and colour LoRA merged, both with this weight")


def draw_grids(results: dict[str, Any], folder: Path, out: Path) -> None:
    """Draws a grid for each concept whose images are all there: what the base and each method's first seed generate."""
    for concept in MARKERS:
        rows = {"base": folder / f"base_{concept}.png"}
        for cell in results["cells"]:
            one = {name: value for name, value in cell["added"][0].items() if name != "weight"}
            if len(cell["added"]) == 1 and one["concept"] == concept and (is_default(cell) or is_long(cell)):
                images = f"\n{one['images']} images" if is_long(cell) else ""
                rows[f"{one['method']}\n{one['prior']}{images}"] = folder / f"{Run(**one).key}.png"
        if all(path.is_file() for path in rows.values()):
            _grid({name: Image.open(path) for name, path in rows.items()}, out / f"{concept}.png")


def _grid(strips: Mapping[str, Image.Image], path: Path) -> None:
    figure, axes = pyplot.subplots(len(strips), 1, figsize=(10, 0.9 * len(strips)), layout="constrained", squeeze=False)
    for (name, strip), row in zip(strips.items(), axes[:, 0], strict=True):
        row.imshow(strip)
        row.set(xticks=[], yticks=[])
        row.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)

"""Plots solvers.json as orders.png, paths.png and distribution.png:  python experiments/solvers/figure.py"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

HERE = Path(__file__).parent
STYLES = ["-", "--", ":"]


def curve(axes: Axes, name: str, errors: dict[str, float], index: int) -> None:
    nfe = [int(key) for key in errors]
    colour = pyplot.get_cmap("tab10")(index % 10)
    axes.plot(nfe, list(errors.values()), STYLES[index // 10], color=colour, label=name, linewidth=1.2)


def finish(axes: Axes, title: str) -> None:
    axes.set(xscale="log", yscale="log", title=title, xlabel="network calls")
    axes.set_xticks([4, 8, 16, 32, 64, 128, 256, 512], labels=["4", "8", "16", "32", "64", "128", "256", "512"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def orders(found: dict[str, Any], path: Path) -> None:
    """Plots deterministic samplers on the left and stochastic ones on the right, each with its fitted order."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    stochastic = {"ddpm", "euler_a", "edm"} | {name for name in found if name.endswith(("_sde", "_a", "_diffusers"))}
    for axes, names, title in (
        (left, [name for name in found if name not in stochastic], "paths: distance from the exact end"),
        (right, [name for name in found if name in stochastic], "Gaussian data: distance of the distribution"),
    ):
        for index, name in enumerate(names):
            curve(axes, f"{name} {found[name]['order']:.2f}", found[name]["errors"], index)
        finish(axes, title)
        axes.set_ylim(1e-9, 2)
        axes.legend(fontsize=8, title="fitted order", loc="lower left")
    figure.savefig(path, dpi=110)


def paths(found: dict[str, Any], path: Path) -> None:
    """Plots a grid with a row per problem and a column per spacing."""
    spacings = list(next(iter(found.values())))
    size = (3.4 * len(spacings), 3.4 * len(found))
    figure, grid = pyplot.subplots(
        len(found), len(spacings), figsize=size, sharex=True, sharey="row", layout="constrained"
    )
    for row, (problem, by_spacing) in zip(grid, found.items(), strict=True):
        for axes, (spacing, by_sampler) in zip(row, by_spacing.items(), strict=True):
            for index, (name, errors) in enumerate(by_sampler.items()):
                curve(axes, name, errors, index)
            finish(axes, f"{problem}, {spacing}")
            least = min(min(errors.values()) for solvers in by_spacing.values() for errors in solvers.values())
            axes.set_ylim(least / 2, 3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=9)
    figure.savefig(path, dpi=90)


def distribution(found: dict[str, Any], path: Path) -> None:
    spacings = [name for name in found if name != "floor"]
    figure, row = pyplot.subplots(
        1, len(spacings), figsize=(3.4 * len(spacings), 4.4), sharey=True, layout="constrained"
    )
    for axes, spacing in zip(row, spacings, strict=True):
        for index, (name, errors) in enumerate(found[spacing].items()):
            curve(axes, name, errors, index)
        axes.axhspan(*found["floor"], color="black", alpha=0.12, linewidth=0)
        finish(axes, f"mixture, {spacing}")
        axes.set_ylim(0.7 * found["floor"][0], 1)
    row[0].text(4, found["floor"][0] * 0.97, "grey: range of exact samples", fontsize=8, va="top")
    row[0].set_ylabel("sliced Wasserstein distance")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(spacings), fontsize=9)
    figure.savefig(path, dpi=90)


def main() -> None:
    found = json.loads((HERE / "solvers.json").read_text())
    orders(found["solvers"], HERE / "orders.png")
    paths(found["paths"], HERE / "paths.png")
    distribution(found["distribution"], HERE / "distribution.png")


if __name__ == "__main__":
    main()

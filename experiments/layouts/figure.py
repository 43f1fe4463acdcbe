"""Plots layouts.json as curves.png:  python -m experiments.layouts.figure"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent


def plot() -> None:
    """Plots the loss curves, and the distance of each from the first."""
    curves = json.loads((FOLDER / "layouts.json").read_text(encoding="utf-8"))["curves"]
    first, *others = curves
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    for name, losses in curves.items():
        above.plot(losses, label=name, linewidth=1)
    for name in others:
        apart = [abs(a - b) for a, b in zip(curves[name], curves[first], strict=True)]
        below.semilogy([max(value, 1e-9) for value in apart], label=name, linewidth=1)
    below.axhline(1e-5, color="black", linestyle="--", linewidth=0.8)
    above.set(ylabel="loss of 8 images", title="loss by layout (ranks x batch)")
    below.set(xlabel="step", ylabel=f"distance from {first}", ylim=(5e-10, 1e-4))
    above.legend(fontsize=8)
    figure.savefig(FOLDER / "curves.png", dpi=120)


if __name__ == "__main__":
    plot()

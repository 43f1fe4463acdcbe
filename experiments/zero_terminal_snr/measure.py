"""Measures the brightness of generated images, and writes brightness.json and brightness.svg.

    python experiments/zero_terminal_snr/measure.py runs/zero_terminal_snr/*/

Run it from the checkout. Brightness is measured in latents, because the decoder renders a background as black, gray or
white, whichever is nearest. It is the projection of the corner latents on the line from those of a black image (0) to
those of a white one (255). Images of held-out captions are sampled without guidance, which exaggerates brightness, and
compared with the held-out images. Images of the empty prompt are compared with the data's third of each background.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from ldm.data.sources.phrasing import parse  # noqa: E402 - found by the line before
from ldm.data.sources.shapes import Shapes  # noqa: E402
from ldm.files import write_json  # noqa: E402
from ldm.image import from_uint8  # noqa: E402
from ldm.pipeline.pipeline import Pipeline  # noqa: E402
from ldm.report.runs import read_run  # noqa: E402
from ldm.report.statistics import mean  # noqa: E402

NAMES = ("black", "gray", "white")
ZERO = "zero terminal SNR"
COUNT = 64  # prompts per background, and three times as many empty prompts


def corners(latents: Tensor) -> Tensor:
    """Returns the mean of the four corner latents (b, z), which shapes rarely reach."""
    return latents[:, :, :: latents.shape[2] - 1, :: latents.shape[3] - 1].mean((2, 3))


class Scale:
    """Maps images to a brightness level: 0 for a black image, 255 for a white one."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        flat = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, *pipeline.settings.size)
        self._black, white = self._encoded(flat)
        self._line = (white - self._black) / (white - self._black).square().sum()

    def of(self, images: Tensor) -> float:
        """Returns the mean level of images uint8 (b, 3, h, w)."""
        return self._level(self._encoded(images)).mean().item()

    def of_samples(self, prompts: Sequence[str], spacing: str) -> Tensor:
        """Samples images of the prompts and returns the level of each background (n,)."""
        found: list[Tensor] = []

        def keep(_first: int, step: int, x0: Tensor) -> None:
            if step == self._pipeline.settings.steps - 1:
                found.append(corners(x0))

        self._pipeline(prompts, batch_size=COUNT, on_estimate=keep, guidance=1.0, spacing=spacing)
        return self._level(torch.cat(found))

    def _level(self, corner: Tensor) -> Tensor:
        return 255 * ((corner - self._black) * self._line).sum(1)

    @torch.no_grad()
    def _encoded(self, images: Tensor) -> Tensor:
        return corners(self._pipeline.first_stage.encode(from_uint8(images.contiguous())))


def measured(pipeline: Pipeline, spacing: str) -> dict[str, float]:
    """Returns the level offsets of requested backgrounds, and each background's percentage without a caption."""
    data = Shapes(seed=2, split="held_out", length=6 * COUNT)
    scale, held_out = Scale(pipeline), [data[i] for i in range(len(data))]
    found = {}
    for name in NAMES:
        samples = [sample for sample in held_out if parse(sample["caption"]).background == name][:COUNT]
        level = scale.of_samples([sample["caption"] for sample in samples], spacing).mean().item()
        found[name] = level - scale.of(torch.stack([sample["image"] for sample in samples]))
    free = scale.of_samples([""] * (3 * COUNT), spacing)
    for name, low, high in (("black", -torch.inf, 64.0), ("gray", 64.0, 191.5), ("white", 191.5, torch.inf)):
        found[f"{name}, unasked"] = 100 * ((free >= low) & (free < high)).double().mean().item()
    return found


def kinds(run: str) -> dict[str, str]:
    """Returns the spacings to sample a run with, by name; leading spacing would not use the zero SNR."""
    if str(read_run(run).config["schedule._target_"]).endswith("zero_terminal_snr"):
        return {ZERO: "trailing"}
    return {"Stable Diffusion's, leading": "leading", "Stable Diffusion's, trailing": "trailing"}


def main(runs: list[str]) -> None:
    found: dict[str, dict[Any, dict[str, float]]] = defaultdict(dict)  # by kind and seed
    for run in runs:
        pipeline = Pipeline.load(run)
        for kind, spacing in kinds(run).items():
            found[kind][read_run(run).seed] = measured(pipeline, spacing)
    for kind in [kind for kind in found if kind != ZERO]:
        pairs = [(found[ZERO][seed], one) for seed, one in found[kind].items() if seed in found[ZERO]]
        differences = [{name: zero[name] - one[name] for name in one} for zero, one in pairs]
        found[f"{ZERO} minus {kind}"] = dict(enumerate(differences))
    means = {
        kind: {name: mean([one[name] for one in ones.values()]) for name in next(iter(ones.values()))}
        for kind, ones in sorted(found.items())
    }
    report: dict[str, Any] = {
        kind: {name: {"mean": m.value, "half_interval": m.half, "seeds": m.count} for name, m in row.items()}
        for kind, row in means.items()
    }
    write_json(HERE / "brightness.json", {"count": COUNT, "runs": len(runs), "measured": report})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    shown = {kind: row for kind, row in means.items() if " minus " not in kind}
    for index, (kind, row) in enumerate(shown.items()):
        places = [place + 0.12 * (index - (len(shown) - 1) / 2) for place in range(len(NAMES))]
        for axes, suffix, expected in ((left, "", 0.0), (right, ", unasked", 100 / 3)):
            values = [row[name + suffix].value - expected for name in NAMES]
            halves = [row[name + suffix].half or 0.0 for name in NAMES]
            axes.errorbar(places, values, halves, fmt="o", capsize=3, label=kind)
    for axes in (left, right):
        axes.axhline(0, color="#888888", lw=0.8)
        axes.set_xticks(range(len(NAMES)), NAMES)
    left.set(xlabel="requested background", ylabel="level of samples minus data, of 255")
    right.set(xlabel="background without a caption", ylabel="share of images minus a third, points")
    left.legend(fontsize=7.5, frameon=False)
    figure.savefig(HERE / "brightness.svg")
    for kind, row in means.items():
        print(f"{kind:52}", *(f"{name} {m.value:.1f} ± {m.half or 0:.1f}  " for name, m in row.items()))


if __name__ == "__main__":
    main(sys.argv[1:])

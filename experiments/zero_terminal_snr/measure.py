"""How bright pictures come out whose prompt asks for a black, gray or white background → brightness.json and .svg.

    python experiments/zero_terminal_snr/measure.py runs/zero_terminal_snr/*/

From the checkout. The background is what lies in the frame of three pixels, where no shape reaches; its level is the
mean over pictures of the frame's median, 0 black to 255 white. The data's own levels are 0, 128 and 255.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from ldm.data.shapes import BACKGROUNDS, held_out_prompts, parse  # noqa: E402 - found by the line before
from ldm.files import write_json  # noqa: E402
from ldm.pipeline import Pipeline  # noqa: E402
from ldm.report.runs import read_run  # noqa: E402
from ldm.report.statistics import mean  # noqa: E402

COUNT = 64  # prompts a background
FRAME = 3


def levels(pipeline: Pipeline, spacing: str) -> dict[str, float]:
    """Background → level of what is drawn."""
    captions = held_out_prompts(6 * COUNT)
    found = {}
    for name in BACKGROUNDS:
        prompts = [caption for caption in captions if parse(caption).background == name][:COUNT]
        images = pipeline(prompts, batch_size=COUNT, spacing=spacing).images
        frame = torch.ones(images.shape[2:], dtype=torch.bool)
        frame[FRAME:-FRAME, FRAME:-FRAME] = False
        found[name] = images[:, :, frame].float().flatten(1).median(dim=1).values.mean().item()
    return found


def kinds(run: str) -> dict[str, str]:
    """How a run is drawn from → the spacing: a walk that starts before the last index leaves zero SNR unused."""
    if str(read_run(run).config["schedule._target_"]).endswith("zero_terminal_snr"):
        return {"zero terminal SNR": "trailing"}
    return {"Stable Diffusion's, leading": "leading", "Stable Diffusion's, trailing": "trailing"}


def main(runs: list[str]) -> None:
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for run in runs:
        pipeline = Pipeline.load(run)
        for kind, spacing in kinds(run).items():
            found[kind].append(levels(pipeline, spacing))
    means = {k: {name: mean([one[name] for one in all_]) for name in BACKGROUNDS} for k, all_ in sorted(found.items())}
    told: dict[str, Any] = {
        k: {name: {"level": m.value, "half_interval": m.half, "seeds": m.count} for name, m in row.items()}
        for k, row in means.items()
    }
    write_json(HERE / "brightness.json", {"data": BACKGROUNDS, "count": COUNT, "runs": runs, "levels": told})
    figure, axes = pyplot.subplots(figsize=(4.8, 3.4), layout="constrained")
    for index, (label, row) in enumerate(means.items()):
        offsets = [row[name].value - level for name, level in BACKGROUNDS.items()]
        halves = [row[name].half or 0.0 for name in BACKGROUNDS]
        places = [place + 0.12 * (index - (len(means) - 1) / 2) for place in range(len(BACKGROUNDS))]
        axes.errorbar(places, offsets, halves, fmt="o", capsize=3, label=label)
    axes.axhline(0, color="#888888", lw=0.8)
    axes.set_xticks(range(len(BACKGROUNDS)), list(BACKGROUNDS))
    axes.set(xlabel="background asked for", ylabel="level drawn minus the data's, of 255")
    axes.legend(fontsize=7.5, frameon=False)
    figure.savefig(HERE / "brightness.svg")
    for label, row in means.items():
        print(f"{label:32}", *(f"{name} {m.value:6.1f}" for name, m in row.items()))


if __name__ == "__main__":
    main(sys.argv[1:])

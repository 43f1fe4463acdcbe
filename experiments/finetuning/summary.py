"""Summarises the measurements of the study in results.json, and draws learned_forgotten.png and the grids of images.

    python -m experiments.finetuning.summary FOLDER      # the folder that the study prints, runs/finetuning/…

An earlier results.json of the same base is extended: its measurements of other runs and other seeds are kept, and its
figures of more seeds than were measured. One of another base is replaced.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.finetuning.concepts import CONCEPTS
from experiments.finetuning.figure import draw, draw_grids
from experiments.finetuning.measure import old_prompts
from experiments.finetuning.runs import Run
from ldm.data.sources.phrasing import plain_prompts
from ldm.files import write_json
from ldm.report.statistics import mean

HERE = Path(__file__).parent
LEARNED, LOST = 90.0, 2.0  # the goal: at least and at most, in per cent and points
Estimate = dict[str, float | None]


def bits(text: str) -> np.ndarray:
    return np.array([float(character) for character in text])


def estimate(values: np.ndarray) -> Estimate:
    """Returns the mean in per cent of values (seeds, prompts), and half its 95 % intervals over seeds and prompts."""
    over_seeds, over_prompts = mean([*values.mean(1)]), mean([*values.mean(0)])
    halves = {"half_over_seeds": over_seeds.half, "half_over_prompts": over_prompts.half}
    scaled = {name: None if half is None else round(100 * half, 2) for name, half in halves.items()}
    return {"value": round(100 * over_seeds.value, 2), **scaled}


def summarised(records: Sequence[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of measurements that differ only in their seeds; `lost` is before minus after, paired."""
    sets = {name: np.stack([bits(one["right"][name]) for one in records]) for name in records[0]["right"]}
    before = bits(base["right"]["old"])
    lost = before - sets.pop("old")
    figures: dict[str, Any] = {name: estimate(values) for name, values in sets.items()}
    for name, concept in CONCEPTS.items():
        if f"{name}/singles" in sets:
            values = sets[f"{name}/singles"]
            scenes = concept.singles[: values.shape[1]]
            taught = np.array([concept.is_taught(scene) for scene in scenes])
            sized = np.array([any(thing.size for thing in scene.things) for scene in scenes])
            kinds = {"of taught combinations": taught, "of new combinations": ~taught}
            kinds |= {"with a size": sized, "without a size": ~sized}
            for label, mask in kinds.items():
                if mask.any():
                    figures[f"{name}/singles {label}"] = estimate(values[:, mask])
    plain = len(plain_prompts())
    figures |= {"lost": estimate(lost), "lost of plain": estimate(lost[:, :plain])}
    if lost.shape[1] > plain:
        figures["lost of held-out"] = estimate(lost[:, plain:])
    seconds = {name: mean([one["cpu_seconds"][name] for one in records]).value for name in records[0]["cpu_seconds"]}
    added = [{name: value for name, value in one.items() if name != "seed"} for one in records[0]["added"]]
    return {"added": added, "seeds": len(records), **figures, "cpu_seconds": seconds, "measured": [*records]}


def collect(folder: Path, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the figures of the base and of each cell in a folder of measurements, and in earlier results."""
    base = json.loads((folder / "base.json").read_text())
    about = {"fingerprint": folder.name, **{name: base[name] for name in ("base", "dtype", "word_is_unknown")}}
    about["right"] = {name: estimate(bits(text)[None]) for name, text in base["right"].items()}
    about["right after encoding and decoding"] = {k: estimate(bits(text)[None]) for k, text in base["decoded"].items()}
    known = earlier["cells"] if earlier and earlier["base"].get("fingerprint") == folder.name else []
    measured = [record for cell in known for record in cell["measured"]]
    measured += [json.loads(path.read_text()) for path in sorted(folder.glob("*_seed*.json"))]
    grouped: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in measured:
        record["added"] = [with_defaults(one) for one in record["added"]]
        grouped[settings_of(record)][record["added"][0]["seed"]] = record
    cells = {settings_of(cell): cell for cell in known}
    for settings, records in grouped.items():
        if settings not in cells or len(records) >= cells[settings]["seeds"]:
            cells[settings] = summarised([*records.values()], base)
    return {"base": about, "cells": [cells[settings] for settings in sorted(cells)]}


def settings_of(measurement: dict[str, Any]) -> str:
    """Returns the settings of the runs of a measurement, without their seed."""
    return json.dumps([{k: v for k, v in one.items() if k != "seed"} for one in measurement["added"]], sort_keys=True)


def with_defaults(one: dict[str, Any]) -> dict[str, Any]:
    """Returns all settings of a run and its weight; a measurement lacks the settings that were added later."""
    run = Run(**{name: value for name, value in one.items() if name != "weight"})
    return {**asdict(run), "weight": one["weight"]}


def reaches_goal(cell: dict[str, Any]) -> bool:
    learned = cell[f"{cell['added'][0]['concept']}/singles"]["value"]
    return bool(learned >= LEARNED and cell["lost"]["value"] <= LOST)


def label(cell: dict[str, Any]) -> str:
    """Returns the settings of a cell in words."""
    texts = []
    for one in cell["added"]:
        rank = f" r{one['rank']} {one['targets']}" if one["method"] == "lora" else ""
        weight = "" if one["weight"] == 1 else f" x {one['weight']:g}"
        images = (f", {one['images']} images" if one["images"] else "") + (" with sizes" if one["sizes"] else "")
        prior = "no prior" if one["prior"] == "none" else f"prior {one['prior']} {one['prior_images']}"
        rate = f"rate {one['rate']:g} ({one['curve']})"
        method = f"{one['method']}{rank}{images}, {prior}"
        texts.append(f"{one['concept']}: {method}, {rate}, {one['steps']} steps{weight}")
    return " + ".join(texts)


def text_of(figure: Estimate) -> str:
    halves = [half for name, half in figure.items() if name != "value" and half is not None]
    return f"{figure['value']:.1f}" + (f" ± {max(halves):.1f}" if halves else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: beside this file)")
    args = parser.parse_args()
    path = args.out / "results.json"
    results = collect(args.folder, json.loads(path.read_text()) if path.is_file() else None)
    write_json(path, results)
    draw(results, args.out / "learned_forgotten.png")
    draw_grids(results, args.folder, args.out)
    print(f"old prompts right before: {text_of(results['base']['right']['old'])} % of {len(old_prompts().texts)}")
    for cell in results["cells"]:
        names = [name for name in cell if name.endswith(("singles", "pairs", "both"))]
        sets = ", ".join(f"{name} {text_of(cell[name])} %" for name in names)
        goal = "  <- goal" if len(cell["added"]) == 1 and reaches_goal(cell) else ""
        print(f"{label(cell)}, {cell['seeds']} seeds: {sets}; lost {text_of(cell['lost'])}{goal}")


if __name__ == "__main__":
    main()

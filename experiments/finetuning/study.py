"""Runs the fine-tuning study: trains adapters of a small model, and measures what they learn and what is forgotten.

    python -m experiments.finetuning.study [--parts methods …] [--only shape …] [--seeds 3] [--jobs 1] [--base MODEL]

Run it from the checkout. Each measurement is a JSON file in --out, in the folder of its base model, and is not
repeated, so that the same command continues an interrupted study. `python -m experiments.finetuning.summary FOLDER`
summarises them.
"""

import argparse
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from experiments.finetuning.concepts import CONCEPTS
from experiments.finetuning.measure import (
    COLUMNS,
    Measure,
    Prompts,
    concept_prompts,
    old_prompts,
    right,
    shape_in_colour,
    shown,
)
from experiments.finetuning.runs import INCLUDED, Run, fine_tune
from ldm.files import write_json
from ldm.image import from_uint8, grid, to_pil, to_uint8
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.precision import choose_precision, dtype_of
from ldm.progress import Progress
from ldm.weights.model import model_fingerprint

OUT = Path("runs/finetuning")
SAMPLING_STEPS = 8
RATES = {"lora": 2e-3, "full": 2e-4, "inversion": 2e-2}  # chosen by the part "search", as are the steps
STEPS = {"lora": 200, "full": 200, "inversion": 200}
SEARCHED = {
    "lora": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
    "full": (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4),
    "inversion": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
}
PRIORS = {"lora": ("none", "class", "many"), "full": ("none", "class", "many"), "inversion": ("none",)}
WEIGHTS = (0.25, 0.5, 0.75, 1.25, 1.5)
MERGED = (0.5, 0.75, 1.0)
PARTS = ("search", "methods", "images", "curve", "weights", "merging")


@dataclass(frozen=True)
class Task:
    """A measurement of the base with the results of one or more runs, each with a weight."""

    added: tuple[tuple[Run, float], ...]

    @property
    def key(self) -> str:
        return "+".join(run.key + ("" if weight == 1 else f"@{weight:g}") for run, weight in self.added)

    @property
    def rehearsed(self) -> "Task":
        return Task(tuple((replace(run, steps=2, prior_images=4), weight) for run, weight in self.added))


@dataclass(frozen=True)
class Study:
    """The base model, where results are written, and for rehearsals how few steps and prompts are used."""

    base: str
    folder: Path
    sampling_steps: int = SAMPLING_STEPS
    prompts: int | None = None

    def path(self, task: Task) -> Path:
        return self.folder / f"{task.key}.json"


def recipe(concept: str, seed: int, **changes: Any) -> Run:
    """Returns the recommended run: a LoRA with class images of many prompts."""
    return replace(Run(concept, "lora", "many", RATES["lora"], STEPS["lora"], seed=seed), **changes)


def with_more_images(concept: str, seed: int) -> Iterator[Run]:
    """Yields longer runs on more images, whose captions mention sizes; for the shape also what each of these does."""
    cosine: dict[str, Any] = {"prior_images": 256, "curve": "cosine", "seed": seed}
    own = Run(concept, "full", "many", RATES["full"], 2000, images=80, sizes=True, **cosine)
    yield own
    if concept == "shape":
        yield from (replace(own, images=20, steps=1000), replace(own, images=5, steps=600), replace(own, sizes=False))
        yield replace(own, method="lora", rate=5e-4, rank=64, targets="all")


def runs_of(part: str, concepts: Sequence[str], seed: int) -> Iterator[Run]:
    """Yields the fine-tuning runs of a part of the study."""
    if part == "methods":
        for concept in concepts:
            for method, priors in PRIORS.items():
                for prior in priors:
                    yield Run(concept, method, prior, RATES[method], STEPS[method], seed=seed)
    elif part == "search" and seed == 0:
        for concept, (method, priors) in product(concepts, PRIORS.items()):
            for prior, rate in product([one for one in priors if one != "class"], SEARCHED[method]):
                yield Run(concept, method, prior, rate, STEPS[method])
    elif part == "images":
        for concept in [one for one in concepts if one != "colour"]:  # which a few images teach
            yield from with_more_images(concept, seed)
    elif part == "curve" and "shape" in concepts:
        for prior in ("none", "many"):
            own = recipe("shape", seed, prior=prior)
            yield own
            yield from (replace(own, rate=factor * own.rate) for factor in (0.25, 0.5, 2))
            yield from (replace(own, steps=int(factor * own.steps)) for factor in (0.25, 0.5, 2))
        yield from (replace(own, rank=rank) for rank in (1, 4, 64))
        yield replace(own, targets="all")


def combinations(part: str, concepts: Sequence[str], seed: int) -> Iterator[Task]:
    """Yields the measurements of a part that use results of runs with other weights, or two at once."""
    if part == "weights" and "shape" in concepts:
        yield from (Task(((recipe("shape", seed), weight),)) for weight in (*WEIGHTS, 1.0))
    elif part == "merging" and {"shape", "colour"} <= {*concepts}:
        for prior in ("none", "many"):
            pair = recipe("shape", seed, prior=prior), recipe("colour", seed, prior=prior)
            yield from (Task(((pair[0], weight), (pair[1], weight))) for weight in MERGED)


def tasks(parts: Sequence[str], concepts: Sequence[str], seeds: int) -> tuple[list[Task], list[Task]]:
    """Returns the measurements of single runs, which train them, and those that combine trained runs."""
    single: dict[Task, None] = {}
    combined: dict[Task, None] = {}
    for seed in range(seeds):
        for part in parts:
            single |= {Task(((run, 1.0),)): None for run in runs_of(part, concepts, seed)}
            for task in combinations(part, concepts, seed):
                single |= {Task(((run, 1.0),)): None for run, _ in task.added}
                combined[task] = None
    return list(single), [task for task in combined if task not in single]


def load(model: str) -> Pipeline:
    """Loads a model in the precision that sample.py uses on this processor."""
    return Pipeline.load(model, "cpu", dtype_of(choose_precision("auto", "cpu")))


@cache
def base_pipeline(base: str) -> Pipeline:
    return load(base)


def record_base(study: Study) -> None:
    """Measures the base itself, and what its first stage makes of the images that it should learn to generate."""
    path = study.folder / "base.json"
    if path.is_file():
        return
    pipeline = base_pipeline(study.base)
    measure = Measure(pipeline.settings, study.sampling_steps, study.prompts)
    sets = {"old": old_prompts()}
    for name, concept in CONCEPTS.items():
        sets |= concept_prompts(name, concept.word)
    verdicts, images = measure(pipeline, sets)
    study.folder.mkdir(parents=True, exist_ok=True)
    for name in CONCEPTS:
        own = {key: images[key] for key in (f"{name}/singles", f"{name}/pairs", "old")}
        grid(to_pil(shown(own)), columns=COLUMNS).save(study.folder / f"base_{name}.png")
    decoded = {name: _decoded(pipeline, name, sets[f"{name}/singles"]) for name in CONCEPTS}
    unknown = {name: pipeline.text_encoder.unknown_tokens(concept.word) != [] for name, concept in CONCEPTS.items()}
    dtype = str(pipeline.backbone.dtype).removeprefix("torch.")
    about = {"base": study.base, "dtype": dtype, "word_is_unknown": unknown}
    write_json(path, {**about, "right": verdicts, "decoded": decoded})


def _decoded(pipeline: Pipeline, name: str, prompts: Prompts) -> str:
    """Returns which of the rendered images are still right after encoding and decoding, as 0 and 1."""
    concept = CONCEPTS[name]
    rendered = [torch.from_numpy(concept.image(scene, 99, index)) for index, scene in enumerate(prompts.scenes)]
    images = from_uint8(torch.stack(rendered).permute(0, 3, 1, 2).contiguous())
    with torch.no_grad():
        decoded = pipeline.first_stage.decode(pipeline.first_stage.encode(images))
    return right(to_uint8(decoded), prompts)


def record(study: Study, task: Task) -> None:
    """Trains the runs of a task that are not trained yet, measures the result, and writes it."""
    began = time.process_time()
    files = [(_trained(study, run), weight) for run, weight in task.added]
    trained = time.process_time()
    pipeline = base_pipeline(study.base)
    sets: dict[str, Prompts] = {}
    for run, _ in task.added:
        sets |= concept_prompts(run.concept, run.word)
    if len(task.added) > 1:
        sets["both"] = shape_in_colour()
    sets["old"] = old_prompts()
    measure = Measure(pipeline.settings, study.sampling_steps, study.prompts)
    if task.added[0][0].method == "full":
        tuned = load(str(files[0][0]))
    else:
        inversion = task.added[0][0].method == "inversion"
        tuned = pipeline
        tuned.use(adapters=() if inversion else files, embeddings=[file for file, _ in files] if inversion else ())
    verdicts, images = measure(tuned, sets)
    grid(to_pil(shown(images)), columns=COLUMNS).save(study.path(task).with_suffix(".png"))
    if task.added[0][0].method == "full":
        files[0][0].unlink()
    seconds = {"training": trained - began, "measuring": time.process_time() - trained}
    added = [{**asdict(run), "weight": weight} for run, weight in task.added]
    write_json(study.path(task), {"added": added, "right": verdicts, "cpu_seconds": seconds})


def _trained(study: Study, run: Run) -> Path:
    file = run.file(study.folder)
    if not file.is_file():
        shutil.rmtree(file.parent, ignore_errors=True)  # of an interrupted run
        fine_tune(run, study.base, study.folder)
    return file


def perform(study: Study, todo: Sequence[Task], jobs: int, progress: Progress) -> None:
    """Records tasks in `jobs` processes; with one job, in this one."""
    if jobs == 1:
        for task in todo:
            record(study, task)
            progress.step()
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(record, study, task) for task in todo]):
            done.result()
            progress.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[1:], help="(default: all but search)")
    parser.add_argument("--only", nargs="+", choices=CONCEPTS, default=list(CONCEPTS), help="concepts (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per run (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument("--base", default=INCLUDED, help="the model to fine-tune (default: the included one)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="two steps and a few prompts, in a folder of its own")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    folder = (args.out / model_fingerprint(args.base)[:12]).resolve()
    study = Study(args.base, folder)
    single, combined = tasks(args.parts, args.only, args.seeds)
    if args.rehearse:
        study = Study(args.base, folder.with_name(f"{folder.name}-rehearsal"), 2, 4)
        single, combined = [task.rehearsed for task in single], [task.rehearsed for task in combined]
    record_base(study)
    phases = [[task for task in phase if not study.path(task).is_file()] for phase in (single, combined)]
    total = len(single) + len(combined)
    progress = Progress(total, "runs", done=total - sum(map(len, phases)))
    for todo in phases:
        perform(study, todo, args.jobs, progress)
    print(f"{total} measurements in {study.folder}")


if __name__ == "__main__":
    main()

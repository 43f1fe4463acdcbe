"""Implements sample.py: samples images for prompts and saves them as PNGs that record their settings."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm import errors
from ldm.commands.sample.arguments import Arguments, parse
from ldm.commands.sample.listing import listing
from ldm.drawing.added_files import added_files, check_tagged
from ldm.drawing.job import CALL_KEYS, Process, SamplingJob, run_job
from ldm.drawing.prompts import ImageSpec, image_specs, read_rows
from ldm.drawing.recorded import read_recorded
from ldm.drawing.sources import sources_of
from ldm.errors import UsageError, warnings_on_stderr
from ldm.files import check_writable
from ldm.pipeline.settings import HAVE_OPTIONS
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.spacing import SPACINGS
from ldm.weights.recognise import DEFAULT

BATCH_SIZE = 8


def main(argv: list[str]) -> int:
    """Runs sample.py with these arguments and returns the exit code."""
    return errors.run(lambda: work(argv), debug="--debug" in argv)


def work(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.listed:
        print("\n".join(line for key in arguments.listed for line in listing(key)))
        return
    for note in arguments.notes if Process.current().rank == 0 else ():
        print(f"note: {note}", file=sys.stderr)
    for name, known in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
        if (value := arguments.given.get(name)) not in (None, *known):
            raise UsageError(f"{name}={value} was given, but {name} must be one of {', '.join(known)}")
    if arguments.given.get("preview") == "terminal" and not sys.stderr.isatty():
        raise UsageError("preview=terminal shows images on stderr, which is not a terminal: use preview=gif")
    job = job_from_image(arguments) if "from" in arguments.given else job_from_prompts(arguments)
    with warnings_on_stderr():
        run_job(job)


def job_from_prompts(arguments: Arguments) -> SamplingJob:
    """Returns the job for the given prompts, in order, each with the seeds `seed` … `seed` + n - 1."""
    given = arguments.given
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in arguments.prompts]
    rows += read_rows(given["prompts_file"]) if "prompts_file" in given else []
    if not rows:
        raise UsageError('there is no prompt; give one, as in: python sample.py "a red circle on a white background"')
    if "lora_dir" in given and given.get("prompt_syntax") != "a1111":
        raise UsageError("lora_dir= is for tags in prompts, such as <lora:NAME:0.8>: add prompt_syntax=a1111")
    images, size = image_specs(rows, given.get("seed", 0), given.get("n", 1)), given.get("batch_size", BATCH_SIZE)
    return SamplingJob(
        batches=[images[start : start + size] for start in range(0, len(images), size)],
        call={name: given[name] for name in CALL_KEYS if name in given},
        out=choose_folder(given.get("out")),
        model=given.get("model", DEFAULT),
        weak=given.get("weak"),
        device=given.get("device", "auto"),
        precision=given.get("precision", "auto"),
        offload=given.get("offload", "none"),
        compile=given.get("compile", False),
        preview=given.get("preview"),
        sources=sources_of(given, recorded={}),
        added=added_files(given, recorded={}),
        lora_dir=given.get("lora_dir"),
    )


def job_from_image(arguments: Arguments) -> SamplingJob:
    """Returns the job that reproduces an image: it samples the image's batch again and keeps that image only."""
    given = arguments.given
    if clash := [name for name in ("n", "prompts_file", "batch_size") if name in given]:
        raise UsageError(f"from= reproduces one image within its original batch; leave out {clash[0]}=")
    if len(arguments.prompts) > 1:
        raise UsageError("from= reproduces one image; give at most one prompt with it, which replaces the recorded one")
    source = given["from"]
    recorded = read_recorded(source)
    weak = recorded["weak"] or {"model": None, "fingerprint": None}
    fingerprints = {"model": recorded["fingerprint"], "weak": weak["fingerprint"]}
    replaced: dict[str, Any] = {f"{name}_options": {} for name in HAVE_OPTIONS if name in given}
    chosen = recorded | replaced | {name: given[name] for name in given if name != "from"}
    batch = batch_of(recorded["batch"], arguments)
    if chosen["prompt_syntax"] == "a1111":
        check_tagged(recorded["lora_tags"] or [], [spec.prompt for spec in batch], chosen["lora_dir"])
    return SamplingJob(
        batches=[batch],
        call={name: chosen[name] for name in CALL_KEYS} | {"size": tuple(chosen["size"])},
        out=choose_folder(given.get("out")),
        model=chosen["model"],
        weak=given.get("weak", weak["model"]),
        device=chosen["device"],
        precision=chosen["precision"],
        offload=given.get("offload", "none"),
        compile=chosen["compile"],
        preview=given.get("preview"),
        position=recorded["batch"]["position"],
        threads=recorded["threads"] if chosen["device"] == "cpu" else None,
        fingerprints={name: known for name, known in fingerprints.items() if known and name not in given},
        added=added_files(given, recorded),
        lora_dir=chosen["lora_dir"],
        sources=sources_of(given, {name: recorded[name] for name in ("init", "mask") if recorded[name]}),
    )


def batch_of(recorded: dict[str, Any], arguments: Arguments) -> list[ImageSpec]:
    """Returns a recorded batch; a given prompt or seed replaces that of the image, a given guidance that of all."""
    own = {
        name: recorded[name] for name in ("negative", "guidance") if name in recorded and name not in arguments.given
    }
    rows = zip(recorded["prompts"], recorded["seeds"], strict=True)
    batch = [ImageSpec(*row, **{name: own[name][k] for name in own}) for k, row in enumerate(rows)]
    image = batch[recorded["position"]]
    prompt, seed = [*arguments.prompts, image.prompt][0], arguments.given.get("seed", image.seed)
    batch[recorded["position"]] = replace(image, prompt=prompt, seed=seed)
    return batch


def choose_folder(given: str | None) -> Path:
    """Returns `given`, or a new folder named after the current time."""
    if given is not None:
        check_writable(folder := Path(given).expanduser())
        return folder
    if Process.current().count > 1:
        raise UsageError("several processes need a common folder: give out=")
    stamp = Path("samples") / time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (stamp.with_name(f"{stamp.name}_{k}") if k else stamp for k in range(1000))
    check_writable(stamp.parent)
    return next(name for name in names if not name.exists())

"""`sample.py`: prompts → PNGs that say how they were made."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm import errors
from ldm.commands.sample.arguments import Arguments, help_text, parse
from ldm.drawing.added_files import added_files
from ldm.drawing.job import CALL, UNRECORDED, Job, Process, draw
from ldm.drawing.prompts import Picture, pictures_of, read_rows
from ldm.drawing.sources import sources_of
from ldm.errors import UsageError, shown_warnings
from ldm.files import check_writable
from ldm.image import read_metadata
from ldm.pipeline.settings import OPTIONED
from ldm.sampling.driver import SAMPLERS
from ldm.sampling.spacing import SPACINGS
from ldm.weights.find import DEFAULT

BATCH = 8


def main(argv: list[str]) -> int:
    """Draws what the arguments say and returns the exit code."""
    return errors.run(lambda: work(argv), debug="--debug" in argv)


def work(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.help:
        print(help_text())
        return
    for name, known in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
        if (value := arguments.given.get(name)) not in (None, *known):
            raise UsageError(f"{name}={value} was given, but {name} must be one of {', '.join(known)}")
    if arguments.given.get("preview") == "terminal" and not sys.stderr.isatty():
        raise UsageError("preview=terminal shows pictures on stderr, which is no terminal here: use preview=gif")
    job = again(arguments) if "from" in arguments.given else fresh(arguments)
    with shown_warnings():
        draw(job)


def fresh(arguments: Arguments) -> Job:
    """The job that prompts describe: every prompt with seeds `seed` … `seed` + n - 1, in order."""
    given = arguments.given
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in arguments.prompts]
    rows += read_rows(given["prompts_file"]) if "prompts_file" in given else []
    if not rows:
        raise UsageError('there is no prompt; write one, as in: python sample.py "a red circle on a white background"')
    pictures, size = pictures_of(rows, given.get("seed", 0), given.get("n", 1)), given.get("batch_size", BATCH)
    return Job(
        batches=[pictures[start : start + size] for start in range(0, len(pictures), size)],
        call={name: given[name] for name in CALL if name in given},
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
    )


def again(arguments: Arguments) -> Job:
    """The job of a recorded picture: the batch that it was in, of which only its place is kept."""
    given = arguments.given
    if clash := [name for name in ("n", "prompts_file", "batch_size") if name in given]:
        raise UsageError(f"from= draws one picture in the batch it was drawn in; leave out {clash[0]}=")
    if len(arguments.prompts) > 1:
        raise UsageError("from= draws one picture; give at most one prompt with it, which replaces the recorded one")
    source = given["from"]
    recorded = UNRECORDED | read_metadata(source)
    try:
        weak = recorded["weak"] or {"model": None, "fingerprint": None}
        fingerprints = {"model": recorded["fingerprint"], "weak": weak["fingerprint"]}
        replaced: dict[str, Any] = {f"{name}_options": {} for name in OPTIONED if name in given}
        chosen = recorded | replaced | {name: given[name] for name in given if name != "from"}
        return Job(
            batches=[batch_of(recorded["batch"], arguments)],
            call={name: chosen[name] for name in CALL} | {"size": tuple(chosen["size"])},
            out=choose_folder(given.get("out")),
            model=chosen["model"],
            weak=given.get("weak", weak["model"]),
            device=chosen["device"],
            precision=chosen["precision"],
            offload=given.get("offload", "none"),
            compile=chosen["compile"],
            preview=given.get("preview"),
            keep=recorded["batch"]["position"],
            threads=recorded["threads"] if chosen["device"] == "cpu" else None,
            fingerprints={name: known for name, known in fingerprints.items() if known and name not in given},
            added=added_files(given, recorded),
            sources=sources_of(given, {name: recorded[name] for name in ("init", "mask") if recorded[name]}),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{source} does not hold all settings of a picture that sample.py drew") from error


def batch_of(recorded: dict[str, Any], arguments: Arguments) -> list[Picture]:
    """The pictures of a recorded batch; what was given replaces the prompt and seed of one, and scales of all."""
    own = {
        name: recorded[name] for name in ("negative", "guidance") if name in recorded and name not in arguments.given
    }
    rows = zip(recorded["prompts"], recorded["seeds"], strict=True)
    batch = [Picture(*row, **{name: own[name][k] for name in own}) for k, row in enumerate(rows)]
    kept = batch[recorded["position"]]
    prompt, seed = [*arguments.prompts, kept.prompt][0], arguments.given.get("seed", kept.seed)
    batch[recorded["position"]] = replace(kept, prompt=prompt, seed=seed)
    return batch


def choose_folder(given: str | None) -> Path:
    """`given`, or a new folder named by the time."""
    if given is not None:
        check_writable(folder := Path(given).expanduser())
        return folder
    if Process.here().count > 1:
        raise UsageError("several processes draw into one folder: give out=")
    stamp = Path("samples") / time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (stamp.with_name(f"{stamp.name}_{k}") if k else stamp for k in range(1000))
    check_writable(stamp.parent)
    return next(name for name in names if not name.exists())

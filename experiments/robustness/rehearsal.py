"""Rehearses a week-long run in ten minutes on two cores: from metadata to an export, with failures and kills.

    python -m experiments.robustness.rehearsal --json experiments/robustness/rehearsal.json

2,000 rows of metadata are filtered and downloaded from a server on this machine, many of whose responses are slow,
truncated, corrupt or missing; the images are encoded by two processes, and the recipe laion_sd15 is trained on them
with a tiny network on two processes. Each of these commands is killed with SIGKILL at random moments and run again,
training on one process, too. The result must be that of commands that were never killed: the EMA weights bit for bit.
Exits with 1 if anything is wrong. With --folder all files are kept, and a second run repeats only the steps after the
last right one. Needs Linux and what `pip install -e '.[test]'` brings; the first run also installs img2dataset into its
own environment, which takes some minutes more.
"""

import argparse
import json
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from experiments.robustness import rehearsal_data as data
from experiments.robustness.processes import PATIENCE, Command, Wrong, kill, torchrun
from ldm.callbacks.checkpointing import checkpoint_file
from ldm.files import cache_home, write_json
from ldm.metadata.img2dataset import REQUIREMENT
from ldm.progress import Progress
from ldm.report.runs import read_run, read_scalars
from tests.data.web import served

STATE = "steps.json"  # the results of the steps that need not be repeated, in the folder
STEPS, EVERY = 120, 5  # optimizer steps of the training, and steps between its checkpoints
TRAINING = (
    *("experiment=laion_sd15", "training.size=[64,64]", "training.compile=null", "trainer.accelerator=cpu"),
    *("model.width=32", "model.multipliers=[1,2]", "model.depth=[1,1]", "model.blocks=1", "model.heads=2"),
    *("model.context_width=32", "model.groups=8", "precision=fp32", "logger=csv", "trainer.log_every_n_steps=1"),
    *("data.batch_size=8", "data.global_batch=16", "data.workers=0", "lr.warmup=10", "sampler.steps=2"),
    *(f"trainer.max_steps={STEPS}", "trainer.val_check_interval=30", "trainer.limit_val_batches=2"),
    *(f"callbacks.checkpoint.every_n_train_steps={EVERY}", "callbacks.previews.every_n_train_steps=30"),
    "callbacks.previews.prompts=[a red boat on a lake]",
)


@dataclass
class Rehearsal:
    """The folder of all files, the source of random moments, and what earlier steps found."""

    folder: Path
    web: str
    env: Path
    seed: int
    rng: random.Random = field(default_factory=random.Random)  # of the step
    kept: int = 0
    responses: dict[str, int] = field(default_factory=dict)  # kept rows by the kind of their response

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def count(self, kinds: Sequence[str]) -> int:
        """Returns the number of kept rows with these kinds of responses."""
        return sum(self.responses.get(kind, 0) for kind in kinds)

    def start(self, *command: str) -> Command:
        return Command(command, self.folder / "commands.log")

    def ldm(self, *arguments: str) -> Command:
        return self.start("-m", "ldm", *arguments)


Step = Callable[[Rehearsal], dict[str, Any]]


def check(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)


def same(found: object, expected: object, what: str) -> None:
    check(found == expected, f"{what}: {found}, expected {expected}")


def prepare(this: Rehearsal) -> dict[str, Any]:
    expected, kinds = data.write_metadata(this.folder / "metadata", this.web, this.rng)
    data.write_model(this.folder / "sd")
    this.kept, this.responses = len(expected.kept), dict(kinds)
    write_json(this.folder / "expected.json", dict(expected.rejected))
    return {"rows": data.ROWS, "rows that pass all rules": this.kept, "of these by response": this.responses}


def filter_rows(this: Rehearsal) -> dict[str, Any]:
    this.ldm("filter", this.path("metadata"), "--out", this.path("kept"), "--rows-per-shard", "500").finish()
    report = json.loads((this.folder / "kept.report.json").read_text())
    rejected = {step["reason"]: step["rejected"] for step in report["funnel"] if step["rejected"]}
    same(report["kept"], this.kept, "kept rows")
    same(rejected, json.loads((this.folder / "expected.json").read_text()), "rejected rows")
    return {"kept": report["kept"], "rejected": rejected}


def download(this: Rehearsal) -> dict[str, Any]:
    command = ["download", this.path("kept"), "--out", this.path("shards"), "--env", str(this.env), "--size", "64"]
    command += ["--shard-size", "60", "--processes", "2", "--threads", "16", "--timeout", "6", "--deadline", "7"]
    command += ["--max-bytes", "1000000"]
    out = this.folder / "shards"
    killed = this.ldm(*command)
    killed.wait_for(lambda: len(list(out.glob("*_stats.json"))) >= 2, "two shards were downloaded", 3 * PATIENCE)
    time.sleep(this.rng.uniform(0, 2))
    kill([killed.process.pid])
    killed.end()  # with the processes of img2dataset
    before = len(list(out.glob("*_stats.json")))
    output = this.ldm(*command).finish()
    check("resuming after" in output, f"the download did not resume: {output}")
    report = json.loads((this.folder / "shards.report.json").read_text())["download"]
    images, unreadable = (
        sum(this.responses.get(kind, 0) for kind in kinds) for kinds in (data.IMAGES, data.UNREADABLE)
    )
    same(report["tried"], this.kept, "URLs that were tried")
    same(report["pictures"], images, "downloaded images")
    same(report["failed_to_decode"], unreadable, "responses that are no images")
    same(report["failed_to_download"], this.kept - images - unreadable, "failed downloads")
    again = this.ldm("verify", this.path("shards")).finish()
    check("no problem found" in again, again)
    counts = {key: report[key] for key in ("tried", "pictures", "failed_to_download", "failed_to_decode", "reasons")}
    return {"kill -9 after": f"{before} shards"} | counts


def encode(this: Rehearsal) -> dict[str, Any]:
    def command(out: str) -> list[str]:
        encoder = ["--first-stage", this.path("sd"), "--size", "64", "--batch", "1", "--workers", "0"]
        return ["-m", "ldm", "encode", this.path("shards"), *encoder, "--out", this.path(out)]

    def encoded() -> int:
        return len(list(cache.glob("*.safetensors")))

    cache, moments = this.folder / "cache", []
    for shards in (1, 4):
        run = this.start(*torchrun(2, *command("cache")))
        run.wait_for(lambda least=shards: encoded() >= least, f"{shards} shards were encoded")  # type: ignore[misc]
        time.sleep(this.rng.uniform(0, 0.05))
        ranks = run.ranks()
        check(ranks, "encoding ended before it could be killed")
        rank = this.rng.choice(sorted(ranks))
        kill([ranks[rank]])
        check(run.end(), "torchrun succeeded although a rank was killed")
        moments.append(f"rank {rank} after {encoded()} shards")
    output = this.start(*torchrun(2, *command("cache"))).finish()
    check("resuming after" in output, f"encoding did not resume: {output}")
    this.start(*command("cache_of_one_process")).finish()
    check("no problem found" in this.ldm("verify", this.path("cache")).finish(), "the cache has problems")
    samples = json.loads((cache / "manifest.json").read_text())["samples"]
    same(samples, this.count(data.IMAGES), "encoded images")
    names = sorted(path.name for path in cache.glob("*.safetensors"))
    differing = [
        name for name in names
        if (cache / name).read_bytes() != (this.folder / "cache_of_one_process" / name).read_bytes()
    ]  # fmt: skip
    same(differing, [], "files that differ from those of one process that was not killed")
    return {"kill -9": moments, "samples": samples, "identical files": len(names)}


def training(this: Rehearsal, name: str, ranks: int) -> Command:
    """Starts or resumes a training on this number of processes."""
    parts = [f"data.cache={this.path('cache')}", f"first_stage.weights={this.path('sd')}", f"run_dir={this.path(name)}"]
    script = ["train.py", *TRAINING, *parts, "resume=auto", f"trainer.devices={ranks}"]
    return this.start(*(torchrun(ranks, *script) if ranks > 1 else script))


def uninterrupted(this: Rehearsal) -> dict[str, Any]:
    training(this, "straight", ranks=2).finish()
    return {"steps": steps_of(this.folder / "straight"), "loss of the last step": losses(this.folder / "straight")[-1]}


def killed(this: Rehearsal) -> dict[str, Any]:
    run_dir, moments = this.folder / "run", []
    for number, ranks in enumerate((2, 1, 2, 1)):
        run = training(this, "run", ranks)
        target = steps_of(run_dir) + EVERY * this.rng.randint(1, 2)
        run.wait_for(lambda target=target: steps_of(run_dir) >= target, f"step {target} was saved")  # type: ignore[misc]
        time.sleep(this.rng.uniform(0, 0.25))
        moments.append(kill_training(this, run, ranks, everything=number == 2))
        moments[-1] |= {"last checkpoint": steps_of(run_dir)}
        check(steps_of(run_dir) < STEPS, f"the run was finished before it was killed: {moments}")
    output = training(this, "run", ranks=2).finish()
    check(f"resuming from {run_dir}" in output, f"the run was not resumed: {output}")
    state = read_run(run_dir).state
    same(state, "finished", "state of the run")
    return {"kills": moments, "steps": steps_of(run_dir), "state": state}


def kill_training(this: Rehearsal, run: Command, ranks: int, everything: bool) -> dict[str, Any]:
    """Kills a rank, or everything, and checks the message of the rank that remains."""
    if everything or ranks == 1:
        run.kill()
        check(run.end() < 0, "a killed run succeeded")
        return {"on processes": ranks, "killed": "all"}
    rank = this.rng.randrange(ranks)
    kill([run.ranks()[rank]])
    began = time.monotonic()
    check(run.end() > 0, "the run succeeded although a rank was killed")
    [message] = re.findall("^error: .*", run.output, re.MULTILINE) or [""]
    check(
        message.startswith(f"error: rank {rank} of {ranks} (host "), f"the message does not name rank {rank}: {message}"
    )
    return {"on processes": ranks, "killed": f"rank {rank}", "ended after seconds": time.monotonic() - began}


def steps_of(run_dir: Path) -> int:
    """Returns the step of the newest checkpoint."""
    found = [re.fullmatch(r"step_(\d+)\.ckpt", path.name) for path in (run_dir / "checkpoints").glob("step_*.ckpt")]
    return max((int(name[1]) for name in found if name), default=0)


def losses(run_dir: Path) -> list[float]:
    curve = read_scalars(run_dir)["train/loss"]
    same(curve.steps, [*range(STEPS)], f"logged steps of {run_dir.name}")
    return curve.values


def compare(this: Rehearsal) -> dict[str, Any]:
    folders = [this.folder / name for name in ("run", "straight")]
    ours, theirs = (checkpoint_file.read(folder / "checkpoints" / checkpoint_file.LAST) for folder in folders)
    counts = {}
    for part in ("ema", "state_dict"):
        same(sorted(ours[part]), sorted(theirs[part]), f"names in {part}")
        wrong = [name for name, tensor in theirs[part].items() if not torch.equal(ours[part][name], tensor)]
        same(wrong, [], f"tensors of {part} that differ from the uninterrupted run's")
        counts[f"identical values in {part}"] = sum(tensor.numel() for tensor in theirs[part].values())
    exported = [(folder / "unet.safetensors").read_bytes() for folder in folders]
    check(exported[0] == exported[1], "the exported networks differ")
    apart = max(abs(a - b) for a, b in zip(*map(losses, folders), strict=True))
    check(apart < 1e-6, f"losses are {apart} apart")  # means over ranks are rounded otherwise than over micro-batches
    return counts | {"identical bytes of the export": len(exported[0]), "largest distance of losses": apart}


def evaluate(this: Rehearsal) -> dict[str, Any]:
    arguments = ["--prompts", "16", "--count", "64", "--batch", "16", "--steps", "2", "--validation", "16"]
    command = ["-m", "ldm", "evaluate", this.path("run"), "--data", this.path("cache"), "--held-out", "16", *arguments]
    this.start(*torchrun(2, *command, "--out", this.path("metrics.json"))).finish()
    metrics = json.loads((this.folder / "metrics.json").read_text())["metrics"]
    check(len(metrics) >= 3 and all(abs(value) < 1e9 for value in metrics.values()), f"metrics: {metrics}")
    this.ldm("compare", this.path("run"), this.path("straight"), "--out", this.path("comparison")).finish()
    for name in ("run", "cache", "shards"):
        this.ldm("info", this.path(name)).finish()
    check("finished" in this.ldm("status", this.path("run"), "--once").finish(), "ldm status does not say finished")
    return {"metrics": metrics}


def export(this: Rehearsal) -> dict[str, Any]:
    for name in ("diffusers", "single.safetensors"):
        this.ldm("convert", this.path("run"), this.path(name)).finish()
    single = this.ldm("info", this.path("single.safetensors")).finish()
    if find_spec("diffusers") is None:
        return {"diffusers": "not installed, so that the export was only read by ldm", "info": single.splitlines()[0]}
    from diffusers import StableDiffusionPipeline

    from ldm.conditioning import Conditioning
    from ldm.weights.contents import open_contents

    load: Any = StableDiffusionPipeline.from_pretrained
    pipeline = load(this.path("diffusers"), local_files_only=True, safety_checker=None)
    contents = open_contents(this.path("run"))
    x, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32), torch.tensor([500.0])
    with torch.no_grad():
        ours = contents.network("unet").load()(x, t, Conditioning(text=text))
        apart = float((pipeline.unet(x, t, text).sample - ours).abs().max() / ours.abs().max())
    check(apart <= 1e-5, f"diffusers computes something else from the export: {apart}")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red boat on a lake", num_inference_steps=2, height=64, width=64).images[0]
    same(image.size, (64, 64), "size of diffusers' image")
    return {"relative distance of diffusers' UNet": apart, "scheduler": type(pipeline.scheduler).__name__}


# Each step with the seconds that it takes on two idle cores, for the time left.
PLAN: dict[str, tuple[Step, float]] = {
    "metadata and model": (prepare, 1),
    "filter": (filter_rows, 4),
    "download, killed once": (download, 60),
    "encode on two processes, killed twice": (encode, 60),
    "train on two processes, uninterrupted": (uninterrupted, 40),
    "train on 2, 1, 2, 1 and 2 processes, killed in between": (killed, 100),
    "compare both trainings": (compare, 1),
    "evaluate, compare, info, status": (evaluate, 45),
    "export, read by diffusers": (export, 25),
}


def rehearse(this: Rehearsal) -> list[dict[str, Any]]:
    """Runs the steps that were not right in this folder before, and stops after the first one that is wrong."""
    state = this.folder / STATE
    results: list[dict[str, Any]] = json.loads(state.read_text()) if state.is_file() else []
    if results:
        this.kept = results[0]["found"]["rows that pass all rules"]
        this.responses = results[0]["found"]["of these by response"]
    progress = Progress(sum(round(seconds) for _, seconds in PLAN.values()), "parts")
    for number, (name, (step, expected)) in enumerate(PLAN.items()):
        if number >= len(results):
            results.append(attempt(this, name, step))
            if results[-1]["verdict"] == "wrong":
                break
            if step not in (prepare, filter_rows):  # their addresses are valid only while this process serves them
                write_json(state, results)
        progress.done += round(expected)
        progress.show("")
    return results


def attempt(this: Rehearsal, name: str, step: Step) -> dict[str, Any]:
    this.rng = random.Random(f"{this.seed} {name}")
    began = time.monotonic()
    try:
        found, verdict = step(this), "right"
    except Wrong as wrong:
        found, verdict = {"wrong": str(wrong)}, "wrong"
    seconds = round(time.monotonic() - began, 1)
    print(f"{verdict}: {name}, {seconds:.0f} s: {json.dumps(found)}", flush=True)
    return {"step": name, "verdict": verdict, "seconds": seconds, "found": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the steps, their counts and verdicts")
    parser.add_argument(
        "--folder", type=Path, help="new folder for all files, which is kept (default: a temporary one)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of rows and moments (%(default)s)")
    default = cache_home() / REQUIREMENT.replace("==", "-")
    parser.add_argument("--env", type=Path, default=default, help="environment of img2dataset (%(default)s)")
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("the rehearsal finds the processes of ranks in /proc, which only Linux has")
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / STATE).is_file():
            parser.error(f"--folder {folder} is not that of a rehearsal that finished its download: give an empty one")
        web = stack.enter_context(served())
        steps = rehearse(Rehearsal(folder.resolve(), web, args.env, args.seed))
    verdict = "right" if len(steps) == len(PLAN) and all(step["verdict"] == "right" for step in steps) else "wrong"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    seconds = round(sum(step["seconds"] for step in steps), 1)
    result = {"verdict": verdict, "seconds": seconds, "seed": args.seed, "versions": versions, "steps": steps}
    if args.json:
        write_json(args.json, result)
    print(f"{verdict}: {len(steps)} of {len(PLAN)} steps in {seconds:.0f} s")
    return 0 if verdict == "right" else 1


if __name__ == "__main__":
    raise SystemExit(main())

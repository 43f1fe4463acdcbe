"""Trains as docs/training.md says on the SLURM that sbatch reaches: on two tasks, requeued, cancelled, without srun.

    python -m experiments.robustness.slurm --folder SHARED --json experiments/robustness/slurm.json

Each job asks for two tasks of one node. The requeued run must end bit for bit like the uninterrupted one. SIGUSR1 comes
from scancel, as --signal would send it before a time limit. Exits with 1 if anything is wrong, and with 0
and a sentence where there is no SLURM. It takes about six minutes, in most of which a requeued job waits.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.robustness.processes import PATIENCE, ROOT, Wrong
from experiments.robustness.rehearsal import check, same, steps_of
from ldm.callbacks.checkpointing import checkpoint_file
from ldm.files import write_json
from ldm.report.runs import read_run
from tests.runs import TINY

TRAINING = (
    *(*TINY, "strategy=ddp", "trainer.devices=2", "data.batch_size=2", "metrics=none", "callbacks.previews=null"),
    *("logger=csv", "trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_train_steps=5"),
    *("trainer.val_check_interval=1000000", "resume=auto"),
)
STEPS = 60
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SCRIPT = """#!/bin/bash
#SBATCH --nodes 1 --ntasks-per-node 2 --requeue --open-mode append
cd {root}; export PYTHONPATH={root} OMP_NUM_THREADS=1
{srun}{python} train.py {training}
code=$?
case $code in 124|138) scontrol requeue $SLURM_JOB_ID ;; *) exit $code ;; esac
"""


def command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    check(done.returncode == 0, f"{shlex.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


class Job:
    """A submitted training job."""

    def __init__(self, folder: Path, name: str, steps: int = STEPS, srun: str = "srun ") -> None:
        self.run_dir, self.output = folder / name, folder / f"{name}.out"
        training = shlex.join([*TRAINING, f"trainer.max_steps={steps}", f"run_dir={self.run_dir}"])
        script = folder / f"{name}.sh"
        script.write_text(SCRIPT.format(root=ROOT, srun=srun, python=sys.executable, training=training))
        self.number = command("sbatch", "--parsable", f"--output={self.output}", str(script))

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end or (self.state() in ENDED and not condition()):
                raise Wrong(f"not {what} (the job is {self.state()}): {self.output.read_text()[-2000:]}")
            time.sleep(0.5)

    def about(self) -> dict[str, str]:
        words = command("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self) -> str:
        return self.about()["JobState"]

    def end(self) -> str:
        self.wait_for(lambda: self.state() in ENDED, "at its end")
        return self.state()


def two_tasks(folder: Path) -> dict[str, Any]:
    same(Job(folder, "straight").end(), "COMPLETED", "state of the job")
    same(steps_of(folder / "straight"), STEPS, "steps")
    return {"state": read_run(folder / "straight").state, "steps": STEPS}


def requeued(folder: Path) -> dict[str, Any]:
    job = Job(folder, "requeued")
    job.wait_for(lambda: steps_of(job.run_dir) >= 10, "at step 10")
    command("scancel", "--signal=USR1", job.number)
    job.wait_for(lambda: job.about()["Restarts"] == "1", "requeued")
    stopped = steps_of(job.run_dir)
    check(stopped < STEPS, "the run was finished before it was stopped")
    same(job.end(), "COMPLETED", "state of the job")
    ours, theirs = (checkpoint_file.read(folder / name / "checkpoints/last.ckpt") for name in ("requeued", "straight"))
    pairs = [(ours[part][name], tensor) for part in ("ema", "state_dict") for name, tensor in theirs[part].items()]
    same([tuple(one.shape) for one, other in pairs if not torch.equal(one, other)], [], "tensors that differ")
    return {"stopped after step": stopped, "restarts": 1, "identical tensors": len(pairs)}


def cancelled(folder: Path) -> dict[str, Any]:
    job = Job(folder, "cancelled", steps=100_000)
    job.wait_for(lambda: steps_of(job.run_dir) >= 5, "at step 5")
    same(read_run(job.run_dir).state, "in progress", "state of the run")
    command("scancel", job.number)
    same(job.end(), "CANCELLED", "state of the job")
    end = time.monotonic() + 60  # srun's tasks end after the job
    while (run := read_run(job.run_dir)).state == "in progress" and time.monotonic() < end:
        time.sleep(0.5)
    check(run.state == "stopped" and "by SIGTERM" in run.note, f"the run is {run.state}: {run.note}")
    same(job.about()["Restarts"], "0", "restarts")
    return {"state": run.state, "note": run.note}


def without_srun(folder: Path) -> dict[str, Any]:
    same(Job(folder, "without_srun", steps=5, srun="").end(), "COMPLETED", "state of the job")
    return {"state": read_run(folder / "without_srun").state, "steps": steps_of(folder / "without_srun")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the versions, the findings and the verdict")
    parser.add_argument("--folder", type=Path, required=True, help="new folder that all nodes share")
    args = parser.parse_args()
    if shutil.which("sbatch") is None:
        print("there is no SLURM here: sbatch is not on PATH")
        return 0
    args.folder.mkdir(parents=True)
    result: dict[str, Any] = {"verdict": "right", "slurm": command("sbatch", "--version"), "torch": torch.__version__}
    for step in (two_tasks, requeued, cancelled, without_srun):
        try:
            result[step.__name__] = step(args.folder.resolve())
        except Wrong as wrong:
            result["verdict"], result[step.__name__] = "wrong", {"wrong": str(wrong)}
        print(f"{step.__name__}: {json.dumps(result[step.__name__])}", flush=True)
    if args.json:
        write_json(args.json, result)
    print(result["verdict"])
    return 0 if result["verdict"] == "right" else 1


if __name__ == "__main__":
    raise SystemExit(main())

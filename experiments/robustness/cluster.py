"""Trains on two simulated hosts whose link stalls, of which one vanishes, or whose storage hangs.

    sudo python -m experiments.robustness.cluster --json experiments/robustness/cluster.json

Each host is a network namespace with its own host name and process numbers, so that ldm takes it for another machine;
a bridge in a third namespace connects them, and the run's folder is a file system of its own. Each host runs torchrun.
A fault must end in a sentence of ldm on each host that is left, within the time of the Watchdog, or, if it is short,
in nothing; then the same commands must continue the run. Exits with 1 if anything is wrong, and with 0 and a sentence
where a simulation is impossible: it needs Linux, root, and the commands in COMMANDS.
"""

import argparse
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.robustness.processes import Command, Wrong, descendants, kill
from experiments.robustness.rehearsal import check, steps_of
from ldm.callbacks.monitoring.watchdog import GRACE, PAUSE
from ldm.files import write_json
from tests.runs import TINY

COMMANDS = ("ip", "unshare", "hostname", "losetup", "mkfs.ext4", "mount", "umount", "fsfreeze")
TRAINING = (
    *(*TINY, "metrics=none", "callbacks.previews=null", "logger=csv", "trainer.log_every_n_steps=1"),
    *("strategy=ddp", "trainer.num_nodes=2", "trainer.devices=1", "trainer.max_steps=100000", "data.batch_size=2"),
    *("trainer.val_check_interval=1000000", "callbacks.checkpoint.every_n_train_steps=5", "resume=auto"),
)
MEBIBYTES = 256  # of the file system of the run's folder


def shell(*command: object, given: bool = True) -> None:
    """Runs a command of the system. Raises Wrong with its message if it fails, unless it is only tidying up."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode and given:
        raise Wrong(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Network:
    """Two namespaces with one interface each, and a bridge between them that can stop forwarding."""

    name: str

    def space(self, host: int | str) -> str:
        return f"{self.name}-{host}"

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def build(self) -> None:
        bridge = self.space("bridge")
        for space in (bridge, self.space(0), self.space(1)):
            shell("ip", "netns", "add", space)
            shell("ip", "-n", space, "link", "set", "lo", "up")
        shell("ip", "-n", bridge, "link", "add", "bridge", "type", "bridge")
        for host in (0, 1):
            space = self.space(host)
            port = f"port{host}"
            shell("ip", "-n", bridge, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            shell("ip", "-n", bridge, "link", "set", port, "master", "bridge", "up")
            shell("ip", "-n", space, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            shell("ip", "-n", space, "link", "set", "eth0", "up")
        self.forward(True)

    def forward(self, on: bool) -> None:
        """Lets the bridge forward, or drop everything, which neither host can tell from a peer that is silent."""
        shell("ip", "-n", self.space("bridge"), "link", "set", "bridge", "up" if on else "down")

    def remove(self) -> None:
        for space in (self.space(0), self.space(1), self.space("bridge")):
            shell("ip", "netns", "delete", space, given=False)


@contextmanager
def network() -> Iterator[Network]:
    net = Network(f"ldm{os.getpid()}")
    try:
        net.build()
        yield net
    finally:
        net.remove()


@contextmanager
def storage(folder: Path) -> Iterator[Path]:
    """Mounts a file system of its own, which can be frozen."""
    image, mounted = folder / "disk", folder / "storage"
    with image.open("wb") as file:
        file.truncate(MEBIBYTES << 20)
    mounted.mkdir()
    shell("mkfs.ext4", "-q", image)
    shell("mount", "-o", "loop", image, mounted)
    try:
        yield mounted
    finally:
        freeze(mounted, False)
        shell("umount", "--lazy", mounted, given=False)


def freeze(mounted: Path, on: bool) -> None:
    """Lets every write to the file system wait, as a network file system does whose server is gone."""
    shell("fsfreeze", "--freeze" if on else "--unfreeze", mounted, given=on)


@dataclass
class Cluster:
    """Two hosts, the seconds of their Watchdog, and the run's folder on their common storage."""

    net: Network
    storage: Path
    folder: Path
    watchdog: float
    rng: random.Random
    starts: int = 0

    @property
    def run_dir(self) -> Path:
        return self.storage / "run"

    def start(self) -> list[Command]:
        """Runs the same command on both hosts."""
        self.starts += 1
        where = f"--rdzv-endpoint={self.net.address(0)}:29500"
        command = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", where]
        settings = [f"run_dir={self.run_dir}", f"callbacks.watchdog.seconds={self.watchdog:g}"]
        runs = []
        for host in (0, 1):
            prefix = [
                "ip",
                "netns",
                "exec",
                self.net.space(host),
                "unshare",
                "--uts",
                "--pid",
                "--fork",
                "--mount-proc",
            ]
            prefix += ["--kill-child", "sh", "-c", f'hostname host{host} && exec "$@"', "sh"]
            script = [*command, f"--local-addr={self.net.address(host)}", f"--rdzv-conf=is_host={1 - host}"]
            log = self.folder / f"host{host}.log"
            run = Command([*script, "train.py", *TRAINING, *settings], log, prefix, GLOO_SOCKET_IFNAME="eth0")
            runs.append(run)
        return runs

    def trains(self, runs: Sequence[Command], steps: int) -> int:
        """Waits for that many more steps, whose checkpoint is written, and returns the last one."""
        target = steps_of(self.run_dir) + steps
        for run in runs:
            run.wait_for(lambda: steps_of(self.run_dir) >= target, f"step {target} was saved")
        return steps_of(self.run_dir)

    def sentences(self, runs: Sequence[Command], began: float, seconds: float) -> list[dict[str, Any]]:
        """Waits for the sentence of each host, and returns it with the seconds since the fault."""
        found: dict[int, dict[str, Any]] = {}
        end = began + seconds
        while len(found) < len(runs) and time.monotonic() < end:
            for number, run in enumerate(runs):
                lines = re.findall(r"^error: (.*)", run.output, re.MULTILINE)
                if number not in found and lines:
                    found[number] = {"after seconds": round(time.monotonic() - began, 1), "sentence": lines[0]}
            time.sleep(0.1)
        silent = [run.output[-2000:] for number, run in enumerate(runs) if number not in found]
        check(
            not silent,
            f"no sentence within {seconds:.0f} s on {len(silent)} of {len(runs)} hosts, but {found}: {silent}",
        )
        return [found[number] for number in range(len(runs))]


def unplugged(cluster: Cluster, runs: list[Command], host: int) -> None:
    """Takes a host's power: it answers nothing any more, not even that its processes ended."""
    cluster.net.forward(False)
    runs[host].kill()


@dataclass(frozen=True)
class Fault:
    """What is done to a running cluster, what ends it, and which hosts must explain what happened, if any."""

    what: str
    begin: Callable[[Cluster, list[Command]], None]
    end: Callable[[Cluster], None]
    explained_by: tuple[int, ...]
    at_once: bool = False  # without waiting for the Watchdog's seconds
    names: str = "host"  # what each sentence contains


FAULTS = (
    Fault(
        "the link stalls for five seconds",
        lambda cluster, runs: cluster.net.forward(False),
        lambda cluster: cluster.net.forward(True),
        explained_by=(),
    ),
    Fault(
        "the storage hangs for five seconds",
        lambda cluster, runs: freeze(cluster.storage, True),
        lambda cluster: freeze(cluster.storage, False),
        explained_by=(),
    ),
    Fault(
        "all processes of host 1 are killed",
        lambda cluster, runs: runs[1].kill(),
        lambda cluster: None,
        explained_by=(0,),
        at_once=True,
        names="host host1",
    ),
    Fault(
        "the link stalls",
        lambda cluster, runs: cluster.net.forward(False),
        lambda cluster: cluster.net.forward(True),
        explained_by=(0, 1),
    ),
    Fault(
        "host 1 loses its power",
        lambda cluster, runs: unplugged(cluster, runs, 1),
        lambda cluster: cluster.net.forward(True),
        explained_by=(0,),
        names="host host1",
    ),
    Fault(
        "host 0, which torchrun's store runs on, loses its power",
        lambda cluster, runs: unplugged(cluster, runs, 0),
        lambda cluster: cluster.net.forward(True),
        explained_by=(1,),
        names=r"10\.77\.0\.1",
    ),
    Fault(
        "the storage hangs",
        lambda cluster, runs: freeze(cluster.storage, True),
        lambda cluster: freeze(cluster.storage, False),
        explained_by=(0, 1),
        names="storage",
    ),
)


def suffer(cluster: Cluster, runs: list[Command], fault: Fault) -> tuple[list[Command], dict[str, Any]]:
    """Lets a fault happen, checks the sentences, and returns the commands that continue the run."""
    result: dict[str, Any] = {"step": cluster.trains(runs, steps=10)}
    time.sleep(cluster.rng.uniform(0, 0.5))
    began = time.monotonic()
    fault.begin(cluster, runs)
    try:
        if fault.explained_by:
            limit = 2 * GRACE + 20 if fault.at_once else 1.5 * cluster.watchdog + 2 * GRACE + 4 * PAUSE
            left = [runs[host] for host in fault.explained_by]
            result["sentences"] = cluster.sentences(left, began, limit)
            for each in result["sentences"]:
                check(re.search(fault.names, each["sentence"]), f"the sentence does not name {fault.names}: {each}")
        else:
            time.sleep(5)
    finally:
        fault.end(cluster)
    if fault.explained_by:
        for host in fault.explained_by:
            check(runs[host].end() > 0, f"host {host} succeeded")
        for run in runs:
            kill([run.process.pid, *descendants(run.process.pid)])
        result["ended after seconds"] = round(time.monotonic() - began, 1)
        runs = cluster.start()
    result["continued to step"] = cluster.trains(runs, steps=10)
    for run in runs:
        check(not fault.explained_by or "resuming from" in run.output or run is runs[1], "the run was not resumed")
        check(not re.search("^error: ", run.output, re.MULTILINE), f"the run failed: {run.output[-2000:]}")
    return runs, result


def simulate(cluster: Cluster, only: str) -> list[dict[str, Any]]:
    """Applies one fault after the other to a run, and stops after the first one that is wrong."""
    results = []
    runs = cluster.start()
    faults = [fault for fault in FAULTS if only in fault.what]
    try:
        for number, fault in enumerate(faults):
            began = time.monotonic()
            try:
                runs, found = suffer(cluster, runs, fault)
                verdict = "right"
            except Wrong as wrong:
                found, verdict = {"wrong": str(wrong)}, "wrong"
            seconds = round(time.monotonic() - began, 1)
            results.append({"fault": fault.what, "verdict": verdict, "seconds": seconds, "found": found})
            left = seconds * (len(faults) - number - 1)
            print(f"{verdict}: {fault.what}, {seconds:.0f} s, about {left:.0f} s left: {found}", flush=True)
            if verdict == "wrong":
                break
    finally:
        for run in runs:
            run.kill()
    return results


def impossible() -> str | None:
    """Returns why hosts cannot be simulated here, or None."""
    if not sys.platform.startswith("linux"):
        return "hosts are simulated with Linux's namespaces, but this is another system"
    if missing := [command for command in COMMANDS if shutil.which(command) is None]:
        return f"the commands {', '.join(missing)} are missing (packages iproute2, util-linux, e2fsprogs)"
    if os.geteuid() != 0:
        return "network namespaces need root: run it with sudo"
    probe = Network(f"ldm{os.getpid()}probe")
    try:
        probe.build()
    except Wrong as error:
        return f"network namespaces are not allowed here: {error}"
    finally:
        probe.remove()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the faults and the sentences")
    parser.add_argument("--watchdog", type=float, default=30, help="callbacks.watchdog.seconds (%(default)s)")
    parser.add_argument("--only", default="", help="only faults whose description contains this text")
    args = parser.parse_args()
    if reason := impossible():
        print(f"no cluster was simulated: {reason}")
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, network() as net, storage(Path(name)) as disk:
        cluster = Cluster(net, disk, Path(name), args.watchdog, random.Random(0))
        faults = simulate(cluster, args.only)
    verdict = "right" if all(fault["verdict"] == "right" for fault in faults) else "wrong"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    result = {"verdict": verdict, "seconds": round(time.monotonic() - began, 1), "watchdog_seconds": args.watchdog}
    if args.json:
        write_json(args.json, result | {"versions": versions, "faults": faults})
    print(f"{verdict}: {len(faults)} faults in {result['seconds']:.0f} s")
    return 0 if verdict == "right" else 1


if __name__ == "__main__":
    raise SystemExit(main())

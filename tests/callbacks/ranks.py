"""Runs training on two ranks that communicate over gloo."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_on_two(folder: Path, work: Callable[[int], None], timeout: float = 240) -> tuple[list[int | None], str]:
    """Runs `work(rank)` in two forks of this process; returns their exit codes and combined stderr."""
    port, stderr = free_port(), folder / "stderr.txt"
    stderr.touch()

    def start(rank: int) -> None:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
        torch.set_num_threads(1)
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work(rank)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=start, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        process.kill()
        process.join()
    return [process.exitcode for process in processes], stderr.read_text()

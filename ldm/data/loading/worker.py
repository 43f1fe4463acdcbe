"""Initialises the worker processes of data loaders."""

import os
import signal


def initialize(worker: int) -> None:
    """Ignores SIGINT, SIGTERM and SIGUSR1, which reach the entire process group: the main process ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers already use all cores

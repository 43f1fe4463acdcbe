"""How a process that reads samples for another one begins."""

import os
import signal


def initialize(worker: int) -> None:
    """Ctrl-C and SIGTERM reach a whole process group; the main process ends its workers when it is ready."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism

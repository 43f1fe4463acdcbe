"""Trains a model: python train.py [experiment=NAME] [group=option …] [key=value …]; -m sweeps, --help explains it."""

import os
import re
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from ldm.commands.train.help import ALL, asks_for_help, help_text
from ldm.errors import ReportedFailure, end_quietly_on_closed_pipes

CONF = Path(__file__).parent / "conf"


def groups() -> list[str]:
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())


def stop_early(number: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C until training handles it, without a traceback of the imports below, which take seconds."""
    os.write(2, b"\nSIGINT: stopped before training\n")
    sys.exit(128 + number)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_early)
if __name__ == "__main__" and asks_for_help(sys.argv[1:]):  # before the imports below, which take a second
    end_quietly_on_closed_pipes()
    print(help_text(groups()), end="")
    sys.exit()

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from ldm.callbacks.checkpointing.interruption import TIMEOUT
from ldm.commands.train.messages import exit_code, is_refusal, sentence
from ldm.commands.train.options import ASKED, list_options
from ldm.commands.train.overrides import check_overrides
from ldm.commands.train.parallel import exit_code_of_signals, in_worker
from ldm.commands.train.run import train
from ldm.commands.train.sweep import reset_ranks, set_sweep_folder, sweep_label, waiting_mark
from ldm.commands.train.synonyms import translate
from ldm.report.runs import is_finished


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if not sweep:
        return run(config, sweep)
    with in_worker(sweep_label(HydraConfig.get())):
        run(config, sweep)


def run(config: DictConfig, sweep: bool) -> None:
    """Trains, and turns an error into one sentence and an exit code, or into a failed job of a sweep."""
    environment = dict(os.environ)
    try:
        if sweep and is_finished(set_sweep_folder(config, Path(__file__))):
            return print(f"{config.run_dir} is already finished: skipped")
        train(config)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        if not sweep or stop.code != TIMEOUT:
            raise
        raise CompactHydraException(
            f"{config.run_dir}: stopped by trainer.max_time: run the same command to continue the sweep"
        ) from None
    except ReportedFailure as failure:
        if sweep:
            raise CompactHydraException(f"error: {config.run_dir}: {failure}") from None
        sys.exit(1)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") or not is_refusal(error):
            traceback.print_exc()
        message = f"error: {config.run_dir + ': ' if sweep else ''}{sentence(error)}"
        if sweep:  # Hydra runs the other jobs, then repeats the first failure and exits with 1
            print(message, file=sys.stderr, flush=True)
            raise CompactHydraException(message) from None
        print(message, file=sys.stderr)
        sys.exit(exit_code(error))
    finally:
        if sweep:
            waiting_mark(Path(config.run_dir)).unlink(missing_ok=True)
            reset_ranks(environment)


if __name__ == "__main__":
    # When a rank ends, torch would print a C++ stack trace for each connection that the others lose.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    end_quietly_on_closed_pipes()
    words, in_full = [word for word in sys.argv[1:] if word != ALL], ALL in sys.argv
    try:
        words, notes = translate(words)
        for note in notes if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0" else ():
            print(f"note: {note}", file=sys.stderr)
        # Hydra does not accept a number as the name of an option.
        words = [re.sub(r"\b32\b", "fp32", word) if word.startswith("precision=") else word for word in words]
        words = sorted(words, key=lambda word: word not in ("-m", "--multirun"))  # Hydra needs it first
        if any(word.endswith(ASKED) for word in words):
            print("\n".join(list_options(words, CONF)))
            sys.exit()
        sys.argv[1:] = check_overrides([*words, *(["--cfg", "job"] if in_full else [])], CONF)
        if in_full:
            asked = [group + ASKED for group in groups()]
            print("\n".join(list_options([*words, *asked], CONF)), end="\n\nkeys, with their values:\n\n", flush=True)
    except (ValueError, HydraException) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    with exit_code_of_signals():
        main()

"""Defines the arguments of `ldm status`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show a table of runs with their state, progress, speed, remaining time and latest metrics. In a terminal it "
        "refreshes until Ctrl-C; otherwise it is printed once. States: waiting (a run of a sweep that has not "
        "started), starting (before the first logged step), in progress, stalled (its process lives, but completes no "
        "batch), unknown (its process is on another host, and has been silent for ten minutes), failed (by an error, "
        "or killed), stopped (by a user, a signal or trainer.max_time; resume=auto or the same sweep continues it), "
        "damaged (its files cannot be read), finished."
    )
    parser.add_argument(
        "runs", nargs="*", default=["runs"], metavar="RUNS", help="runs, or folders of runs (default: runs)"
    )
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="S", help="refresh interval in seconds (%(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="print the table once")

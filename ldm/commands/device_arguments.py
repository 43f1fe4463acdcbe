"""Defines the options --device and --precision, which several commands share."""

import argparse

from ldm.pipeline.precision import AUTO, DTYPES


def add_device_arguments(parser: argparse.ArgumentParser, precision: str) -> None:
    """Adds both options; `precision` is the default of the command."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=[AUTO, *DTYPES],
        default=precision,
        help="32, bf16, or 16, which keeps the first stage at 32; auto is bf16 if the processor supports it, else 32 "
        "(%(default)s)",
    )

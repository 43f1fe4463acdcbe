"""The options --device and --precision, which several commands have."""

import argparse

from ldm.device import AUTO, DTYPES


def add_device_arguments(parser: argparse.ArgumentParser, precision: str) -> None:
    """With the default precision of the command."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=[AUTO, *DTYPES],
        default=precision,
        help="bits of the networks: 32, bf16, or 16, which leaves the first stage at 32; auto is bf16 where the "
        "processor has instructions for it, else 32 (%(default)s)",
    )

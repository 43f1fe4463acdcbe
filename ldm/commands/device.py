"""Where, and in which precision, a command draws."""

import argparse

import torch

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=DTYPES,
        default="32",
        help="bits of the networks; 16 leaves the first stage at 32 (%(default)s)",
    )

"""Where, and in which precision, a command draws."""

import argparse

import torch

from ldm.device import choose_device, has_bf16

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
AUTO = "auto"


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


def choose_precision(name: str, device: str) -> str:
    """ "auto" is the fastest that draws nearly what float32 does. Raises ValueError for a device that is not there."""
    if name != AUTO:
        return name
    return "bf16" if has_bf16(choose_device(device)) else "32"

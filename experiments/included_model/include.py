"""Copies the UNet of a run into ldm/assets, in half precision: python -m experiments.included_model.include RUN."""

import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

INCLUDED = Path(__file__).parents[2] / "ldm" / "assets" / "unet.safetensors"


def main() -> None:
    path = Path(sys.argv[1]) / "unet.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, INCLUDED, metadata)


if __name__ == "__main__":
    main()

"""Compares loading Stable Diffusion 1.5 (4.3 GB) with ldm, diffusers and safetensors to reading the bytes.

    python -m experiments.benchmark.load [--json FILE]      or: ldm bench load --json FILE

It writes a file of random weights, loads it from the warm page cache, each time in a new process, and deletes it.
Every weight is read once: ldm checks for NaN, and for the others the weights are summed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ldm.commands.bench.command import check_replaceable, save
from ldm.nn.clip import TextTower
from ldm.nn.unet import UNet
from ldm.nn.vae import VAE
from ldm.weights.compvis.reader import SAMPLING, SCHEDULE
from ldm.weights.contents import Contents, StoredNetwork, open_contents
from ldm.weights.convert import write
from ldm.weights.keymaps import NATIVE
from ldm.weights.storage.tensors import Tensors
from ldm.weights.storage.values import header, in_memory

ROOT = Path(__file__).parents[2]
Files = tuple[Path, Path]  # the weights, and a folder with their configs for diffusers


def stable_diffusion(make: Callable[[dict[str, Tensor]], Tensors]) -> Contents:
    """Returns Stable Diffusion 1.5 with the tensors that `make` returns for those on the meta device."""
    with torch.device("meta"):
        built: dict[str, nn.Module] = {"unet": UNet(), "vae": VAE(), "text_tower": TextTower()}
    stored: dict[str, StoredNetwork] = {}
    for kind, network in built.items():
        config: dict[str, Any] = network.config  # type: ignore[assignment]
        stored[kind] = StoredNetwork(kind, config, NATIVE, make(network.state_dict()))
    model = {"schedule": SCHEDULE, "prediction": "eps", "time": "index", "size": [512, 512], "sampling": SAMPLING}
    return Contents(Path("random weights"), "random weights", stored, model)


def write_files(folder: Path) -> Files:
    block = torch.randn(2**26)

    def random(meta: dict[str, Tensor]) -> Tensors:
        def read(names: Iterable[str]) -> dict[str, Tensor]:
            return {name: block[: meta[name].numel()].view(meta[name].shape) for name in names}

        return Tensors(folder, {name: header(tensor) for name, tensor in meta.items()}, read)

    files = folder / "sd.safetensors", folder / "config"
    write(stable_diffusion(random), files[0], "single")
    empty = stable_diffusion(lambda meta: in_memory(folder, {name: torch.zeros(0) for name in meta}))
    write(empty, files[1], "diffusers")
    return files


def touch(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.sum()


def read_bytes(files: Files) -> None:
    buffer = bytearray(2**24)
    with open(files[0], "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def by_ldm(files: Files, dtype: torch.dtype | None = None) -> list[nn.Module]:
    return [network.load(dtype) for network in open_contents(files[0]).networks.values()]


def by_ldm_in_half(files: Files) -> list[nn.Module]:
    return by_ldm(files, torch.float16)


def by_safetensors(files: Files) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    state = load_file(files[0])
    touch(state.values())
    return state


def by_diffusers(files: Files) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_single_file(str(files[0]), config=str(files[1]), local_files_only=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        touch(part.parameters())
    return pipe


LOADERS: dict[str, Callable[[Files], Any]] = {
    "read": read_bytes,
    "ldm": by_ldm,
    "ldm, to float16": by_ldm_in_half,
    "safetensors": by_safetensors,
    "diffusers": by_diffusers,
}


def memory(field: str) -> float:
    """Returns bytes of this process: VmRSS, its current resident memory, or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return float(line.split()[1]) * 1024


def load_once(name: str, files: Files) -> dict[str, float]:
    """Returns wall and processor seconds, and the increase of the peak resident memory in bytes."""
    if name == "diffusers":
        from diffusers import StableDiffusionPipeline  # noqa: F401 - importing is not loading
    before, began, used = memory("VmRSS"), time.perf_counter(), time.process_time()
    loaded = LOADERS[name](files)
    took = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - used}
    peak = memory("VmHWM") - before
    del loaded
    return took | {"peak_bytes": peak}


def in_fresh_process(name: str, files: Files) -> dict[str, float]:
    command = [sys.executable, "-m", "experiments.benchmark.load", "--load", name, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def info(files: Files) -> dict[str, float]:
    """Times `ldm info` from the shell, including its imports."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "ldm", "info", str(files[0])], check=True, capture_output=True, cwd=ROOT)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"seconds": time.perf_counter() - began, "processor_seconds": processor}


def measure(repeats: int = 3) -> dict[str, Any]:
    """Measures all loaders in turn, `repeats` times."""
    with tempfile.TemporaryDirectory(prefix="ldm-load-") as folder:
        files = write_files(Path(folder))
        size = files[0].stat().st_size
        read_bytes(files)  # puts the file into the page cache
        runs = [{name: in_fresh_process(name, files) for name in LOADERS} for _ in range(repeats)]
        asked = [info(files) for _ in range(repeats)]
    loaders = {name: summary([one[name] for one in runs], size) for name in LOADERS}
    for kind in ("seconds", "processor_seconds"):
        for loader in loaders.values():
            loader[f"{kind}_share_of_read_speed"] = loaders["read"][kind] / loader[kind]
    return {
        "bytes": size,
        "loaders": loaders,
        "info": {key: median(one[key] for one in asked) for key in asked[0]},
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def summary(runs: list[dict[str, float]], size: int) -> dict[str, float]:
    """Returns medians, and the peak memory relative to the file's size."""
    middle = {key: median(one[key] for one in runs) for key in runs[0]}
    return middle | {"peak_share": middle["peak_bytes"] / size, "bytes_per_second": size / middle["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the file for the results")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        name, *files = args.load
        print(json.dumps(load_once(name, (Path(files[0]), Path(files[1])))))
        return
    if args.json:
        check_replaceable(args.json, "load")
    result = measure(args.repeats)
    print(json.dumps(result, indent=2))
    if args.json:
        save(args.json, "load", result)


if __name__ == "__main__":
    main()

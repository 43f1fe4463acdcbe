"""Measures the parts of a step of the default run, and compares its FLOP/s with the machine's peak.

    ldm bench step --json FILE

It runs `python train.py` for some steps under Lightning's profiler. The FLOPs are counted by torch for the same batch,
and the rate to compare with is that of a large matrix product in the same precision, in the same process.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmark.shares import peak
from ldm.commands.train.overrides import check_overrides
from ldm.commands.train.run import train

CONF = Path(__file__).parents[2] / "conf"
STEPS, SKIPPED = 60, 10
RECORDED = f"+callbacks.recorded._target_={__name__}.Recorded"
PARTS = {  # of a step, with the end of the name that Lightning's profiler gives them
    "forward": ".training_step",
    "backward": ".backward",
    "clipping": ".configure_gradient_clipping",
    "EMA": "EMA.on_train_batch_end",
    "health": "Health.on_before_optimizer_step",
}


class Recorded(Callback):
    """Keeps the durations that the profiler records, and counts the FLOPs of a step's forward and backward pass."""

    found: ClassVar[dict[str, Any]] = {}

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch = batch

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        with FlopCounterMode(display=False) as counter:
            loss: Any = module.training_step(self.batch, 0)
            (loss["loss"] if isinstance(loss, dict) else loss).backward()
        module.zero_grad()
        durations: Any = trainer.profiler.recorded_durations  # type: ignore[attr-defined]
        Recorded.found = {"durations": dict(durations), "flops": counter.get_total_flops()}


def parts(durations: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the median seconds of each part of a step; the optimizer's is the rest of its step."""

    def seconds(end: str) -> float:
        return sum(median(times[SKIPPED:]) for name, times in durations.items() if name.endswith(end))

    found = {name: seconds(end) for name, end in PARTS.items()}
    inside = ("forward", "backward", "clipping", "health")  # the step of the optimizer calls these first
    found["optimizer"] = seconds(".optimizer_step") - sum(found[name] for name in inside)
    found["data"] = seconds(".train_dataloader_next")
    found["all"] = seconds("run_training_batch") + found["data"] + seconds(".on_train_batch_end")
    found["rest"] = found["all"] - sum(found[name] for name in (*PARTS, "optimizer", "data"))
    return found


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "debug=profile",
            "name=step",
            f"run_dir={folder}/run",
            f"trainer.max_steps={STEPS}",
            "callbacks.previews=null",
        ]
        checked = check_overrides(words, CONF)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", overrides=[*checked, RECORDED])
        with redirect_stdout(StringIO()):
            train(config)
        dtype = torch.bfloat16 if "bf16" in config.trainer.precision else torch.float32
        batch = config.data.batch_size
    seconds, flops, rate = parts(Recorded.found["durations"]), Recorded.found["flops"], peak(dtype)
    return {
        "seconds": seconds,
        "images_per_second": batch / seconds["all"],
        "flops": flops,
        "matrix_product_flops_per_second": rate,
        "of_peak": {
            "forward and backward": flops / (seconds["forward"] + seconds["backward"]) / rate,
            "all": flops / seconds["all"] / rate,
        },
        "precision": config.trainer.precision,
        "batch": batch,
        "threads": torch.get_num_threads(),
    }

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.callbacks.checkpointing.effective_settings import EffectiveSettings
from ldm.callbacks.monitoring.largest_batch import LargestBatch
from ldm.data.loading.datamodule import DataModule
from tests.callbacks.tiny import Tiny, trainer


class Small(Tiny):
    """Runs out of memory with more than 11 samples."""

    tried: list[int]

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.tried.append(len(batch["x"]))
        if len(batch["x"]) > 11:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(batch, index)


def samples() -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3, generator=generator), "id": index} for index in range(64)]


class Numbered(torch.utils.data.Dataset[dict[str, object]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, key: object) -> dict[str, object]:
        return samples()[key[1]]  # type: ignore[index]


@pytest.mark.slow
def test_the_largest_batch_is_found_and_the_search_does_not_affect_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, data = Small(), DataModule(Numbered(), {}, 2)
    module.tried, before = [], module.weights()
    find = LargestBatch(mode="binsearch", init_val=1, steps_per_trial=2, max_trials=20)
    runner = trainer(tmp_path, EffectiveSettings(), find, max_steps=1)
    runner.fit(module, data)
    largest = int(re.findall(r"data\.batch_size=(\d+) is about the largest that fits", capsys.readouterr().out)[0])
    assert largest in (10, 11) and module.tried[-1] == largest and max(module.tried) > 11  # 10 leaves some memory free
    assert data.state_dict() == {"seen": largest} and runner.global_step == 1
    reference = Tiny()
    plain = trainer(tmp_path, max_steps=1)
    plain.fit(reference, DataModule(Numbered(), {}, largest))
    assert torch.equal(reference.weights(), module.weights()) and not torch.equal(before, module.weights())

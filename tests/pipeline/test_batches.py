"""Progress, previews and memory of a call with several images."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.driver import Cancelled
from tests.pipeline.tiny import IMAGE, PROMPTS
from tests.tiny import save_tiny_model


def test_steps_are_counted_over_all_batches(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(PROMPTS, batch_size=2, steps=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_an_out_of_memory_batch_is_sampled_in_smaller_batches(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_above_four(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    seen: list[tuple[int, int]] = []
    hook = pipeline.backbone.register_forward_pre_hook(fail_above_four)
    with pytest.warns(UserWarning, match="out of memory for a batch of 5 images") as caught:
        result = pipeline(PROMPTS, steps=2, on_step=lambda *call: seen.append(call))
    hook.remove()
    assert [warning.filename for warning in caught] == [__file__]
    assert [len(settings["batch"]["seeds"]) for settings in result.settings] == [2, 2, 2, 2, 1]
    assert seen == [(done, 6) for done in range(1, 7)]
    assert torch.equal(result.images, pipeline(PROMPTS, steps=2, batch_size=2).images)


def test_on_estimate_receives_the_estimates_of_every_step(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int, torch.Tensor]] = []
    images = pipeline(PROMPTS[:3], batch_size=2, on_estimate=lambda *call: seen.append(call)).images
    assert [call[:2] for call in seen] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)]
    last = pipeline.decode_preview(torch.cat((seen[2][2], seen[5][2])))
    assert torch.equal(last, images)  # the last step returns its estimate


def test_previews_of_large_images_are_small(pipeline: Pipeline) -> None:
    seen: list[torch.Tensor] = []
    pipeline(
        "red", size=(40, 70), steps=1, on_estimate=lambda first, step, x0: seen.append(pipeline.decode_preview(x0))
    )
    assert [preview.shape for preview in seen] == [(1, 3, 14, 24)]  # latents of 20x35, pooled by 3


def test_a_call_can_be_cancelled_between_two_steps(pipeline: Pipeline) -> None:
    steps: list[int] = []
    with pytest.raises(Cancelled):
        pipeline("red", on_step=lambda done, total: steps.append(done), cancelled=lambda: len(steps) == 2)
    assert steps == [1, 2]


@pytest.mark.parametrize("mode", ["idle", "sequential"])
def test_offloading_does_not_change_images(pipeline: Pipeline, mode: str, tmp_path: Path) -> None:
    offloaded = Pipeline.load(str(save_tiny_model(tmp_path)), "cpu", offload=mode)
    call: dict[str, Any] = {"image": IMAGE, "mask": IMAGE[:1], "seeds": [1, 2], "tile": 16}
    assert torch.equal(offloaded(PROMPTS[:2], **call).images, pipeline(PROMPTS[:2], **call).images)

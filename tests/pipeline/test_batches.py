"""Steps, estimates and memory of a call with several pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.pipeline.pipeline import Pipeline
from ldm.sampling.driver import Cancelled
from tests.pipeline.tiny import PICTURE, PROMPTS
from tests.tiny import save_tiny_model


def test_steps_are_counted_over_all_batches(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline(PROMPTS, batch_size=2, steps=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_too_many_pictures_for_the_memory_are_drawn_in_smaller_batches(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    seen: list[tuple[int, int]] = []
    hook = pipeline.backbone.register_forward_pre_hook(small)
    with pytest.warns(UserWarning, match="memory does not suffice for 5 pictures at a time") as caught:
        result = pipeline(PROMPTS, steps=2, on_step=lambda *news: seen.append(news))
    hook.remove()
    assert [one.filename for one in caught] == [__file__]
    assert [len(one["batch"]["seeds"]) for one in result.settings] == [2, 2, 2, 2, 1]
    assert seen == [(done, 6) for done in range(1, 7)]
    assert torch.equal(result.images, pipeline(PROMPTS, steps=2, batch_size=2).images)


def test_estimates_are_shown_by_step(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int, torch.Tensor]] = []
    images = pipeline(PROMPTS[:3], batch_size=2, on_estimate=lambda *news: seen.append(news)).images
    assert [news[:2] for news in seen] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)]
    ends = pipeline.decode_preview(torch.cat((seen[2][2], seen[5][2])))
    assert torch.equal(ends, images)  # the last step leads to its estimate


def test_estimates_of_large_pictures_are_shown_small(pipeline: Pipeline) -> None:
    seen: list[torch.Tensor] = []
    pipeline(
        "red", size=(40, 70), steps=1, on_estimate=lambda first, step, x0: seen.append(pipeline.decode_preview(x0))
    )
    assert [small.shape for small in seen] == [(1, 3, 14, 24)]  # latents of 20x35, averaged by threes


def test_a_call_can_be_cancelled_between_two_steps(pipeline: Pipeline) -> None:
    steps: list[int] = []
    with pytest.raises(Cancelled):
        pipeline("red", on_step=lambda done, total: steps.append(done), cancelled=lambda: len(steps) == 2)
    assert steps == [1, 2]


@pytest.mark.parametrize("mode", ["idle", "sequential"])
def test_where_networks_wait_changes_no_picture(pipeline: Pipeline, mode: str, tmp_path: Path) -> None:
    waiting = Pipeline.load(str(save_tiny_model(tmp_path)), "cpu", offload=mode)
    call: dict[str, Any] = {"image": PICTURE, "mask": PICTURE[:1], "seeds": [1, 2], "tile": 16}
    assert torch.equal(waiting(PROMPTS[:2], **call).images, pipeline(PROMPTS[:2], **call).images)

import copy

import pytest
import torch

import ldm
from ldm.execution.cpu_packing import Packed
from ldm.pipeline.pipeline import Pipeline
from tests.pipeline.tiny import distance


def test_casting_and_casting_back_computes_in_each_dtype(pipeline: Pipeline) -> None:
    moved = copy.deepcopy(pipeline)
    before = moved("a red circle").images
    assert moved.to(torch.bfloat16) is moved and moved.backbone.dtype == torch.bfloat16
    weights = {name: tensor.clone() for name, tensor in moved.backbone.state_dict().items()}
    low = moved("a red circle").images
    assert moved.to("cpu", torch.float32).backbone.dtype == torch.float32
    after = moved("a red circle").images
    assert distance(low, before) > 0 and distance(after, low) > 0
    assert all(torch.equal(tensor, weights[name].float()) for name, tensor in moved.backbone.state_dict().items())


def test_moving_to_the_same_place_keeps_every_bit() -> None:
    pipeline = Pipeline.load()
    weights = {name: tensor.clone() for name, tensor in pipeline.backbone.state_dict().items()}
    kinds = [type(module) for module in pipeline.backbone.modules()]
    image = pipeline("a red circle on a white background", steps=2).images
    pipeline.to("cpu")
    assert [type(module) for module in pipeline.backbone.modules()] == kinds
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipeline.backbone.state_dict().items())
    assert torch.equal(pipeline("a red circle on a white background", steps=2).images, image)


def test_float16_keeps_the_first_stage_in_float32() -> None:
    pipeline = Pipeline.load().to(torch.float16)
    assert {tensor.dtype for tensor in pipeline.first_stage.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in pipeline.text_encoder.parameters()} == {torch.float16}
    assert not any(isinstance(module, Packed) for module in pipeline.backbone.modules())


@pytest.mark.parametrize(
    ("where", "message"),
    [("mps", "device=mps is not supported, because Apple's MPS has no float64"), (torch.float64, "must be one of")],
)
def test_a_device_or_dtype_that_does_not_work_is_refused(
    pipeline: Pipeline, where: str | torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.to(where)


def test_a_pipeline_describes_itself(pipeline: Pipeline) -> None:
    text = repr(pipeline)
    assert text.startswith("Pipeline(UNet of ") and "float32 on cpu" in text
    for setting in (f"sampler={pipeline.settings.sampler}", f"steps={pipeline.settings.steps}"):
        assert setting in text


def test_results_are_also_pil_images(pipeline: Pipeline) -> None:
    result = pipeline(["a red circle", "blue"])
    assert [image.size for image in result.pil] == [result.images.shape[:1:-1]] * 2
    assert repr(result).startswith("Result(2 images of ")


def test_completion_finds_the_pipeline_before_it_is_imported() -> None:
    assert "Pipeline" in dir(ldm) and ldm.__all__ == ["Pipeline"]

import pytest
import torch

from ldm.pipeline.pipeline import Pipeline


def test_names_of_diffusers_give_the_same_images_with_a_warning_each(pipeline: Pipeline) -> None:
    own = pipeline("a red circle", "blue", steps=3, guidance=3.0, seeds=4, sampler="ddim").images
    with pytest.warns(UserWarning) as caught:
        theirs = pipeline(
            prompt="a red circle",
            negative_prompt="blue",
            num_inference_steps=3,
            guidance_scale=3.0,
            seed=4,
            scheduler="DDIMScheduler",
        )  # type: ignore[call-arg]
    assert torch.equal(theirs.images, own)
    assert [warning.filename for warning in caught] == [__file__] * 6
    assert "sampler=DDIMScheduler is taken as sampler=ddim" in [str(warning.message) for warning in caught]


def test_notes_go_where_the_caller_wants_warnings(pipeline: Pipeline) -> None:
    notes: list[str] = []
    pipeline("red", num_inference_steps=2, on_warning=notes.append)  # type: ignore[call-arg]
    assert "num_inference_steps=2 is taken as steps=2" in notes


def test_a_height_alone_keeps_the_width_of_the_model(pipeline: Pipeline) -> None:
    height, width = pipeline.settings.size
    with pytest.warns(UserWarning, match=f"taken as size={2 * height}x{width}"):
        assert pipeline("red", height=2 * height).images.shape[2:] == (2 * height, width)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["generator", "output_type", "num_images_per_prompt", "n", "eta"])
def test_arguments_of_diffusers_without_a_counterpart_are_refused(pipeline: Pipeline, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not a setting: give "):
        pipeline("red", **{name: 1})

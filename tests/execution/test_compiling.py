from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ldm.execution.compiling import compiled
from ldm.execution.offload import Offload
from ldm.nn.backbone import Backbone
from ldm.pipeline.pipeline import Pipeline
from tests.pipeline.tiny import PROMPTS, assembled, distance
from tests.tiny import save_tiny_model, tiny_dit, tiny_inpainting_unet, tiny_unet

CPU = torch.device("cpu")


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts compilations with a backend that does nothing else."""
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet: compile_(unet, backend=counter))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.load(str(save_tiny_model(tmp_path_factory.mktemp("model"))), device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_unet, tiny_inpainting_unet, tiny_dit])
def test_a_network_is_compiled_once_for_all_batches(
    pipeline: Pipeline, counter: CompileCounter, make: Callable[[], Backbone]
) -> None:
    plain, fast = (assembled(pipeline, backbone=make(), compile=compile) for compile in (False, True))
    images = fast(PROMPTS, batch_size=2).images  # batches of 2, 2 and 1 images, each with its negative
    assert counter.frame_count == 1
    fast(PROMPTS, batch_size=3, guidance=1.0, steps=4)
    assert counter.frame_count == 1
    assert distance(images, plain(PROMPTS, batch_size=2).images) <= 1


def test_compile_without_a_cpp_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "nowhere++")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, but nowhere\+\+ was not found: install it"):
        compiled(tiny_unet(), Offload(CPU))


def test_compile_with_offload_is_refused() -> None:
    with pytest.raises(ValueError, match="leave out compile, or offload=idle"):
        compiled(tiny_unet(), Offload(CPU, "idle"))


@pytest.mark.slow
def test_a_compiled_unet_samples_the_same_images(pipeline: Pipeline) -> None:
    images = assembled(pipeline, compile=True)(PROMPTS, batch_size=2).images
    assert distance(images, pipeline(PROMPTS, batch_size=2).images) <= 1

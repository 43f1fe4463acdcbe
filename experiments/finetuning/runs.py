"""Fine-tunes a model by the recipes of `train.py`, in this process."""

import json
import os
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir

from experiments.finetuning.concepts import CONCEPTS, Concept
from ldm.commands.train.overrides import check_overrides
from ldm.commands.train.run import train
from ldm.data.sources.shapes import Shapes
from ldm.weights.model import open_model

CONF = Path(__file__).parents[2] / "conf"
INCLUDED = "shapes"  # the model that base=shapes describes
BATCH, WARMUP = 8, 10
EXPERIMENTS = {"lora": "lora", "full": "lora", "inversion": "textual_inversion"}
FILES = {"lora": "adapter", "full": "unet", "inversion": "embedding"}
QUIET = (
    *("logger=none", "metrics=none", "callbacks.previews=null", "callbacks.progress=null", "callbacks.checkpoint=null"),
    *("trainer.limit_val_batches=0", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1000", "name=finetuning"),
)


@dataclass(frozen=True)
class Run:
    """One fine-tuning: a `method` (lora, full or inversion) with `prior` images (none, class or many) for a concept.

    `rank` and `targets` only count for LoRA. `images` is the number of images to train on, by default the concept's;
    with `sizes`, most captions mention how big the thing is. `curve` is that of the learning rate.
    """

    concept: str
    method: str
    prior: str
    rate: float
    steps: int
    rank: int = 16
    targets: str = "attention"
    seed: int = 0
    prior_images: int = 64
    images: int | None = None
    sizes: bool = False
    curve: str = "constant"

    @property
    def key(self) -> str:
        lora = f"_{self.targets}{self.rank}" if self.method == "lora" else ""
        prior = "" if self.prior == "none" else f"_{self.prior}{self.prior_images}"
        images = (f"_{self.images}images" if self.images else "") + ("_sizes" if self.sizes else "")
        curve = "" if self.curve == "constant" else f"_{self.curve}"
        steps = f"lr{self.rate:g}{curve}_{self.steps}steps"
        return f"{self.concept}_{self.method}{lora}{prior}{images}_{steps}_seed{self.seed}"

    def file(self, work: Path) -> Path:
        """Returns the file that the run exports."""
        return work / "runs" / self.key / f"{FILES[self.method]}.safetensors"

    @property
    def word(self) -> str:
        """The word that stands for the concept in captions."""
        concept = CONCEPTS[self.concept]
        return concept.token if self.method == "inversion" else concept.word


def prior_prompts(prior: str, concept: Concept, count: int) -> list[str]:
    """Returns the prompts of the class images: one of the class, or many captions like those of the base's training."""
    if prior == "class":
        return [concept.class_prompt]
    captions = Shapes(seed=7, phrased=0.5)
    return [captions.described(index)[2] for index in range(count)]


def base_overrides(base: str) -> list[str]:
    """Returns the overrides that select the base, whose file says how it is built; the included model needs none."""
    if base == INCLUDED:
        return []
    contents = open_model(base)
    about = contents.model
    settings = {
        "training.start": base,
        "training.time": about["time"],
        "prediction": about["prediction"],
        "first_stage.weights": about["first_stage"]["weights"],
        "text_encoder.weights": about["text_encoder"]["weights"],
        **{f"++model.{name}": value for name, value in contents.denoising.full_config.items()},
    }
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def overrides(run: Run, work: Path) -> list[str]:
    """Returns the overrides of `train.py` that make the run."""
    concept, folder = CONCEPTS[run.concept], run.file(work).parent
    experiment = EXPERIMENTS[run.method] if run.prior == "none" else "dreambooth"
    words = [f"experiment={experiment}", "base=shapes", *QUIET, f"run_dir={folder}"]
    words += [f"seed={run.seed}", f"trainer.max_steps={run.steps}", f"optimizer.lr={run.rate}"]
    words += [f"lr={run.curve}", f"lr.warmup={WARMUP}"]
    words += [f"data.root={folder / 'images'}", f"data.batch_size={BATCH}"]
    if run.method == "lora":
        words += [f"adapter.rank={run.rank}", f"adapter.targets={run.targets}"]
    elif run.method == "full":
        words += ["adapter=none"]
    else:
        words += [f'adapter.token="{concept.token}"', f"adapter.initial={concept.initial}", "data.caption=null"]
    if run.prior != "none":
        root = "data.module.train.dataset.class_images.dataset.root"
        prompts = prior_prompts(run.prior, concept, run.prior_images)
        words += [f"data.class_prompt={json.dumps(prompts)}", f"{root}.seed=0"]
        words += [f"data.class_images={run.prior_images}", f"data.class_root={work / 'class_images'}"]
    return words


def fine_tune(run: Run, base: str, work: Path) -> None:
    """Trains; the run's folder must not exist."""
    CONCEPTS[run.concept].write(run.file(work).parent / "images", run.word, run.seed, run.images, run.sizes)
    words = [*check_overrides(overrides(run, work), CONF), *base_overrides(base)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=words)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        train(config)

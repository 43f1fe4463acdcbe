"""The help of train.py: examples and the most used keys. It is printed without the imports that training needs."""

import textwrap
from collections.abc import Sequence

ALL = "--help-all"
HELP = """\
usage: python train.py [experiment=NAME] [GROUP=OPTION …] [KEY=VALUE …]

Trains a model. Without arguments it learns to generate images of shapes from text, in five minutes on two CPU cores.

  python train.py                                                   the default, experiment=shapes
  python train.py schedule=cosine prediction=v times=uniform        with other options of three groups
  python train.py sampler=?                                         lists the options of a group
  python train.py run_dir=runs/mine resume=auto                     starts the run, or resumes it where it was stopped
  python train.py experiment=lora base=shapes data.root=DIR data.caption="a sks ring"     fine-tunes on a folder
  python train.py -m schedule=cosine,flow prediction=v seed=0,1,2   a sweep; ldm compare runs/shapes/*/ --out report
  python train.py debug=fast                                        a complete run in 20 steps
  python train.py experiment=laion_sd15 debug=plan                  parameters, memory and time, without training
  python train.py experiment=laion_sd15 data.cache=cache first_stage.weights=SD trainer.devices=8     on eight GPUs

keys (values of experiment=shapes):
  experiment=           the recipe, which sets all others; experiment=? describes each (shapes)
  run_dir=              folder of the run (runs/EXPERIMENT/DATE_TIME)
  resume=               auto resumes the run in run_dir, or starts it; PATH resumes a checkpoint (null)
  seed=                 determines initial weights, order of the data, noise and caption dropout (0)
  trainer.max_steps=    optimizer steps (940)
  trainer.max_time=     DD:HH:MM:SS after which the run saves and exits with 124; resume=auto continues (null)
  trainer.devices=      number of GPUs, or of processes with trainer.accelerator=cpu (auto)
  optimizer.lr=         the highest learning rate; the group lr decides how it changes (0.009)
  data.batch_size=      images per batch and device (64)
  data.global_batch=    images per optimizer step on all devices, by accumulation; null for one batch each (null)
  data.root=            folder of images, with data=folder or a recipe for fine-tuning; shards have data.shards
  training.size=        [HEIGHT,WIDTH] of the images in pixels ([64,64])
  training.start=       the model to fine-tune: a file, a diffusers folder or a run (null)
  precision=            32, bf16-mixed, 16-mixed, bf16-true, or auto (auto)
  evaluation.prompts=   images that are generated and measured at the end, 0 for none (512)

groups, whose options GROUP=? lists:
{groups}

  --help-all            the options of all groups, and every key with its value for these arguments
  --cfg job             print the config of these arguments, without training
  -m                    sweep over all combinations of values that are separated by commas

Names of diffusers' and kohya's scripts are taken for these, with a note: --learning_rate 1e-4, --max_train_steps 500.
Exit codes: 0 success, 1 failure, 2 wrong arguments, 124 out of trainer.max_time, 130 stopped by Ctrl-C.
"""


def asks_for_help(arguments: Sequence[str]) -> bool:
    return "--help" in arguments or "-h" in arguments


def help_text(groups: Sequence[str]) -> str:
    lines = textwrap.wrap(" ".join(groups), 116, initial_indent="  ", subsequent_indent="  ")
    return HELP.format(groups="\n".join(lines))

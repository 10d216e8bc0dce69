"""A run of BLIP, from its settings to what is trained: its heads, what it takes of a sample, its module."""

from openblip.checkpoints.native import save_blip
from openblip.data.sources import Mixture
from openblip.recipes.assembled import Assembled
from openblip.recipes.run import Run
from openblip.recipes.starting_point import starting_point
from openblip.tasks.catalog import TASKS
from openblip.tasks.config import CaptioningConfig


def assemble_blip(run: Run, mixture: Mixture) -> Assembled:
    """Everything that a run of BLIP names, built. ConfigError where it does not fit together."""
    task_class = TASKS[type(run.task)]
    checkpoint = starting_point(run, task_class.heads(run.task), mixture)
    model, tokenizer, preprocessing = checkpoint.model, checkpoint.tokenizer, checkpoint.preprocessing
    task = task_class.build(run.task, run.data, model, tokenizer, preprocessing)
    prompt = run.task.prompt if isinstance(run.task, CaptioningConfig) else checkpoint.prompt
    # Every task that reads texts beside images begins them with [ENC], whatever the start did.
    trained = checkpoint._replace(prompt=prompt, encoder_token="[ENC]")
    processor = task_class.sample_processor(run.task, run.data, question_prompt="{}")
    return Assembled(task, processor, tokenizer, preprocessing, lambda folder: save_blip(folder, trained))

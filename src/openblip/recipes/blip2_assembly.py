"""A run of BLIP-2, from its settings to what is trained: its heads, what it takes of a sample, its module."""

from dataclasses import replace

from openblip.checkpoints.native import save_blip2
from openblip.data.sources import Mixture
from openblip.recipes.assembled import Assembled
from openblip.recipes.blip2_run import Blip2Run
from openblip.recipes.blip2_starting_point import blip2_starting_point
from openblip.recipes.feature_cache import cached_features
from openblip.tasks.catalog import TASKS
from openblip.tasks.config import Blip2Stage2Config


def assemble_blip2(run: Blip2Run, mixture: Mixture) -> Assembled:
    """Everything that a run of BLIP-2 names, built. ConfigError where it does not fit together."""
    task_class = TASKS[type(run.task)]
    checkpoint = blip2_starting_point(run, task_class.heads(run.task), mixture)
    model, tokenizer, preprocessing = checkpoint.model, checkpoint.tokenizer, checkpoint.preprocessing
    task = task_class.build(run.task, run.data, model, tokenizer, preprocessing)
    prompt = run.task.prompt if isinstance(run.task, Blip2Stage2Config) else ""
    trained = checkpoint._replace(prompt=prompt or run.prompt)
    processor = task_class.sample_processor(run.task, run.data, run.question_prompt)
    if run.feature_cache is not None:
        features = cached_features(run.feature_cache, checkpoint, run.data, mixture)
        processor = replace(processor, read_pixels=features)
    return Assembled(task, processor, tokenizer, preprocessing, lambda folder: save_blip2(folder, trained))

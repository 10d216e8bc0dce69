"""A run of BLIP-2, from its settings to what is trained: its heads, what it reads of a sample, its module."""

from openblip.checkpoints.checkpoint import Blip2Checkpoint
from openblip.checkpoints.native.blip2 import save_blip2
from openblip.data.media import Media, media
from openblip.data.prompted_readings import (
    InstructionReading,
    PromptedCaptionReading,
    PromptedQuestionReading,
)
from openblip.data.readings import CaptionReading, Reading
from openblip.data.sources import Mixture
from openblip.errors import ConfigError
from openblip.models.config import Blip2Head
from openblip.recipes.assembled import Assembled
from openblip.recipes.blip2_run import Blip2Run
from openblip.recipes.blip2_starting_point import blip2_starting_point
from openblip.recipes.feature_cache import cached_features
from openblip.tasks.config import (
    GenerativeConfig,
    InstructionConfig,
    PromptedAnsweringConfig,
    RepresentationConfig,
)
from openblip.tasks.generative_learning import GenerativeLearning
from openblip.tasks.prompted_writing import InstructionFollowing, PromptedAnswering
from openblip.tasks.protocol import TrainingTask
from openblip.tasks.representation_learning import RepresentationLearning


def assemble_blip2(run: Blip2Run, mixture: Mixture) -> Assembled:
    """Everything that a run of BLIP-2 names, built. ConfigError where it does not fit together."""
    checkpoint = blip2_starting_point(run, heads_of(run), mixture)
    check_text_fits(run, checkpoint)
    prompt = run.task.prompt if isinstance(run.task, GenerativeConfig) else ""
    trained = checkpoint._replace(prompt=prompt or run.prompt)
    seen = media(run.data.num_frames)
    if run.feature_cache is not None:
        seen = cached_features(run.feature_cache, checkpoint, run.data, mixture)
    return Assembled(
        make_task(run, checkpoint),
        make_reading(run, seen),
        checkpoint.tokenizer,
        checkpoint.preprocessing,
        lambda folder: save_blip2(folder, trained),
    )


def heads_of(run: Blip2Run) -> tuple[Blip2Head, ...]:
    """The heads that a run's task trains."""
    match run.task:
        case RepresentationConfig():
            return ("itc", "itm", "itg") if run.task.itg else ("itc", "itm")
        case GenerativeConfig() | PromptedAnsweringConfig() | InstructionConfig():
            return ("llm",)


def make_task(run: Blip2Run, checkpoint: Blip2Checkpoint) -> TrainingTask:
    """The training task of a run."""
    model, tokenizer, preprocessing = checkpoint.model, checkpoint.tokenizer, checkpoint.preprocessing
    match run.task:
        case RepresentationConfig():
            assert tokenizer is not None  # of a Q-Former that reads text
            return RepresentationLearning(model, tokenizer, preprocessing, run.task)
        case GenerativeConfig():
            return GenerativeLearning(model, preprocessing)
        case PromptedAnsweringConfig():
            return PromptedAnswering(model, preprocessing)
        case InstructionConfig():
            return InstructionFollowing(model, preprocessing)


def make_reading(run: Blip2Run, seen: Media) -> Reading:
    """What a run's task reads of a sample."""
    length, question_prompt = run.data.max_text_length, run.question_prompt
    match run.task:
        case RepresentationConfig():
            return CaptionReading(media=seen, max_text_length=length)
        case GenerativeConfig():
            return PromptedCaptionReading(media=seen, prompt=run.task.prompt)
        case PromptedAnsweringConfig():
            return PromptedQuestionReading(
                media=seen,
                question_prompt=question_prompt,
                instruction_tokens=length if run.task.instructed else None,
            )
        case InstructionConfig():
            return InstructionReading(
                media=seen,
                question_prompt=question_prompt,
                instruction_tokens=length if run.task.instructed else None,
            )


def check_text_fits(run: Blip2Run, checkpoint: Blip2Checkpoint) -> None:
    """ConfigError when the longest text that the Q-Former is to read has more tokens than positions."""
    config = checkpoint.model.config
    longest, positions = run.data.max_text_length, config.qformer.max_positions
    if config.has_text_branch and longest > positions:
        raise ConfigError(
            f"Texts of up to {longest} tokens: the Q-Former has {positions} positions; lower "
            "--data.max-text-length."
        )

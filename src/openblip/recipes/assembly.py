"""A run of BLIP, from its settings to what is trained: its heads, what it reads of a sample, its module."""

from openblip.checkpoints.checkpoint import BlipCheckpoint
from openblip.checkpoints.native.blip import save_blip
from openblip.data.config import DataConfig
from openblip.data.media import media
from openblip.data.readings import (
    MAX_QUESTION_TOKENS,
    CaptionReading,
    DialogReading,
    QuestionReading,
    Reading,
    StatementReading,
)
from openblip.data.sources import Mixture
from openblip.errors import ConfigError
from openblip.models.config import PRETRAINING_HEADS, Head
from openblip.recipes.assembled import Assembled
from openblip.recipes.run import Run
from openblip.recipes.starting_point import starting_point
from openblip.tasks.captioning import Captioning
from openblip.tasks.config import (
    BlipTaskConfig,
    CaptioningConfig,
    NlvrConfig,
    PretrainingConfig,
    QuestionAnsweringConfig,
    RetrievalConfig,
    VisdialConfig,
)
from openblip.tasks.nlvr import Nlvr
from openblip.tasks.pretraining import Pretraining
from openblip.tasks.protocol import TrainingTask
from openblip.tasks.question_answering import QuestionAnswering
from openblip.tasks.retrieval import Retrieval
from openblip.tasks.visdial import Visdial

HEADS: dict[type[BlipTaskConfig], tuple[Head, ...]] = {
    PretrainingConfig: PRETRAINING_HEADS,
    RetrievalConfig: ("itc", "itm"),
    CaptioningConfig: ("lm",),
    QuestionAnsweringConfig: ("vqa",),
    NlvrConfig: ("nlvr",),
    VisdialConfig: ("visdial",),
}


def assemble_blip(run: Run, mixture: Mixture) -> Assembled:
    """Everything that a run of BLIP names, built. ConfigError where it does not fit together."""
    checkpoint = starting_point(run, HEADS[type(run.task)], mixture)
    check_text_fits(run, checkpoint)
    prompt = run.task.prompt if isinstance(run.task, CaptioningConfig) else checkpoint.prompt
    # Every task that reads texts beside images begins them with [ENC], whatever the start did.
    trained = checkpoint._replace(prompt=prompt, encoder_token="[ENC]")
    return Assembled(
        make_task(run.task, checkpoint),
        make_reading(run.task, run.data),
        checkpoint.tokenizer,
        checkpoint.preprocessing,
        lambda folder: save_blip(folder, trained),
    )


def make_task(config: BlipTaskConfig, checkpoint: BlipCheckpoint) -> TrainingTask:
    """The training task that a config describes."""
    model, tokenizer, preprocessing = checkpoint.model, checkpoint.tokenizer, checkpoint.preprocessing
    match config:
        case PretrainingConfig():
            return Pretraining(model, tokenizer, preprocessing, config)
        case RetrievalConfig():
            return Retrieval(model, tokenizer, preprocessing, config)
        case CaptioningConfig():
            return Captioning(model, tokenizer, preprocessing, config)
        case QuestionAnsweringConfig():
            return QuestionAnswering(model, tokenizer, preprocessing, config)
        case NlvrConfig():
            return Nlvr(model, tokenizer, preprocessing)
        case VisdialConfig():
            return Visdial(model, tokenizer, preprocessing)


def make_reading(task: BlipTaskConfig, data: DataConfig) -> Reading:
    """What a task reads of a sample."""
    match task:
        case QuestionAnsweringConfig():
            return QuestionReading(media=media(data.num_frames))
        case NlvrConfig():
            return StatementReading(max_text_length=data.max_text_length)
        case VisdialConfig():
            return DialogReading(num_negatives=task.num_negatives, max_text_length=data.max_text_length)
        case _:
            return CaptionReading(media=media(data.num_frames), max_text_length=data.max_text_length)


def check_text_fits(run: Run, checkpoint: BlipCheckpoint) -> None:
    """ConfigError when the longest text of the run has more tokens than the model has positions."""
    longest = run.data.max_text_length
    if isinstance(run.task, CaptioningConfig):  # the prompt stands in for [CLS], and [SEP] is never fed
        longest += len(checkpoint.tokenizer.prompt(run.task.prompt)) - 2
    if isinstance(run.task, QuestionAnsweringConfig):
        longest = MAX_QUESTION_TOKENS
    positions = checkpoint.model.config.text.max_positions
    if longest > positions:
        raise ConfigError(
            f"Texts of up to {longest} tokens, prompt included: the model has {positions} positions; lower "
            "--data.max-text-length."
        )

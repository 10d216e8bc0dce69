"""The task of each class of settings. A new task adds one line."""

from openblip.tasks.base import Task
from openblip.tasks.blip2_answering import InstructionFollowing, PromptedAnswering
from openblip.tasks.blip2_stage1 import Blip2Stage1
from openblip.tasks.blip2_stage2 import Blip2Stage2
from openblip.tasks.captioning import Captioning
from openblip.tasks.config import (
    Blip2Stage1Config,
    Blip2Stage2Config,
    CaptioningConfig,
    InstructionConfig,
    LanguagePretrainingConfig,
    NlvrConfig,
    PretrainingConfig,
    PromptedAnsweringConfig,
    QuestionAnsweringConfig,
    RetrievalConfig,
    VisdialConfig,
)
from openblip.tasks.language_pretraining import LanguagePretraining
from openblip.tasks.nlvr import Nlvr
from openblip.tasks.pretraining import Pretraining
from openblip.tasks.question_answering import QuestionAnswering
from openblip.tasks.retrieval import Retrieval
from openblip.tasks.visdial import Visdial

TASKS: dict[type, type[Task]] = {
    PretrainingConfig: Pretraining,
    RetrievalConfig: Retrieval,
    CaptioningConfig: Captioning,
    QuestionAnsweringConfig: QuestionAnswering,
    NlvrConfig: Nlvr,
    VisdialConfig: Visdial,
    Blip2Stage1Config: Blip2Stage1,
    Blip2Stage2Config: Blip2Stage2,
    PromptedAnsweringConfig: PromptedAnswering,
    InstructionConfig: InstructionFollowing,
    LanguagePretrainingConfig: LanguagePretraining,
}

"""The task of each class of settings. A new task adds one line."""

from openblip.tasks import config
from openblip.tasks.base import Task
from openblip.tasks.captioning import Captioning
from openblip.tasks.contrastive import Blip2Stage1, Pretraining
from openblip.tasks.language_model import Blip2Stage2, InstructionFollowing, LanguagePretraining, PromptedAnswering
from openblip.tasks.nlvr import Nlvr
from openblip.tasks.prefix import PrefixModeling
from openblip.tasks.question_answering import QuestionAnswering
from openblip.tasks.visdial import Visdial

TASKS: dict[type, type[Task]] = {
    config.PretrainingConfig: Pretraining,
    config.RetrievalConfig: Pretraining,
    config.PrefixConfig: PrefixModeling,
    config.CaptioningConfig: Captioning,
    config.QuestionAnsweringConfig: QuestionAnswering,
    config.NlvrConfig: Nlvr,
    config.VisdialConfig: Visdial,
    config.Blip2Stage1Config: Blip2Stage1,
    config.Blip2Stage2Config: Blip2Stage2,
    config.PromptedAnsweringConfig: PromptedAnswering,
    config.InstructionConfig: InstructionFollowing,
    config.LanguagePretrainingConfig: LanguagePretraining,
}

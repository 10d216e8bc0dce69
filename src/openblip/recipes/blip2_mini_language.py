"""The language models that blip2-mini freezes: a tiny OPT and a tiny T5, trained on text alone."""

from openblip.data.config import DataConfig
from openblip.recipes.language_run import LanguageRun, LanguageShape
from openblip.tasks.config import LanguagePretrainingConfig
from openblip.training.config import TrainingConfig


def blip2_mini_opt() -> LanguageRun:
    """Train a tiny OPT on documents of emoji scenes: captions, questions and answers, no pictures.

    Source: OPT made smaller; its lines end with a line break, as OPT's texts do in BLIP-2 (say so with
    --language.end-of-text). Cost: twenty minutes on one CPU core. Expected: docs/results.md.
    """
    return _language("blip2-mini-opt", LanguageShape(architecture="opt"))


def blip2_mini_t5() -> LanguageRun:
    """Train a tiny T5 on documents of emoji scenes, to go on from a prefix: prefix language modelling.

    Source: BLIP-2 section 3.3, with T5 1.1 made smaller. Cost: twenty minutes on one CPU core.
    Expected: docs/results.md.
    """
    return _language("blip2-mini-t5", LanguageShape(architecture="t5", num_layers=3))


def _language(name: str, shape: LanguageShape) -> LanguageRun:
    return LanguageRun(
        recipe=name,
        shape=shape,
        vocab_size=800,
        data=DataConfig(source=""),
        task=LanguagePretrainingConfig(),
        training=TrainingConfig(
            steps=2000,
            batch_size=64,
            learning_rate=1e-3,
            muon_learning_rate=4e-3,
            warmup_steps=100,
            min_learning_rate=1e-5,
            beta2=0.98,
            clip_norm=1.0,
            checkpoint_every=100,
        ),
        out=f"runs/{name}",
    )

"""LoRA on a frozen language model, through peft: small trained matrices beside its linear layers."""

from torch import nn

from openblip.errors import ConfigError, MissingExtraError
from openblip.models.blip2_config import LoraSettings
from openblip.models.language_model import LanguageModel


def with_lora(language: LanguageModel, settings: LoraSettings) -> LanguageModel:
    """The same language model, to which adapters have been added that change nothing yet.

    `Blip2.freeze("language")` leaves them, and nothing else of it, trainable.

    Raises ConfigError when it has adapters already, or no layers of the names that are to have them;
    MissingExtraError without peft.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError('LoRA needs peft: pip install "openblip[language]"') from error
    if has_lora(language):
        raise ConfigError("The language model has LoRA adapters already: leave out the new ones.")
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) if settings.targets else None,
    )
    try:
        language.model = peft.get_peft_model(language.model, config)
    except ValueError as error:
        raise ConfigError(f"LoRA cannot be added to this language model: {error}") from error
    return language


def has_lora(language: LanguageModel) -> bool:
    """Whether it has adapters."""
    return hasattr(language.model, "peft_config")


def train_adapters(module: nn.Module, mode: bool) -> None:
    """Turn the dropout of adapters on or off, in whatever mode the frozen model around them is."""
    for name, part in module.named_modules():
        if name.endswith(".lora_dropout"):
            part.train(mode)

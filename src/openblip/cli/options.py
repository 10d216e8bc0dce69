"""How a command's options are read from its signature, and the options that several commands share."""

import contextlib
import difflib
import functools
import inspect
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import tyro

# tyro has no public way to word its errors; this hook hands them over as data. An error that a later version of tyro
# adds is reported by a general message, see `parse`.
from tyro import _errors

from openblip.errors import Condition, ConfigError, OutputError, refuse_unused
from openblip.files import is_local, locate, write_bytes
from openblip.generation.decoding import Beam, Decoding, Greedy, Nucleus

if TYPE_CHECKING:
    from openblip.predictor import Blip2Predictor, BlipPredictor

Parsed = TypeVar("Parsed")
Command = TypeVar("Command", bound=Callable[..., int])


def parse_call(command: Callable[..., int], arguments: Sequence[str], *, prog: str) -> Callable[[], int]:
    """Bind `arguments` to the parameters of `command`; fields of dataclasses are options too. Raises as `parse`."""

    @functools.wraps(command)
    def bind(*args: object, **kwargs: object) -> Callable[[], int]:
        values, given = inspect.signature(command).bind(*args, **kwargs).arguments, given_options(arguments)
        whole = SimpleNamespace(**values, conditions=getattr(command, "conditions", ()))
        for settings in (whole, *(value for value in values.values() if is_dataclass(value))):
            refuse_unused(settings, given)
        return functools.partial(command, *args, **kwargs)

    return parse(bind, arguments, prog=prog, config=(tyro.conf.OmitArgPrefixes,))


def parse(
    target: Callable[..., Parsed],
    arguments: Sequence[str],
    *,
    prog: str,
    config: Sequence[Any] = (tyro.conf.AvoidSubcommands,),
    **options: Any,
) -> Parsed:
    """Build `target`, a dataclass or a function, from command-line words.

    Its annotated fields or parameters are the options. What the help says of them are the docstrings of the fields, or
    the `Args:` section of the function's docstring. prog: what the help calls the command. config: markers of tyro; by
    default alternatives, among which a recipe has chosen, are options. options: of `tyro.cli`, e.g. `default`, an
    instance whose values are the defaults.

    Raises `ConfigError` for a wrong or missing option, on one line; SystemExit (0) when help was asked for and printed.
    """
    build = functools.partial(tyro.cli, target, prog=prog, config=config, **options)

    def unknown(words: Sequence[str]) -> str:
        """Say which options there are not, with the closest that there are."""
        wrong = [word.split("=")[0] for word in words if word.startswith("-")]
        if not wrong:
            return f"{_listed(words, 'and')} cannot be understood here"
        text = io.StringIO()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
            build(args=["--help"])
        names = list(dict.fromkeys(re.findall(r"--[a-z][a-z0-9.-]*[a-z0-9]", text.getvalue())))
        close: list[str] = []
        for option in wrong:
            parts = [name for name in names if option.lstrip("-") in name]
            close += [*difflib.get_close_matches(option, names, n=2, cutoff=0.7), *parts][:3]
        hint = f"; did you mean {_listed(list(dict.fromkeys(close)), 'or')}?" if close else ""
        return f"there is no option {_listed(wrong, 'or')}{hint}"

    def report(event: _errors.ParseErrorEvent) -> None:
        match event:
            case _errors.MissingArgs():
                arguments = [argument.arg for argument in event.missing_arguments]
                names = [str(a.lowered.metavar) if a.is_positional() else a.display_name() for a in arguments]
                prefix = f"{unknown(words)}; " if (words := event.unrecognized_tokens) else ""
                message = f"{prefix}{_listed(names, 'and')} must be given"
            case _errors.UnrecognizedArgs():
                message = unknown(event.tokens)
            case _errors.InvalidChoice():
                choices = _listed([choice for choice in event.choices if choice != "None"], "or")
                message = f"{event.argument.display_name()} cannot be {event.value}; choose {choices}"
            case _errors.BadValue(reason="too_few_values"):
                message = f"{event.argument.display_name()} needs a value after it"
            case _errors.InstantiationFailure():
                message = f"{'' if event.argument is None else f'{event.argument.display_name()}: '}{event.message}"
            case _:
                return  # tyro prints its own error and ends the process, which is reported below
        raise ConfigError(f"{message}; see `{prog} --help`")

    try:
        with _errors.on_parse_error(report), contextlib.redirect_stderr(io.StringIO()):
            built: Parsed = build(args=list(arguments))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"the options cannot be understood; see `{prog} --help`") from None
    if is_dataclass(built):
        refuse_unused(built, given_options(arguments))
    return built


def only_with(*conditions: Condition) -> Callable[[Command], Command]:
    """Decorate a command with what options need to have an effect, of all its parameters by name."""

    def decorate(command: Command) -> Command:
        vars(command)["conditions"] = conditions
        return command

    return decorate


def given_options(words: Sequence[str]) -> list[str]:
    """The names of the options among command-line words, without dashes; of --no-sidecar also sidecar."""
    end = words.index("--") if "--" in words else len(words)
    names = [word[2:].split("=")[0].replace("_", "-") for word in words[:end] if word.startswith("--")]
    return [form for name in names for form in dict.fromkeys((name, re.sub(r"(^|\.)no-(?=[^.]*$)", r"\1", name)))]


def _listed(names: Sequence[str], last: str) -> str:
    """ "a, b and c"."""
    *first, end = names
    return f"{', '.join(first)} {last} {end}" if first else end


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where and how models run."""

    device: str | None = None
    """"cpu", "cuda", "cuda:1" …; the best there is when not given."""
    dtype: str = "auto"
    """Precision of the weights: float32, bfloat16, float16, int8 (of a BLIP on a CPU), or auto, the fastest at no loss
    that shows."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(DeviceOptions):
    """Which model runs, where and how."""

    model: str
    """A checkpoint folder, file or hub name, or the name of a shipped model."""
    tokenizer: str | None = None
    """Folder or hub name of the vocabulary, for a checkpoint that has none."""
    encoder_token: Literal["[ENC]", "[CLS]"] | None = None
    """First token of texts that are read together with an image; what the checkpoint says when not given."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Of a BLIP-2: its language model in so many bits, for a GPU with less memory."""

    def load(self) -> "BlipPredictor | Blip2Predictor":
        """Load the checkpoint; raises as `openblip.load` does."""
        import openblip

        options = asdict(self)
        return openblip.load(options.pop("model"), **options)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How captions are written: one option per setting of `Beam`, `Nucleus` and `Greedy`."""

    conditions: ClassVar = (
        Condition("num-beams length-penalty", lambda o: o.decoding == "beam", "it is for --decoding beam"),
        Condition("top-p top-k temperature seed", lambda o: o.decoding == "nucleus", "it is for --decoding nucleus"),
    )

    decoding: Literal["beam", "nucleus", "greedy"] = "beam"
    """Beam search, nucleus sampling, or the likeliest token each time."""
    num_beams: int = 3
    """Beam: how many texts are kept while writing."""
    length_penalty: float = 1.0
    """Beam: above 0 favours long captions, below 0 short ones."""
    top_p: float = 0.9
    """Nucleus: sample from the likeliest tokens with this total probability."""
    top_k: int = 0
    """Nucleus: sample from so many of the likeliest tokens at most; 0 is off."""
    temperature: float = 1.0
    """Nucleus: above 1 is more varied, below 1 less."""
    max_new_tokens: int = 20
    """The longest caption, in tokens."""
    min_new_tokens: int = 0
    """The shortest caption, in tokens."""
    repetition_penalty: float = 1.0
    """Above 1 makes repeated tokens less likely."""
    no_repeat_ngram_size: int = 0
    """No so many tokens in a row occur twice in a caption; 0 is off."""

    def build(self, seed: int | None = None) -> Decoding:
        """Return the strategy; `seed` is for sampling. Raises `ConfigError` for a value out of range."""
        strategies: dict[str, type[Decoding]] = {"beam": Beam, "nucleus": Nucleus, "greedy": Greedy}
        strategy, values = strategies[self.decoding], {**asdict(self), "seed": seed}
        return strategy(**{field.name: values[field.name] for field in fields(strategy)})


def check_output(option: str, path: str | Path, *, is_folder: bool = False) -> None:
    """Raise `ConfigError` for a file, or a folder, that cannot be written, before any work; nothing is made yet.

    path: a `Path` is on this machine; a string may be a URL of fsspec, below which a file is put and removed to try.
    """
    if isinstance(path, str) and not is_local(place := locate(path)):
        probe = place / f".openblip-{os.getpid()}"
        try:
            write_bytes(probe, b"")
            probe.unlink()
        except (OSError, OutputError) as error:
            raise ConfigError(f"{option} {path} cannot be written into; name another place ({error})") from error
        return
    path = locate(path)
    if re.match(r"[\w+.-]{2,}:/", str(path)):
        raise ConfigError(f"{option} {path}: files are written on this machine; name a local path, and copy it then")
    target = path.absolute()
    existing = next(place for place in (target, *target.parents) if place.exists())
    if existing == target and path.is_dir() != is_folder:
        raise ConfigError(f"{option} {path} is {'no folder' if is_folder else 'a folder; name a file'}")
    if existing != target and not existing.is_dir():
        raise ConfigError(f"{option} {path}: {existing} is no folder")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"{option} {path}: {existing} cannot be written into; name another path")


def read_json_texts(path: Path | None, option: str, *, may_be_named: bool = False) -> Any:
    """Read a JSON list of at least one text, or, where they `may_be_named`, an object with a text for each name.

    Raises `ConfigError`, which names the option, for anything else. Without a path there is nothing: None.
    """
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{option} {path} is not readable JSON: {error}") from error
    texts = list(content.values()) if may_be_named and isinstance(content, dict) else content
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        wanted = "neither a JSON list of strings nor an object of them" if may_be_named else "no JSON list of strings"
        raise ConfigError(f"--{option} {path} is {wanted}")
    return content

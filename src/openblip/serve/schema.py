"""The bodies and replies of the HTTP API, as JSON: their fields have the names of the Python calls.

What takes one or several gives one or several: one image that is not in a list gets its captions, a list of images a
list of them. Scores and embeddings always are lists, as the predictor's tensors always have rows for images and texts.

I images, T texts, E embedding width, Q queries of a BLIP-2, G patches a side.
"""

import base64
import binascii
import re
from dataclasses import fields
from typing import Annotated, Any, Literal
from urllib.parse import unquote_to_bytes

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, create_model

from openblip import Beam, Greedy, Nucleus

_DATA_URI = re.compile(r"data:(?P<media>[^,;]*)(?P<parameters>(;[^,;]*)*),", re.IGNORECASE)


def read_image_field(value: Any) -> bytes | str:
    """The bytes of an image that is given as a data URI, or of an upload; a URL of http stays as it is.

    Raises ValueError, which says why, for anything else.
    """
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"an image is a data URI, a string; this is {type(value).__name__}")
    if value[:7].lower() == "http://" or value[:8].lower() == "https://":
        return value
    found = _DATA_URI.match(value[:1024])
    if found is None:
        raise ValueError('an image is a data URI ("data:image/png;base64,..."), or a file of a multipart upload')
    if not (found["media"].lower().startswith("image/") or found["media"].lower() in ("", "application/octet-stream")):
        raise ValueError(f"an image is expected, not {found['media'][:60]}")
    content = value[found.end() :]
    if not found["parameters"].lower().endswith(";base64"):
        return unquote_to_bytes(content)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data URI is no valid base64 ({error})") from error


def _read_images_field(value: Any) -> Any:
    """One image or a list of them, as `read_image_field`."""
    if not isinstance(value, list):
        return read_image_field(value)
    images = []
    for position, item in enumerate(value):
        try:
            images.append(read_image_field(item))
        except ValueError as error:
            raise ValueError(f"image {position}: {error}") from error
    return images


_IMAGE_SCHEMA: dict[str, Any] = {
    "type": "string",
    "description": "A data URI, or a URL that this server allows. A multipart upload has a file of this name instead.",
    "examples": ["data:image/png;base64,iVBORw0KGgo="],
}
_IMAGES_SCHEMA = {"anyOf": [_IMAGE_SCHEMA, {"type": "array", "items": _IMAGE_SCHEMA}]}
ImageField = Annotated[bytes | str, PlainValidator(read_image_field), WithJsonSchema(_IMAGE_SCHEMA)]
ImagesField = Annotated[Any, PlainValidator(_read_images_field), WithJsonSchema(_IMAGES_SCHEMA)]
Texts = str | list[str]


class Body(BaseModel):
    """What a request may hold; a field of another name is an error."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="One of `GET /models`; by default the first that can do this.")


def _decoding_body(kind: str, strategy: type) -> Any:
    """The settings of a strategy as JSON, with its fields and defaults; `kind` says which it is."""
    settings: dict[str, Any] = {field.name: (field.type, field.default) for field in fields(strategy)}
    return create_model(
        f"{strategy.__name__}Body",
        __config__=ConfigDict(extra="forbid", strict=True),
        __doc__=f"As openblip.{strategy.__name__}.",
        **{"kind": (Literal[kind], ...), **settings},
    )


STRATEGIES: dict[str, type[Beam | Greedy | Nucleus]] = {"beam": Beam, "greedy": Greedy, "nucleus": Nucleus}
_BeamBody, _GreedyBody, _NucleusBody = (_decoding_body(kind, strategy) for kind, strategy in STRATEGIES.items())
DecodingBody: Any = Annotated[_BeamBody | _GreedyBody | _NucleusBody, Field(discriminator="kind")]


class WritingBody(Body):
    """A request for texts that a model writes."""

    decoding: DecodingBody | None = Field(None, description="How to write; by default as the model's call does.")

    @property
    def strategy(self) -> Beam | Greedy | Nucleus | None:
        """The decoding that is asked for; ConfigError for settings out of range."""
        if self.decoding is None:
            return None
        settings = self.decoding.model_dump()
        return STRATEGIES[settings.pop("kind")](**settings)


class CaptionBody(WritingBody):
    """Captions of images."""

    images: ImagesField
    prompt: Texts | None = Field(None, description="What captions continue, for all images or one for each.")
    num_captions: int = Field(1, ge=1)


class AnswerBody(WritingBody):
    """Answers to questions about images: in pairs, or one of the two with all of the other."""

    images: ImagesField
    questions: Texts
    candidates: list[str] | list[list[str]] | None = Field(
        None, description="Answers to choose from, for all questions or a list for each; the model writes without them."
    )


class MatchBody(Body):
    """How well each text describes each image."""

    images: ImagesField
    texts: Texts


class EmbedBody(Body):
    """Unit vectors of images and of texts, which can be compared."""

    images: ImagesField | None = None
    texts: Texts | None = None


class ExplainBody(Body):
    """Where the model looks, for each word of a text, or of the caption that it writes."""

    image: ImageField
    text: str | None = None


class ChatBody(WritingBody):
    """A conversation about one image."""

    images: ImagesField = Field(description="One image, also as a list of one.")
    turns: list[tuple[str, str] | str] = Field(
        description="Earlier turns, each [question, answer], and last the open question.", min_length=1
    )


class SearchBody(BaseModel):
    """What to find in the index: images that fit a text, an image or both; or texts that came with images."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = None
    image: ImageField | None = None
    find: Literal["images", "texts"] = "images"
    top: int = Field(20, ge=1, le=1000)
    rerank: int = Field(0, ge=0, le=1000, description="So many of the nearest are compared anew by ITM.")
    where: str | None = Field(None, description="A condition of SQL on shard, key, caption, width and height.")


class WrittenText(BaseModel):
    """A caption or an answer, with the natural logarithm of its probability."""

    text: str
    logprob: float


class CaptionReply(BaseModel):
    """A list of `num_captions` captions, the likeliest first where they were searched; of several images such lists."""

    model: str
    captions: list[WrittenText] | list[list[WrittenText]]


class AnswerReply(BaseModel):
    """An answer for each question; for one image and one question that are not in lists, the answer."""

    model: str
    answers: WrittenText | list[WrittenText]


class MatchReply(BaseModel):
    """[I][T] each; null where the model has no such head."""

    model: str
    match: list[list[float]] | None = Field(description="The probability that the text describes the image, by ITM.")
    similarity: list[list[float]] | None = Field(description="The cosine of their embeddings (ITC).")


class EmbedReply(BaseModel):
    """[I][E] for images, [I][Q][E] of a BLIP-2; [T][E] for texts; null for what was not asked for."""

    model: str
    images: list[list[float]] | list[list[list[float]]] | None
    texts: list[list[float]] | None


class WordHeat(BaseModel):
    """A word, and how much each patch of the image counts for it, row by row; 1 is the patch that counts most."""

    word: str
    heat: list[list[float]]


class ExplainReply(BaseModel):
    """The text, and for each of its words where the model looked, [G][G]."""

    model: str
    text: str = Field(description="The text that was given, or the caption or answer that the model wrote.")
    score: float = Field(description="P(match) of a given text; the log-probability of a text that was written.")
    words: list[WordHeat]
    overall: list[list[float]] = Field(description="The mean over all words, in the same form.")


class ChatReply(BaseModel):
    """What the model replies to the open question."""

    model: str
    answer: WrittenText


class SearchResult(BaseModel):
    """One result, as `openblip.search.index.Hit`."""

    shard: str
    key: str
    caption: str
    similarity: float
    match: float | None
    thumbnail: str | None = Field(description="A small JPEG image as a data URI.")


class SearchReply(BaseModel):
    """The results, best first."""

    results: list[SearchResult]


class ModelInfo(BaseModel):
    """A model that is served."""

    name: str
    tasks: list[str] = Field(description="The calls that it can do.")
    dtype: str
    device: str
    num_parameters: int
    is_ready: bool = Field(description="False while its worker starts again.")


class IndexInfo(BaseModel):
    """The index that `POST /search` looks into."""

    images: int
    model: str


class ModelsReply(BaseModel):
    """What this server can do."""

    models: list[ModelInfo]
    index: IndexInfo | None = Field(description="Null where the server was started without one.")


class ErrorDetail(BaseModel):
    """What went wrong: a type for programs, and for people a message that says what to do."""

    type: str
    message: str


class ErrorReply(BaseModel):
    """The body of every reply that is not 2xx, but those of /v1, which have OpenAI's form."""

    error: ErrorDetail

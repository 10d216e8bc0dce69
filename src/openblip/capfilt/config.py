"""What a CapFilt run does, also the options of `openblip capfilt`. No torch here, so that `--help` answers at once."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

import tyro

from openblip.data.config import DecodingAhead
from openblip.data.decision import Decision, check_threshold
from openblip.errors import Condition, ConfigError
from openblip.generation.decoding import Beam, Greedy, Nucleus, check_decoding


@dataclass(frozen=True, kw_only=True)
class FilterCheckOptions:
    """Whether the filter is tried on clean pairs before it is used, and what it must reach there."""

    check: str | None = None
    """Clean pairs that neither model was trained on: any data source, 100 images at least. Before anything else the
    filter scores their images with their own captions and with those of others; its AUC, precision and recall stand in
    the manifest and on the page."""
    check_floor: float = 0.8
    """What the lower end of the 95% interval of its AUC must reach, with captions of random other images; below, the
    filter is not used."""
    no_check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Use the filter without a check, or whatever the check says."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.check_floor <= 1.0:
            raise ConfigError(f"check-floor is {self.check_floor}; an AUC lies in 0 to 1, and guessing reaches 0.5")


@dataclass(frozen=True, kw_only=True)
class CapFiltConfig(FilterCheckOptions, DecodingAhead):
    """One CapFilt run: which pairs, which two checkpoints, how captions are written (BLIP section 3.3).

    Defaults are the paper's: one caption per image by nucleus sampling with p = 0.9, and a text is kept when its ITM
    probability is above 0.5. Raises `ConfigError` for values that cannot work together.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The noisy pairs: tar shards ("{0000..0127}.tar"), parquet, jsonl, csv, COCO json, a folder, any data source."""
    captioner: str
    """Checkpoint that writes captions: a folder, a name on the hub, or the name of a shipped model; a BLIP, a BLIP-2 or
    any image-text-to-text model of transformers."""
    filter: str
    """Checkpoint that scores texts against images: a folder, or the name of a shipped model."""
    threshold: float = 0.5
    """A text is kept when its ITM probability is strictly above this; `openblip capfilt-select` changes it later."""
    num_captions: int = 1
    """Captions written per image."""
    candidates: int | None = None
    """Write so many captions per image, rank them, and keep the best; in place of --num-captions. BLIP-2 has 10."""
    keep_best: int = 2
    """Of the candidates of an image that pass the threshold, so many are kept; `openblip capfilt-select` changes it."""
    rank_by: Literal["itc", "itm"] = "itc"
    """The filter's score that ranks candidates."""
    decoding: Annotated[Greedy | Beam | Nucleus, tyro.conf.Suppress] = Nucleus()  # noqa: RUF009 (frozen)
    """How the captioner decodes; its seed is the field below."""
    prompt: str | None = None
    """The first words of every caption, or what a chat model is asked; the checkpoint's own when not given."""
    seed: int = 0
    """Seed of the sampling; every image draws from (seed, shard, key), so batches and order do not matter."""
    batch_size: int = 64
    """Images in one step of the models. Changes speed and memory, not the rows."""
    dtype: str = "auto"
    """Precision of the models: float32, bfloat16, float16, int8 (of a BLIP on a CPU), or auto, the fastest at no loss
    that shows."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Of a captioner that is a BLIP-2: its language model in so many bits, for a GPU with less memory; of one that is
    no BLIP: the whole model."""
    keep_embeddings: bool = False
    """Keep the filter's embeddings of images and texts beside the captions, for scores that compare with neighbours."""

    conditions: ClassVar = (
        Condition("keep-best rank-by", lambda config: config.candidates is not None, "it is about --candidates N"),
        Condition("check-floor", lambda config: config.check is not None, "nothing is checked without --check PAIRS"),
        Condition("check-floor", lambda config: not config.no_check, "with --no-check the filter is used anyway"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_captions", "candidates", "keep_best", "batch_size", "num_workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"capfilt: {name} is {value}; it must be at least 1")
        check_threshold(self.threshold)
        if self.candidates is not None:
            if self.num_captions != 1:
                raise ConfigError("capfilt: give num_captions or candidates: candidates are captions that are ranked")
            if self.keep_best > self.candidates:
                raise ConfigError(f"capfilt: keep_best is {self.keep_best} of {self.candidates} candidates; keep fewer")
        check_decoding(self.decoding, self.captions_per_image)
        if isinstance(self.decoding, Nucleus) and self.decoding.seed is not None:
            raise ConfigError("capfilt: the decoding has a seed of its own; give it as CapFiltConfig.seed")

    @property
    def captions_per_image(self) -> int:
        """How many captions are written for an image."""
        return self.num_captions if self.candidates is None else self.candidates

    @property
    def decision(self) -> Decision:
        """What is kept of the run at first."""
        return Decision(threshold=self.threshold, best_captions=None if self.candidates is None else self.keep_best)

    def row_settings(self) -> dict[str, Any]:
        """The settings, other than data and models, that change rows of the output, as they are compared and shown."""
        decoding = {name: value for name, value in asdict(self.decoding).items() if name != "seed"}
        return {
            "num_captions": self.captions_per_image,
            "keep_best": None if self.candidates is None else self.keep_best,
            "rank_by": None if self.candidates is None else self.rank_by,
            "decoding": type(self.decoding).__name__.lower(),
            **decoding,
            "prompt": self.prompt,
            "seed": self.seed,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "jpeg": self.jpeg,
            "keep_embeddings": self.keep_embeddings,
        }


SCORES = {
    "num_words": "words of the text",
    "num_characters": "characters of the text",
    "language": "language of the text, an ISO 639-1 code",
    "language_probability": "how sure that is, 0 to 1",
    "boilerplate": "whether the text is a file name, an address, an offer or the like, and describes nothing",
    "sieve": "web texts: cosine with the closest synthetic caption of the image (SIEVE)",
    "text_logprob": "log-probability of the text under the captioner",
    "token_logprob": "the same for one token, on average",
    "clip": "cosine of text and image by the CLIP or SigLIP that --clip names",
    "width": "width of the image in pixels, as it is shown",
    "height": "its height",
    "aspect": "width divided by height",
    "image_sha256": "SHA-256 of the image file",
    "image_hash": "perceptual hash of the image, 64 bits",
    "text_minhash": "MinHash of the text, in bands",
    "exact_image_group": "a number that all images with the same file share",
    "image_group": "a number that all images share that look nearly the same (--image-distance)",
    "image_repeat": "how many images of this group came before this one",
    "exact_text_group": "a number that all texts share that are equal but for case and spaces",
    "text_group": "a number that all texts share that are nearly equal (--text-similarity)",
    "text_repeat": "how many texts of this group came before this one",
    "leaked_image": "whether the image, or nearly the same one, is also in --against",
    "leaked_text": "whether the text, or nearly the same one, is also in --against",
    "lemon_image": "similarity of the text to the texts of the nearest images (LEMoN)",
    "lemon_text": "similarity of the image to the images of the nearest texts (LEMoN)",
    "lemon": "itc and both together",
}
"""What `openblip capfilt-score` computes, by the name of the column; `capfilt/scores.py` has how."""
LEAKS = ("leaked_image", "leaked_text")  # what --against asks for


def _used_by(options: str, *scores: str) -> Condition:
    return Condition(options, lambda config: bool({*scores} & {*config.names}), f"it is for {', '.join(scores)}")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which scores are added to a finished CapFilt run, and how they are computed.

    Raises `ConfigError` for values that cannot be, a score without what it needs, and options that no score uses.
    """

    conditions: ClassVar = (
        _used_by("image-distance", "image_group", "image_repeat", "leaked_image"),
        _used_by("text-similarity", "text_minhash", "text_group", "text_repeat", "leaked_text"),
        _used_by("num-neighbours num-references", "lemon_image", "lemon_text", "lemon"),
    )

    scores: tuple[str, ...] = ()
    """Names of scores from the list above, or FILE.py:FUNCTION, separated by spaces or commas."""
    column: str | None = None
    """Name of the column, where one score is computed; by default the score's or the function's."""
    clip: str | None = None
    """A CLIP or SigLIP of transformers, a folder or hub name; gives the column clip."""
    against: str | None = None
    """An evaluation set, any source; gives the columns leaked_image and leaked_text."""
    against_images: str | None = None
    """The folder of the images that the evaluation set names."""
    image_distance: int = 4
    """Images are nearly the same when so many of the 64 bits of their perceptual hashes differ, or fewer."""
    text_similarity: float = 0.8
    """Texts are nearly the same when this share of their character 4-grams is common to both (Jaccard)."""
    num_neighbours: int = 30
    """How many nearest images, or texts, are asked."""
    num_references: int = 20_000
    """Texts, chosen by hash from all shards, among which neighbours are looked for."""
    batch_size: int = 64
    """Images in one step of a model, or given to a function at once."""
    num_workers: int | None = None
    """Threads that read and decode images; as many as there are processor cores when not given."""
    overwrite: bool = False
    """Compute scores anew that were computed with other settings."""

    def __post_init__(self) -> None:
        for name in ("num_neighbours", "num_references", "batch_size", "num_workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"capfilt-score: {name} is {value}; it must be at least 1")
        if not 0 <= self.image_distance <= 10:
            raise ConfigError(f"capfilt-score: image_distance is {self.image_distance}; give 0 to 10 of the 64 bits")
        if not 0 < self.text_similarity <= 1:
            raise ConfigError(
                f"capfilt-score: text_similarity is {self.text_similarity}; give a share above 0, up to 1"
            )
        names = self.names
        if not names:
            raise ConfigError(f"capfilt-score: no score was named; there are {', '.join(SCORES)}, and FILE.py:FUNCTION")
        if unknown := [name for name in names if name not in SCORES and ":" not in name]:
            listed = f"there are {', '.join(SCORES)}, and FILE.py:FUNCTION"
            raise ConfigError(f"capfilt-score: no score is called {', '.join(unknown)}; {listed}")
        if "clip" in names and self.clip is None:
            raise ConfigError("capfilt-score: the score clip needs --clip with a CLIP or SigLIP of transformers")
        if self.against is None and (leaks := [name for name in names if name.startswith("leaked_")]):
            raise ConfigError(f"capfilt-score: the score {leaks[0]} needs --against with an evaluation set")
        if self.against is None and self.against_images is not None:
            raise ConfigError("capfilt-score: against_images is the folder of images of --against, which was not given")
        if self.column is not None and len(names) != 1:
            raise ConfigError(f"capfilt-score: column names one score; there are {len(names)}: {', '.join(names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The scores that are asked for, each once; `clip` and `against` ask for theirs."""
        leaks = () if self.against is None or any("leaked_" in name for name in self.scores) else LEAKS
        named = [name for joined in self.scores for part in joined.split(",") if (name := part.strip())]
        return tuple(dict.fromkeys([*named, *(["clip"] if self.clip is not None else []), *leaks]))

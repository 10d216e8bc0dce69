"""Videos: frames encoded like images, their tokens one after the other, and taken by every call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("av")

from tiny_predictor import TEXTS, assert_same, check_batches, make_predictor, random_video

from openblip.data.images import read_frames
from openblip.errors import ConfigError, VideoError
from openblip.generation.decoding import Greedy, Nucleus
from openblip.predictor import BlipPredictor

VIDEOS = [random_video(seed) for seed in range(5)]
CALLS: dict[str, Callable[[BlipPredictor, Any, list[str], int | None], Any]] = {
    "caption": lambda p, videos, _, size: p.caption(videos, decoding=Greedy(max_new_tokens=5), batch_size=size),
    "sample": lambda p, videos, _, size: p.caption(videos, decoding=Nucleus(max_new_tokens=5, seed=1), batch_size=size),
    "match": lambda p, videos, texts, size: p.match(videos, texts, size),
    "embed_images": lambda p, videos, _, size: p.embed_images(videos, size),
}


def test_a_video_is_its_frames_one_after_the_other(predictor: BlipPredictor) -> None:
    encoded = predictor.encode_videos(VIDEOS[:2], num_frames=3)
    assert len(encoded) == 2
    assert encoded.num_frames == 3
    for tokens, each in zip(encoded.tokens, VIDEOS, strict=False):
        frames = predictor.encode(read_frames(each, 3))
        assert_same(tokens, frames.tokens.flatten(0, 1))


def test_the_embedding_of_a_video_is_that_of_all_its_frames(predictor: BlipPredictor) -> None:
    frames = predictor.encode(read_frames(VIDEOS[0], 4))
    with torch.no_grad():
        projected = predictor.model.vision_proj(frames.tokens[:, 0]).mean(dim=0)
    expected = torch.nn.functional.normalize(projected, dim=0)
    found = predictor.embed_images(predictor.encode_videos(VIDEOS[0], num_frames=4))
    assert_same(found[0], expected)


@pytest.mark.parametrize("call", CALLS)
def test_results_do_not_depend_on_batches_or_order(predictor: BlipPredictor, call: str) -> None:
    def results(videos: Any, texts: list[str], size: int | None) -> Any:
        return CALLS[call](predictor, predictor.encode_videos(videos, num_frames=2, batch_size=size), texts, size)

    assert len({str(result) for result in check_batches(results, VIDEOS, TEXTS, sizes=(1, 4, 5))}) > 1


def test_questions_about_videos() -> None:
    predictor = make_predictor("vqa")
    encoded = predictor.encode_videos(VIDEOS[:3], num_frames=4)
    found = predictor.answer(encoded, TEXTS[:3], candidates=["yes", "no", "a dog"], return_scores=True)
    for i in range(3):
        alone = predictor.encode_videos(VIDEOS[i], num_frames=4)
        (again,) = predictor.answer(alone, [TEXTS[i]], candidates=["yes", "no", "a dog"], return_scores=True)
        assert_same(again, found[i])


@pytest.mark.parametrize(("batch_size", "expected"), [(8, [2, 2, 1]), (3, [1] * 5), (None, [5])])
def test_a_batch_counts_frames(
    predictor: BlipPredictor, monkeypatch: pytest.MonkeyPatch, batch_size: int | None, expected: list[int]
) -> None:
    encode, calls = predictor.model.encode_image, []
    monkeypatch.setattr(
        predictor.model, "encode_image", lambda frames: calls.append(len(frames) // 4) or encode(frames)
    )
    encoded = predictor.encode_videos(VIDEOS, num_frames=4, batch_size=batch_size)
    assert calls == expected
    assert [len(part) for _, part in predictor.encoded_batches(encoded, batch_size)] == expected


def test_selected_videos_and_none_stay_videos(predictor: BlipPredictor) -> None:
    encoded = predictor.encode_videos(VIDEOS[:3], num_frames=2)
    chosen = encoded.select(torch.tensor([2, 0]))
    assert_same(predictor.embed_images(chosen), predictor.embed_images(encoded)[[2, 0]])
    encoded = predictor.encode_videos([], num_frames=3)
    assert encoded.tokens.shape[:2] == (0, 15)
    assert predictor.caption(encoded) == []
    assert predictor.embed_images(encoded).shape == (0, 12)


def test_a_video_that_cannot_be_decoded_is_named(predictor: BlipPredictor, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="video 2"):
        predictor.encode_videos([*VIDEOS[:2], b"no video"], num_frames=2, batch_size=2)
    path = tmp_path / "broken.mp4"
    path.write_bytes(VIDEOS[0][:200])
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        predictor.encode_videos(path)
    with pytest.raises(VideoError, match=r"absent\.mp4"):
        predictor.encode_videos(str(tmp_path / "absent.mp4"))
    with pytest.raises(ConfigError, match="num_frames is 0"):
        predictor.encode_videos(VIDEOS, num_frames=0)


def test_prepared_videos_are_encoded_as_videos_are(predictor: BlipPredictor) -> None:
    prepared = predictor.prepare_videos(VIDEOS, num_frames=2)
    assert prepared.shape[:3] == (5, 2, 3)
    assert prepared.dtype == torch.uint8
    encoded = predictor.encode(prepared, batch_size=4)
    expected = predictor.encode_videos(VIDEOS, num_frames=2, batch_size=4)
    assert torch.equal(encoded.tokens, expected.tokens)
    assert (encoded.seeds, encoded.num_frames) == (expected.seeds, 2)
    assert predictor.match(prepared, TEXTS).shape == (5,)
    assert predictor.encode(prepared[:0]).tokens.shape == (0, 10, 24)

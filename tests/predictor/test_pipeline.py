"""`openblip.pipeline` takes what the documentation of transformers 4 passes, and returns what that shows."""

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_predictor import make_predictor

import openblip
from openblip.errors import ConfigError, ImageError, UnsupportedTaskError
from openblip.generation.decoding import Beam, Greedy, Nucleus
from openblip.predictor import BlipPredictor
from openblip.predictor.pipeline import read_generation


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    return [str(folder / f"{number}.png") for number in range(3)]


@pytest.fixture(scope="module")
def answering() -> BlipPredictor:
    return make_predictor("vqa")


@pytest.fixture
def url() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/0.png" else 404)
            self.end_headers()
            self.wfile.write(png(0))

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_captions_have_the_form_of_transformers(predictor: BlipPredictor, paths: list[str]) -> None:
    captioner = openblip.pipeline("image-to-text", model=predictor)
    expected = predictor.caption(paths, decoding=Greedy(max_new_tokens=20))
    assert captioner(paths[0]) == [{"generated_text": expected[0]}]
    assert captioner(paths) == [[{"generated_text": text}] for text in expected]
    assert captioner(images=paths[:1]) == [[{"generated_text": expected[0]}]]
    short = predictor.caption(paths[0], decoding=Greedy(max_new_tokens=3))
    assert captioner(Image.open(paths[0]), max_new_tokens=3) == [{"generated_text": short}]
    assert openblip.pipeline("image-to-text", predictor, max_new_tokens=3)(paths[0]) == [{"generated_text": short}]
    beams = predictor.caption(paths[0], decoding=Beam(num_beams=3, max_new_tokens=5), num_captions=2)
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
    assert captioner(paths[0], generate_kwargs=kwargs) == [{"generated_text": text} for text in beams]


def test_a_prompt_is_part_of_the_text(predictor: BlipPredictor, paths: list[str]) -> None:
    prompt = "a photography of"
    written = predictor.caption(paths[0], prompt=prompt, decoding=Greedy())
    result = openblip.pipeline("image-to-text", predictor)(paths[0], prompt=prompt)
    assert result == [{"generated_text": f"{prompt} {written}"}]


def test_generators_and_data_sets_give_generators_that_read_in_batches(
    predictor: BlipPredictor, paths: list[str]
) -> None:
    captioner = openblip.pipeline("image-to-text", predictor, batch_size=2)
    seen: list[str] = []

    def images() -> Iterator[str]:
        for path in paths:
            seen.append(path)
            yield path

    results = captioner(images())
    assert not seen
    assert next(results) == captioner(paths[0])
    assert seen == paths[:2]
    assert list(results) == captioner(paths[1:])

    class Data(torch.utils.data.Dataset[str]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, position: int) -> str:
            return paths[position]

    assert list(captioner(Data())) == captioner(paths)


def test_answers_in_every_form_of_the_question(answering: BlipPredictor, paths: list[str]) -> None:
    oracle = openblip.pipeline(model=answering)  # of what this checkpoint can do
    questions = ["what is it ?", "how many ?"]
    [one, two], first, other = answering.answer(paths[:2], questions[:1] * 2), paths[0], paths[1]
    assert oracle(question=questions[0], image=first) == [{"answer": one}]
    assert oracle({"image": first, "question": questions[0]}) == [{"answer": one}]
    assert oracle([{"image": first, "question": questions[0]}]) == [[{"answer": one}]]
    assert oracle(image=paths[:2], question=questions[0], top_k=1) == [[{"answer": one}], [{"answer": two}]]
    assert len(oracle(image=first, question=questions)) == 2
    assert oracle(image=[np.asarray(Image.open(first))], question=questions[0]) == [[{"answer": one}]]
    crossed = oracle(image=[first, other], question=questions)
    again = answering.answer([first, other] * 2, [questions[0]] * 2 + [questions[1]] * 2)
    assert crossed == [[{"answer": text}] for text in again]


def test_labels_are_ranked_by_the_softmax_of_itc(predictor: BlipPredictor, paths: list[str]) -> None:
    labels = ["dog", "cat", "house"]
    classifier = openblip.pipeline("zero-shot-image-classification", model=predictor)
    result = classifier(paths[0], candidate_labels=labels, hypothesis_template="a photo of {}")
    similarity = predictor.similarity(paths[0], [f"a photo of {label}" for label in labels])[0]
    scores = (similarity / predictor.checkpoint.model.temperature.detach()).softmax(dim=0)
    assert {entry["label"]: pytest.approx(entry["score"]) for entry in result} == dict(
        zip(labels, scores.tolist(), strict=True)
    )
    assert [entry["score"] for entry in result] == sorted(scores.tolist(), reverse=True)
    assert [len(each) for each in classifier(paths, labels)] == [3, 3, 3]
    with pytest.raises(ConfigError, match="label belongs"):
        classifier(paths[0], labels, hypothesis_template="a photo")


def test_features_are_nested_lists_with_a_batch_of_one(predictor: BlipPredictor, paths: list[str]) -> None:
    extractor = openblip.pipeline(task="image-feature-extraction", model=predictor)
    states = predictor.features(paths[:1]).image
    assert states is not None
    assert extractor(paths[0], return_tensors=True).shape == states.shape
    assert extractor(paths[0]) == states.tolist()
    assert extractor(paths[0], pool=True) == states[:, 0].tolist()
    assert [np.shape(each) for each in extractor(paths)] == [tuple(states.shape)] * 3


def test_images_of_the_web_and_data_uris(predictor: BlipPredictor, paths: list[str], url: str) -> None:
    captioner = openblip.pipeline("image-to-text", predictor)
    assert captioner(f"{url}/0.png", timeout=60) == captioner(paths[0])
    encoded = base64.b64encode(png(0)).decode()
    assert captioner(f"data:image/png;base64,{encoded}") == captioner(encoded) == captioner(paths[0])
    with pytest.raises(ImageError, match="no image as base64"):
        captioner("data:image/png;base64,abc")
    with pytest.raises(ImageError, match=r"1\.png.*404"):
        captioner(f"{url}/1.png")


def test_a_folder_is_loaded_as_it_is_asked_for(tmp_path: Path) -> None:
    make_predictor("lm").save(tmp_path / "model", "huggingface")
    model = openblip.pipeline(
        "image-to-text", str(tmp_path / "model"), device=-1, torch_dtype=torch.bfloat16, framework="pt", use_fast=True
    ).model
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
    with pytest.raises(ConfigError, match="quantization is 8bit: only the language model of a BLIP-2"):
        openblip.pipeline("image-to-text", str(tmp_path / "model"), model_kwargs={"load_in_8bit": True})


def test_what_cannot_be_is_said(predictor: BlipPredictor, answering: BlipPredictor, paths: list[str]) -> None:
    with pytest.raises(ConfigError, match="no pipeline 'text-generation'; there are image-to-text"):
        openblip.pipeline("text-generation", predictor)
    with pytest.raises(ConfigError, match="openblip models"):
        openblip.pipeline("image-to-text")
    with pytest.raises(UnsupportedTaskError, match="openblip models"):
        openblip.pipeline("image-to-text", answering)
    with pytest.raises(ConfigError, match="no argument colour"):
        openblip.pipeline("image-to-text", predictor)(paths[0], colour=1)
    with pytest.raises(ConfigError, match="revision"):
        openblip.pipeline("image-to-text", predictor, revision="main")
    with pytest.raises(ConfigError, match="candidate_labels"):
        openblip.pipeline("zero-shot-image-classification", predictor)(paths[0])


def test_generate_arguments_become_a_decoding() -> None:
    assert read_generation(None, None) == (Greedy(max_new_tokens=20), 1)
    assert read_generation(None, {"do_sample": True, "max_new_tokens": 7})[0] == Nucleus(
        top_p=1.0, top_k=50, max_new_tokens=7
    )
    assert read_generation(9, {"num_beams": 4, "length_penalty": 2.0, "repetition_penalty": 1.5}) == (
        Beam(num_beams=4, max_new_tokens=9, length_penalty=2.0, repetition_penalty=1.5),
        1,
    )
    for max_new_tokens, kwargs, message in (
        (5, {"max_new_tokens": 5}, "twice"),
        (None, {"max_length": 5}, "max_new_tokens"),
        (None, {"penalty_alpha": 0.5}, "penalty_alpha"),
        (None, {"do_sample": True, "num_beams": 2}, "choose one"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_generation(max_new_tokens, kwargs)

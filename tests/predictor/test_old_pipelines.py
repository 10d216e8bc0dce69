"""The calls in the documentation of transformers 4's four pipelines, as they stand there, through `openblip.pipeline`.

Only the import differs. Names on the hub give tiny models, addresses an image that is not downloaded.
"""

import ast
import contextlib
import io
import textwrap
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image
from tiny_predictor import make_predictor

import openblip
from openblip.predictor.blip import BlipPredictor

HEADS = {
    "ydshieh/vit-gpt2-coco-en": ("lm",),
    "Salesforce/blip-image-captioning-base": ("lm",),
    "dandelin/vilt-b32-finetuned-vqa": ("vqa",),
    "Salesforce/blip-vqa-base": ("vqa",),
    "google/siglip-so400m-patch14-384": ("itc",),
    "openai/clip-vit-large-patch14": ("itc",),
    "google/vit-base-patch16-224": ("lm",),
}
CALLS = {
    "image-to-text": """
        captioner = pipeline(model="ydshieh/vit-gpt2-coco-en")
        captioner("https://huggingface.co/datasets/Narsil/image_dummy/raw/main/parrots.png")
        """,
    "image-to-text with its task": """
        captioner = pipeline("image-to-text", model="Salesforce/blip-image-captioning-base")
        captioner(image)
        captioner(images=image)
        captioner(image, max_new_tokens=4)
        captioner([image, image], generate_kwargs={"max_new_tokens": 4}, timeout=10.0)[1]
        """,
    "visual-question-answering": """
        oracle = pipeline(model="dandelin/vilt-b32-finetuned-vqa")
        image_url = "https://huggingface.co/datasets/Narsil/image_dummy/raw/main/lena.png"
        oracle(question="What is she wearing ?", image=image_url)
        oracle(question="What is she wearing ?", image=image_url, top_k=1)
        oracle(question="Is this a person ?", image=image_url, top_k=1)
        """,
    "visual-question-answering with its task": """
        pipe = pipeline("visual-question-answering", model="Salesforce/blip-vqa-base")
        question = "What is she wearing ?"
        pipe(image, question, top_k=1)
        pipe({"image": image, "question": question})
        pipe([{"image": image, "question": question}, {"image": image, "question": question}])[1]
        pipe(image=[image, image], question=question)[0]
        pipe(image=image, question=[question, question])[1]
        pipeline("vqa", model="Salesforce/blip-vqa-base")(image=image, question=question)
        """,
    "zero-shot-image-classification": """
        classifier = pipeline(model="google/siglip-so400m-patch14-384")
        classifier(
            "https://huggingface.co/datasets/Narsil/image_dummy/raw/main/parrots.png",
            candidate_labels=["animals", "humans", "landscape"],
        )
        classifier(
            "https://huggingface.co/datasets/Narsil/image_dummy/raw/main/parrots.png",
            candidate_labels=["black and white", "photorealist", "painting"],
        )
        """,
    "zero-shot-image-classification with its task": """
        checkpoint = "openai/clip-vit-large-patch14"
        detector = pipeline(model=checkpoint, task="zero-shot-image-classification")
        detector(image, candidate_labels=["fox", "bear", "seagull", "owl"])
        detector([image, image], candidate_labels=["fox", "bear"], hypothesis_template="a photo of {}")[1]
        """,
    "image-feature-extraction": """
        extractor = pipeline(model="google/vit-base-patch16-224", task="image-feature-extraction")
        extractor("https://huggingface.co/datasets/Narsil/image_dummy/raw/main/parrots.png", return_tensors=True)
        """,
    "image-feature-extraction that pools": """
        pipe = pipeline(task="image-feature-extraction", model="google/vit-base-patch16-224", device="cpu", pool=True)
        pipe([image, image])[1]
        pipe(image)
        """,
}


def of_captions(result: Any) -> bool:
    return [list(entry) for entry in result] == [["generated_text"]]


def of_answers(result: Any) -> bool:
    return [list(entry) for entry in result] == [["answer"]]


def of_labels(result: Any) -> bool:
    scores = [entry["score"] for entry in result]
    return scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1) and "label" in result[0]


def of_features(result: Any) -> bool:
    return result.dim() == 3 and len(result) == 1 if hasattr(result, "dim") else isinstance(result[0][0], float)


FORMS: dict[str, Callable[[Any], bool]] = {
    "image-to-text": of_captions,
    "visual-question-answering": of_answers,
    "zero-shot-image-classification": of_labels,
    "image-feature-extraction": of_features,
}


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    image = Image.new("RGB", (30, 20), "red")
    file = io.BytesIO()
    image.save(file, "PNG")
    made: dict[tuple[str, ...], BlipPredictor] = {}

    def load_from_hub(name: str, **_: object) -> BlipPredictor:
        heads = HEADS[name]
        return made.setdefault(heads, make_predictor(*heads))  # type: ignore[arg-type]

    def download(request: urllib.request.Request, timeout: float | None) -> contextlib.closing[io.BytesIO]:
        assert request.full_url.startswith("https://huggingface.co/datasets/")
        return contextlib.closing(io.BytesIO(file.getvalue()))

    monkeypatch.setattr("openblip.predictor.pipeline.load", load_from_hub)
    monkeypatch.setattr(urllib.request, "urlopen", download)
    return {"pipeline": openblip.pipeline, "image": image}


@pytest.mark.parametrize("title", CALLS)
def test_documented_calls_have_documented_results(title: str, namespace: dict[str, Any]) -> None:
    has_form, code = FORMS[title.partition(" ")[0]], textwrap.dedent(CALLS[title])
    statements = ast.parse(code).body
    for statement in statements:
        source = ast.get_source_segment(code, statement) or ""
        if isinstance(statement, ast.Expr):
            result = eval(source, namespace)
            assert has_form(result), (source, result)
        else:
            exec(source, namespace)
    assert isinstance(statements[-1], ast.Expr)

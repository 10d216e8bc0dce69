"""A server with the API that the page calls, over the shipped models, in a thread of this process.

Questions and conversations are answered by rule, because no shipped model answers them.
"""

import base64
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

import openblip
from openblip.errors import OpenBlipError
from openblip.serve.capfilt import capfilt_router
from openblip.serve.page import page_router

CAPTIONER, FILTER, TALKER = "openblip-mini-captioner", "openblip-mini-filter", "vqa"


def image_of(uri: str) -> bytes:
    """The file in a data URI."""
    return base64.b64decode(uri.partition(",")[2])


def make_app(run: Path, key: str | None = None) -> FastAPI:
    """The app; the next `app.state.busy` calls are answered 429."""
    app = FastAPI()
    app.include_router(page_router())
    app.include_router(capfilt_router(run))
    app.state.calls, app.state.busy, app.state.results = {}, 0, []
    predictors = {name: openblip.load(name) for name in (CAPTIONER, FILTER)}

    @app.middleware("http")
    async def check(request: Request, handle: Any) -> Any:
        path = request.url.path
        app.state.calls[path] = app.state.calls.get(path, 0) + 1
        if (
            key
            and not path.startswith("/page.")
            and path != "/"
            and request.headers.get("authorization") != f"Bearer {key}"
        ):
            return JSONResponse({"error": {"type": "unauthorized", "message": "the key is wrong"}}, 401)
        if path == "/caption" and app.state.busy:
            app.state.busy -= 1
            return JSONResponse({"error": {"type": "busy", "message": "full"}}, 429, {"Retry-After": "0.1"})
        return await handle(request)

    @app.exception_handler(OpenBlipError)
    def refuse(_: Request, error: OpenBlipError) -> JSONResponse:
        return JSONResponse({"error": {"type": type(error).__name__, "message": str(error)}}, 422)

    @app.get("/models")
    def models() -> dict[str, Any]:
        served = [{"name": name, "tasks": sorted(each.tasks)} for name, each in predictors.items()]
        return {
            "models": [*served, {"name": TALKER, "tasks": ["answer", "chat"]}],
            "index": {"images": 3, "model": FILTER},
        }

    @app.post("/caption")
    def caption(body: dict[str, Any]) -> dict[str, Any]:
        settings = dict(body["decoding"])
        decoding = {"beam": openblip.Beam, "nucleus": openblip.Nucleus}[settings.pop("kind")](**settings)
        images = [image_of(uri) for uri in body["images"]]
        count = body["num_captions"]
        texts = predictors[body["model"]].caption(
            images, body.get("prompt"), decoding, num_captions=count, return_scores=True
        )
        rows = [[each] if count == 1 else each for each in texts]
        return {
            "model": body["model"],
            "captions": [[{"text": t.text, "logprob": t.logprob} for t in row] for row in rows],
        }

    @app.post("/match")
    def match(body: dict[str, Any]) -> dict[str, Any]:
        predictor, images = predictors[body["model"]], [image_of(uri) for uri in body["images"]]
        scores = predictor.match_matrix(images, body["texts"]), predictor.similarity(images, body["texts"])
        return {"match": scores[0].tolist(), "similarity": scores[1].tolist()}

    @app.post("/explain")
    def explain(body: dict[str, Any]) -> dict[str, Any]:
        found = predictors[body["model"]].explain(image_of(body["image"]), body["text"])
        heat = [each / each.max().clamp(min=1e-9) for each in found.heat]
        return {
            "text": found.text,
            "words": [{"word": w, "heat": h.tolist()} for w, h in zip(found.words, heat, strict=True)],
        }

    @app.post("/answer")
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        return {"answers": [{"text": f"<b>{question}</b>", "logprob": -0.1} for question in body["questions"]]}

    @app.post("/chat")
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        return {"answer": {"text": f"turn {len(body['turns'])}", "logprob": -1.0}}

    @app.post("/search")
    def search(body: dict[str, Any]) -> dict[str, Any]:
        rows = app.state.results
        if body.get("where"):
            raise openblip.errors.ConfigError(f"search: the condition {body['where']!r} cannot be used")
        return {"results": [{**row, "match": 0.93 if body.get("rerank") else None} for row in rows]}

    return app


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Run an app on a free port and yield its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join(10)

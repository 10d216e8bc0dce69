"""The page at `/`: three files without a build step, served with a policy under which a browser loads nothing else.

All addresses in them are relative, so that the page works behind a balancer that serves it below a path.
"""

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter, Request, Response

PAGE_FILES = {"": "index.html", "page.css": "page.css", "page.js": "page.js"}
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_router() -> APIRouter:
    """The routes of the page and its style and script."""
    router = APIRouter(include_in_schema=False)
    for address, name in PAGE_FILES.items():
        content = files(__name__).joinpath(name).read_bytes()
        router.add_api_route(f"/{address}", _endpoint(name, content), methods=["GET", "HEAD"])
    return router


def _endpoint(name: str, content: bytes) -> Callable[[Request], Awaitable[Response]]:
    """What answers with a file, or with nothing where the browser has it already."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "Content-Security-Policy": CONTENT_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # ask each time; the tag says that nothing has changed
        "ETag": tag,
    }

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=MEDIA_TYPES[name.rpartition(".")[2]])

    return answer

"""Images at URLs: what an allow-list lets through, and servers and names that mean harm."""

import asyncio
import socket
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason='needs pip install "openblip[serve]"')
from openblip.errors import ConfigError, ImageError
from openblip.serve.remote_images import ImageFetcher

ALLOWED = ["https://good.example/images/", "http://cdn.example:8080"]


def fetch(url: str, *prefixes: str, max_bytes: int = 1000, timeout: float = 60.0) -> bytes:
    async def run() -> bytes:
        fetcher = ImageFetcher(prefixes, max_bytes=max_bytes, timeout=timeout)
        try:
            return (await fetcher.fetch([url]))[0]
        finally:
            await fetcher.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    "url",
    [
        "https://good.example.evil.example/images/a.png",
        "https://good.example@evil.example/images/a.png",
        "https://good.example:443@evil.example/images/a.png",
        "https://user:word@good.example/images/a.png",
        "https://good.example\\@evil.example/images/a.png",
        "https://evil.example/https://good.example/images/a.png",
        "https://evil.example#@good.example/images/a.png",
        "https://good.example/imagesandmore/a.png",
        "https://good.example/images/../secret.png",
        "https://good.example/images/%2e%2e/secret.png",
        "https://good.example/images/..%2fsecret.png",
        "https://good.example/images/..%5csecret.png",
        "https://good.example:8443/images/a.png",
        "http://good.example/images/a.png",
        "https://good.example./images/a.png",
        "https://g\u043e\u043ed.example/images/a.png",
        "https://good.example/\r\nHost: evil.example/images/a.png",
        "http://cdn.example/a.png",
        "ftp://cdn.example:8080/a.png",
        "http://127.0.0.1:8080/a.png",
        "http:///a.png",
        "http://[::1/a.png",
        "http://cdn.example:99999/a.png",
        "",
    ],
)
def test_nothing_is_asked_outside_of_the_list(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(ImageFetcher, "_get", lambda self, url: asked.append(url))
    with pytest.raises(ImageError):
        fetch(url, *ALLOWED)
    assert asked == []
    with pytest.raises(ImageError, match="opens no URL"):
        fetch("https://good.example/images/a.png")  # without a list


@pytest.mark.parametrize(
    "prefix",
    ["good.example/", "file:///etc", "https://", "https://a.example/?x", "https://u@a.example/", "https://a b/"],
)
def test_what_is_no_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="--allow-image-url"):
        ImageFetcher([prefix], max_bytes=1, timeout=1)


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"], ["10.1.2.3"], ["172.16.0.1"], ["192.168.0.1"], ["169.254.169.254"], ["100.64.0.1"], ["0.0.0.0"],
        ["224.0.0.1"], ["255.255.255.255"], ["::1"], ["fe80::1%lo"], ["fd00::1"], ["fec0::1"], ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"], ["2002:7f00:1::"], ["::"], ["93.184.215.14", "10.0.0.1"],
    ],
)  # fmt: skip
def test_a_public_name_does_not_lead_into_the_own_network(addresses: list[str], names: dict[str, list[str]]) -> None:
    names["good.example"] = addresses
    with pytest.raises(ImageError, match="private network"):
        fetch("https://good.example/images/a.png", *ALLOWED)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names resolve to; one that was asked for has other addresses afterwards."""
    known: dict[str, list[str]] = {}

    async def resolve(self: Any, host: str, port: int, **options: Any) -> list[Any]:
        found = known.pop(host)
        return [
            (socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
            for each in found
        ]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    return known


class Host:
    """An HTTP server on this machine, with raw replies for its paths; `{port}` in them is its own."""

    def __init__(self) -> None:
        self.replies: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.port = 0

    def reply(self, path: str, status: int, body: bytes = b"", **headers: str) -> None:
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.replies[path] = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path, host = head.split()[1], head.lower().partition("host: ")[2].split()[0]
        self.asked.append((path, host))
        writer.write(self.replies[path].replace(b"{port}", str(self.port).encode()))
        await writer.drain()
        if path.startswith("/endless"):
            while not writer.is_closing():
                writer.write(b"400\r\n" + b"x" * 0x400 + b"\r\n")
                await writer.drain()
        elif path.startswith("/slow"):
            await reader.read()  # until the client has had enough
        writer.close()

    def fetch(self, path: str, *prefixes: str, host: str = "127.0.0.1", **limits: Any) -> bytes:
        async def run() -> bytes:
            async with await asyncio.start_server(self, "127.0.0.1", 0) as server:
                self.port = server.sockets[0].getsockname()[1]
                given = [
                    prefix.replace("{port}", str(self.port)) for prefix in prefixes or ("http://127.0.0.1:{port}",)
                ]
                fetcher = ImageFetcher(given, **{"max_bytes": 5000, "timeout": 60.0, **limits})
                try:
                    return (await fetcher.fetch([f"http://{host}:{self.port}{path}"]))[0]
                finally:
                    await fetcher.close()

        return asyncio.run(run())


@pytest.fixture
def host() -> Host:
    return Host()


def test_a_file_comes_also_by_redirects_within_the_list(host: Host) -> None:
    host.reply("/a", 200, b"image")
    host.reply("/b", 302, Location="/c")
    host.reply("/c", 307, Location="http://127.0.0.1:{port}/a")
    assert host.fetch("/b") == b"image"
    assert [path for path, _ in host.asked] == ["/b", "/c", "/a"]


@pytest.mark.parametrize(
    "target", ["http://localhost:{port}/a", "//localhost:{port}/a", "/other/a", "file:///etc/passwd"]
)
def test_a_redirect_out_of_the_list_is_not_followed(host: Host, target: str) -> None:
    host.reply("/images/b", 302, Location=target)
    with pytest.raises(ImageError, match=r"URLs below|only http"):
        host.fetch("/images/b", "http://127.0.0.1:{port}/images")
    assert [path for path, _ in host.asked] == ["/images/b"]


def test_replies_that_mean_harm(host: Host) -> None:
    host.reply("/loop", 302, Location="/loop")
    host.reply("/bomb", 200, b"x", Content_Encoding="gzip")
    host.reply("/none", 404)
    host.reply("/lies", 200, b"x" * 6000)
    host.replies["/endless"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    host.replies["/slow"] = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx"
    host.replies["/slower"] = b"HTTP/1.1 200 OK\r\n"
    reasons = {
        "/loop": "more than 5",
        "/bomb": "compressed",
        "/none": "404",
        "/endless": "5,000 bytes",
        "/lies": "bytes",
    }
    for path, reason in reasons.items():
        with pytest.raises(ImageError, match=reason):
            host.fetch(path)
    for path in ("/slow", "/slower"):
        with pytest.raises(ImageError, match=r"within 0\.3 seconds"):
            host.fetch(path, timeout=0.3)


def test_a_local_name_is_resolved_once_for_a_connection(host: Host, names: dict[str, list[str]]) -> None:
    host.reply("/a", 200, b"image")
    names |= {"127.0.0.1": ["127.0.0.1"], "images.internal": ["127.0.0.1"]}
    assert host.fetch("/a", "http://images.internal:{port}", host="images.internal") == b"image"
    assert host.asked == [("/a", f"images.internal:{host.port}")]

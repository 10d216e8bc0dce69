"""No request is a server error: what the schema allows, what it forbids, and bodies made to hurt get a reply below 500.

Method: schemathesis makes requests of every operation of the server's own OpenAPI schema, in part against it; every
other image is a real one, so that the rest of the body comes as far as the model. Bodies that no schema thinks of
follow: JSON that nests deep or is none, numbers out of all range, halves of surrogates, damaged uploads, many images,
images made to hurt (those of `benchmarks.fuzz`), and bytes that are no HTTP. A violation is a status from 500 on, or no
reply. 503 of a full queue cannot occur, since requests follow each other.

`fuzz_server` is asked a little by the test suite, and longer by `benchmarks.serve_faults`.
"""

import base64
import contextlib
import json
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation.modes import GenerationMode

from benchmarks.fuzz import good_image, hostile_caption, hostile_image

CALLS = ("caption", "answer", "match", "embed", "explain", "chat", "search")
JSON = {"Content-Type": "application/json"}
SLOWEST = 150.0  # seconds until a request that has no reply is a violation


class HostileRequest(NamedTuple):
    name: str
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class ServerTally:
    """What came of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        return self.statuses.total()

    def note(self, name: str, status: int, reply: str) -> None:
        """A reply; status 0 says that there was none."""
        self.statuses[status] += 1
        if status == 0 or status >= 500:
            self.violations.append(f"{name}: {status} {reply[:300]}")


def fuzz_server(
    url: str, model: str, *, examples: int, hostile: int, number: int = 0, headers: Mapping[str, str] | None = None
) -> ServerTally:
    """So many requests that schemathesis makes for each operation, and so many that are made to hurt.

    model: a served one. number: the seed. headers: of every request, such as a key.
    """
    tally, session, random = ServerTally(), requests.Session(), Random(number)
    session.headers.update(headers or {})
    image = data_uri(good_image(random, "PNG"))
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=dict(headers or {}), wait_for_schema=60)
    for each in schema.get_all_operations():
        operation = each.ok()

        def ask(case: Any) -> None:
            if len(repr(case.body)) % 2:
                case.body = with_values(case.body, {"image": image, "images": image, "url": image, "model": model})
            name = f"{case.method} {case.formatted_path} {case.body!r:.300}"
            try:
                reply = case.call(session=session, timeout=SLOWEST)
            except requests.RequestException as error:
                tally.note(name, 0, repr(error))
            else:
                tally.note(name, reply.status_code, reply.text)

        for mode in GenerationMode:
            strategy = operation.as_strategy(generation_mode=mode)
            limits = settings(
                max_examples=-(-examples // len(GenerationMode)), deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet,
            )  # fmt: skip
            with contextlib.suppress(Unsatisfiable):  # nothing is wrong with a request that has no parameters
                seed(number)(limits(given(case=strategy)(ask)))()
    for request in hostile_requests(random, model, hostile):
        try:
            answered = session.request(
                request.method, url + request.path, data=request.body, headers=dict(request.headers), timeout=SLOWEST
            )
        except requests.RequestException as error:
            tally.note(request.name, 0, repr(error))
        else:
            tally.note(request.name, answered.status_code, answered.text)
    for name, content in no_http(random):
        tally.note(name, *raw_reply(url, content))
    return tally


def with_values(body: Any, values: Mapping[str, Any]) -> Any:
    """A body in which the fields of these names, however deep, have these values."""
    if isinstance(body, list):
        return [with_values(each, values) for each in body]
    if not isinstance(body, dict):
        return body
    return {name: values[name] if name in values else with_values(each, values) for name, each in body.items()}


def data_uri(image: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(image).decode()}"


# Requests that are made to hurt.


def hostile_requests(random: Random, model: str, count: int) -> Iterator[HostileRequest]:
    """So many, of all kinds in turn."""
    makers = [hostile_json_body, hostile_field, hostile_picture, hostile_decoding, hostile_upload, hostile_address]
    for number in range(count):
        yield makers[number % len(makers)](random, model)


def good_body(random: Random, path: str, model: str) -> dict[str, Any]:
    """A body that is right."""
    image, texts = data_uri(good_image(random, "PNG")), ["a dog", "a red ball"]
    bodies: dict[str, dict[str, Any]] = {
        "/caption": {"images": image, "prompt": "a"},
        "/answer": {"images": image, "questions": "what is it?"},
        "/match": {"images": [image], "texts": texts},
        "/embed": {"images": image, "texts": texts},
        "/explain": {"image": image, "text": "a dog"},
        "/chat": {"images": image, "turns": [["what is it?", "a dog"], "where?"]},
        "/search": {"text": "a dog", "top": 2},
        "/v1/embeddings": {"model": model, "input": [*texts, image]},
        "/v1/chat/completions": {
            "model": model,
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}],
        },
    }
    return bodies[path]


def any_path(random: Random) -> str:
    return random.choice([*(f"/{call}" for call in CALLS), "/v1/embeddings", "/v1/chat/completions"])


def hostile_json_body(random: Random, model: str) -> HostileRequest:
    """JSON that is none, or that no program expects."""
    path = any_path(random)
    good = json.dumps(good_body(random, path, model)).encode()
    makers: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: b"null",
        lambda: b"[]",
        lambda: b'"images"',
        lambda: b"NaN",
        lambda: b"1e999",
        lambda: b"9" * 5000,
        lambda: b"[" * 200_000,
        lambda: b'{"a":' * 200_000,
        lambda: b"[" * 200_000 + b"]" * 200_000,
        lambda: b'{"images":' + b"[" * 3000 + b"]" * 3000 + b"}",
        lambda: good[: random.randrange(len(good))],
        lambda: good + good,
        lambda: good.decode().encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + good,
        lambda: b"\x1f\x8b" + zlib.compress(good),
        lambda: good.replace(b"a dog", b"\xff\xfe\x80"),
        lambda: good.replace(b"a dog", b"\\ud800"),
        lambda: good.replace(b"a dog", b"\\udc00\\ud800 \\u0000"),
        lambda: good.replace(b'"a dog"', b"NaN"),
        lambda: good.replace(b'"a dog"', b"-Infinity"),
        lambda: good.replace(b"{", b'{"images": 1, ', 1),
        lambda: good.replace(b'"', b"'"),
        lambda: b"{" + b",".join(b'"a%d":1' % number for number in range(100_000)) + b"}",
    ]
    which = random.randrange(len(makers))
    types = ["application/json"] * 4 + [
        "application/json; charset=utf-16",
        "text/json",
        "",
        "multipart/form-data",
        "*/*",
    ]
    return HostileRequest(
        f"JSON {which} of {path}", "POST", path, {"Content-Type": random.choice(types)}, makers[which]()
    )


def hostile_field(random: Random, model: str) -> HostileRequest:
    """A field of a right body that has a value made to hurt."""
    path = any_path(random)
    body = good_body(random, path, model)
    names = [*body, "model", "decoding", "num_captions", "candidates", "prompt", "where", "top", "rerank", "n", "seed"]
    names += ["stop", "stream", "stream_options", "dimensions", "encoding_format", "max_tokens", "temperature", "top_p"]
    name = random.choice(names)
    numbers = [0, -1, 2**31, 2**63, 10**400, 1e308, 1e-308, float("nan"), float("inf"), True]
    value = random.choice(numbers) if random.random() < 0.4 else hostile_caption(random)
    if random.random() < 0.3:
        value = random.choice([[value], [value] * 300, [[value]], {"kind": value}, [[value, value]]])
    body[name] = value
    return HostileRequest(f"{name}={value!r:.80} of {path}", "POST", path, JSON, json.dumps(body).encode())


def hostile_picture(random: Random, model: str) -> HostileRequest:
    """An image that is none, is damaged, or is a bomb, alone or among many."""
    path = random.choice([path for call in CALLS if (path := f"/{call}") != "/search"])
    body = good_body(random, path, model)
    file = hostile_image(random, good_image(random, random.choice(["PNG", "JPEG", "GIF", "WEBP", "TIFF"])))
    makers: list[Callable[[], Any]] = [
        lambda: data_uri(file),
        lambda: data_uri(
            file, random.choice(["image/jpeg", "text/html", "", "application/octet-stream", "image/" * 99])
        ),
        lambda: data_uri(file)[:-1] + random.choice(["", "=", "*", "\n", "\ud800"]),
        lambda: "data:image/png," + random.choice(["", "%", "%zz", "%00" * 1000, "\N{SNOWMAN}"]),
        lambda: "data:" + ";" * 100_000 + ",",
        lambda: random.choice(
            ["file:///etc/passwd", "http://169.254.169.254/", "HTTPS://[::1", "http://" + "a" * 9999]
        ),
        lambda: [data_uri(file)] * random.choice([0, 2, 17, 2000]),
        lambda: [body["image" if path == "/explain" else "images"], data_uri(file)],
    ]
    which = random.randrange(len(makers))
    body["image" if path == "/explain" else "images"] = makers[which]()
    return HostileRequest(f"image {which} of {path}, {file[:24]!r}", "POST", path, JSON, json.dumps(body).encode())


def hostile_decoding(random: Random, model: str) -> HostileRequest:
    """A way of writing whose settings are at the ends of what is allowed, or beyond."""
    path = random.choice(["/caption", "/answer", "/chat"])
    kinds = {
        "greedy": ["max_new_tokens", "min_new_tokens", "repetition_penalty"],
        "beam": ["num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "repetition_penalty"],
        "nucleus": ["top_p", "temperature", "max_new_tokens", "min_new_tokens", "repetition_penalty", "seed"],
    }
    kind = random.choice(list(kinds))
    values = [0, -1, 1, 2, 16, 17, 512, 513, 2**31, 2**63, 2**64, 10**30, 0.0, 1e-45, 1e-300, 1e300, -1e300, 0.5, None]
    values += [float("nan"), float("inf"), "1", True, []]
    settings = {name: random.choice(values) for name in random.sample(kinds[kind], random.randint(1, 2))}
    body = good_body(random, path, model) | {"decoding": {"kind": kind, **settings}}
    if path == "/caption" and random.random() < 0.3:
        body["num_captions"] = random.choice([2, 16, 17, 2**63])
    return HostileRequest(f"{body['decoding']} of {path}", "POST", path, JSON, json.dumps(body).encode())


def hostile_upload(random: Random, model: str) -> HostileRequest:
    """A multipart body that is damaged, or has parts that nobody asked for."""
    path = any_path(random)
    image = good_image(random, "PNG")

    def part(name: str, content: bytes, more: str = '; filename="a.png"') -> bytes:
        return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"

    end, field = b"--b--\r\n", "image" if path in ("/explain", "/search") else "images"
    bodies = [
        b"", end, b"--b", b"--c\r\n", part(field, image), part(field, image)[:-20] + end,
        part(field, image) * 100 + end, part(field, b"") + end, part(field, image, "") + end, part("", image) + end,
        part(field, image) + part("request", b"[" * 100_000, "") + end,
        part(field, image) + part("request", b"[]", "") + end, part("request", b"{}") + end,
        part(field, image) + part("request", b"\xff\xfe", "") + end,
        part(field, image) + part("request", b'{"texts": "\\ud800"}', "") + end,
        part(field, image) + part("request", b"{}", "") * 20 + end, part("x" * 100_000, b"x") + end,
        part(field, image, '; filename="\x00../../etc/passwd"') + end,
        part(field, image, "; filename*=utf-8''%ff") + end,
        b"--b\r\n\r\n" + image + b"\r\n" + end, b"--b\r\nContent-Disposition: form-data\r\n\r\n\r\n" + end,
        b"--b\r\n" + b"X: y\r\n" * 50_000 + b"\r\n" + end, b"\r\n" * 100_000 + part(field, image) + end,
    ]  # fmt: skip
    which = random.randrange(len(bodies))
    types = ["multipart/form-data; boundary=b"] * 5 + [
        "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "b" * 5000,
        "multipart/form-data; boundary=b; charset=utf-16", "multipart/form-data; boundary=b; charset=none",
    ]  # fmt: skip
    return HostileRequest(
        f"upload {which} to {path}", "POST", path, {"Content-Type": random.choice(types)}, bodies[which]
    )


def hostile_address(random: Random, model: str) -> HostileRequest:
    """A path, a method or a header that there is not."""
    path = random.choice([
        "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/" + "a" * 5000, "/..%2f..%2fetc/passwd", "/%00", "/caption/",
        "/page.css%00", "/models?%ff=%ff", "/metrics?" + "a&" * 5000, "/capfilt/%2e%2e", "/openapi.json/", "//",
        "/caption", "/ready", "/v1/chat/completions",
    ])  # fmt: skip
    method = random.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "PATCH"])
    headers = random.choice([
        {}, {"Authorization": "Bearer " + "\xff" * 40}, {"Authorization": "Basic"}, {"X-Api-Key": "a" * 8000},
        {"Range": "bytes=-1--1"}, {"Accept": "\xff"}, {"Cookie": "a=" * 2000}, {"Host": "\xff"},
        {"Content-Encoding": "gzip"}, {"Expect": "100-continue"}, {"Content-Type": "\xff; \xff=\xff"},
    ])  # fmt: skip
    body = random.choice([b"", b"{}", b"\x00" * 10])
    return HostileRequest(f"{method} {path[:60]} {headers}", method, path, headers, body)


def no_http(random: Random) -> list[tuple[str, bytes]]:
    """What is no request, or not all of one."""
    post = b"POST /caption HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return [
        ("random bytes", random.randbytes(500) + b"\r\n\r\n"),
        ("a handshake of TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(100)),
        ("another protocol", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("a negative length", post + b"Content-Length: -1\r\n\r\n{}"),
        ("two lengths", post + b"Content-Length: 2\r\nContent-Length: 7\r\n\r\n{}"),
        ("a huge length", post + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}"),
        ("a damaged chunk", post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
        ("a length and chunks", post + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
        ("a header of a megabyte", post + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n"),
        ("a socket of the web", post.replace(b"POST", b"GET") + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n"),
    ]


def raw_reply(url: str, content: bytes) -> tuple[int, str]:
    """The status and the reply to these bytes. A server may close the connection of what is no HTTP: that is 400."""
    address = urlsplit(url)
    received = b""
    try:
        with socket.create_connection((address.hostname or "", address.port or 80), timeout=5) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and (more := connection.recv(65536)):
                received += more
    except OSError as error:
        if not received:
            return (0 if isinstance(error, TimeoutError) else 400), repr(error)
    status = received.split(b" ", 2)[1:2]
    return int(status[0]) if status and status[0].isdigit() else 400, received.decode("latin-1")

"""`openblip demo --page` and its page in a real browser; the screenshots of the docs are made here.

pytest tests/serve/test_page.py --page-screenshots docs/images
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel

from openblip.capfilt.labels import read_labels
from openblip.serve.schema import (
    AnswerBody,
    AnswerReply,
    ChatBody,
    ChatReply,
    ErrorDetail,
    ErrorReply,
    ModelsReply,
    SearchReply,
    WrittenText,
)  # fmt: skip

for package in ("ray.serve", "lancedb"):
    pytest.importorskip(package, reason='needs pip install "openblip[serve,search]"')
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = playwright.expect
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # Ray and two models on a busy machine
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
NUM_SAMPLES = 24
MINUTE = 60_000  # milliseconds
expect.set_options(timeout=MINUTE)
CAPTIONER, FILTER = "openblip-mini-captioner", "openblip-mini-filter"

CONTRAST = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((value, i) => value * a + under[i] * (1 - a));
  const ground = (element) => {
    const layers = [];
    for (let each = element; each; each = each.parentElement) {
      layers.push(numbers(getComputedStyle(each).backgroundColor));
    }
    return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
  };
  const luminance = (rgb) => rgb.map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility({ visibilityProperty: true }) || element.matches("option, .skip")) continue;
    const style = getComputedStyle(element), name = element.tagName + "#" + element.id + "." + element.className;
    const isField = element.matches("input:not([type=checkbox]), select, textarea");
    if ([...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || isField) {
      const size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
      const under = ground(element);
      found.push([name, ratio(over(numbers(style.color), under), under), large ? 3 : 4.5]);
      if (element.placeholder) {
        const color = numbers(getComputedStyle(element, "::placeholder").color);
        found.push([name + "::placeholder", ratio(over(color, under), under), 4.5]);
      }
    }
    if (isField) {
      const border = numbers(style.borderTopColor).slice(0, 3);
      found.push([name + " border", ratio(border, ground(element.parentElement)), 3]);
    }
  }
  return found;
}"""


@dataclass
class Demo:
    """A demo that serves its page, the folder that it was started in, and images of its source."""

    process: subprocess.Popen[str]
    folder: Path
    address: str
    scenes: list[Path]

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)


@pytest.fixture(scope="module")
def screenshots(request: pytest.FixtureRequest) -> Path | None:
    chosen = request.config.getoption("--page-screenshots", default=None)
    if chosen:
        Path(chosen).mkdir(parents=True, exist_ok=True)
    return Path(chosen) if chosen else None


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, screenshots: Path | None) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("page")
    num_samples = str(NUM_SAMPLES if screenshots is None else 240)
    words = ["demo", "--page", "--num-samples", num_samples, "--num-workers", "1", "--device", "cpu", "--out", "demo"]
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, "-m", "openblip", *words]
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = ""
        while "serving at " not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        with tarfile.open(min((folder / "demo" / "web").glob("*.tar"))) as archive:
            archive.extractall(folder / "scenes", filter="data")
        scenes = sorted(path for path in (folder / "scenes").iterdir() if path.suffix not in (".txt", ".json"))
        yield Demo(process, folder, line.split()[-1] + "/", scenes)
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=MINUTE
        )
        yield browser
        browser.close()


class Tab:
    """A page of the browser that notes errors, refused loads and requests to other places."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.address = address
        self.context = browser.new_context(**{"viewport": {"width": 1240, "height": 1400}, **context})
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: self.problems.append(line.text) if line.type == "error" else None)
        self.page.on("request", self._note)
        self.page.set_default_timeout(MINUTE)

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.problems.append(f"request to {request.url}")

    def open(self) -> Any:
        self.page.goto(self.address)
        return self.page

    def answer_by_rule(self) -> None:
        """Serve a model for questions and conversations, too; none of those that are shipped has both."""

        def with_talker(route: Any) -> None:
            reply = route.fetch()
            served = ModelsReply.model_validate(reply.json())
            talker = served.models[0].model_copy(update={"name": "talker", "tasks": ["answer", "chat"]})
            served.models.append(talker)
            route.fulfill(response=reply, body=served.model_dump_json())

        def answer(route: Any) -> None:
            body = AnswerBody.model_validate_json(route.request.post_data)
            answers = [WrittenText(text=f"<b>{question}</b>", logprob=-0.1) for question in body.questions]
            fulfill(route, AnswerReply(model="talker", answers=answers))

        def chat(route: Any) -> None:
            body = ChatBody.model_validate_json(route.request.post_data)
            fulfill(route, ChatReply(model="talker", answer=WrittenText(text=f"turn {len(body.turns)}", logprob=-1.0)))

        self.page.route("**/models", with_talker)
        self.page.route("**/answer", answer)
        self.page.route("**/chat", chat)

    def shot(self, directory: Path | None, name: str, last: Any = None) -> None:
        """Keep what the page shows, down to its last element, as a light image of the docs."""
        if directory is None:
            return
        clip = None
        if last is not None:
            box = last.bounding_box()
            clip = {"x": 0, "y": 0, "width": self.page.viewport_size["width"], "height": box["y"] + box["height"] + 16}
        with Image.open(io.BytesIO(self.page.screenshot(clip=clip))) as image:
            image.convert("RGB").save(directory / f"{name}.webp", quality=78, method=6)


def fulfill(route: Any, reply: BaseModel, status: int = 200, **headers: str) -> None:
    """Answer a call of the page in the server's place."""
    route.fulfill(status=status, body=reply.model_dump_json(), headers={"Content-Type": "application/json", **headers})


def refusal(kind: str) -> ErrorReply:
    return ErrorReply(error=ErrorDetail(type=kind, message=kind))


@pytest.fixture
def tab(browser: Any, demo: Demo) -> Iterator[Tab]:
    tab = Tab(browser, demo.address)
    yield tab
    assert tab.problems == []
    tab.context.close()


def heat_of(tab: Tab) -> int:
    """The number of pixels of the heat map that are drawn."""
    return int(
        tab.page.evaluate(
            """() => {
              const { width, height } = find("heat");
              const pixels = find("heat").getContext("2d").getImageData(0, 0, width, height).data;
              return pixels.filter((value, i) => i % 4 === 3 && value > 8).length;
            }"""
        )
    )


def test_the_demo_serves_its_run_and_an_index(demo: Demo) -> None:
    assert len(demo.ask("capfilt/images", None)["images"]) == NUM_SAMPLES
    assert len(demo.ask("search", {"text": "a dog", "top": 3})["results"]) == 3
    assert {"report.html", "results.json"} <= {path.name for path in (demo.folder / "demo").iterdir()}


def test_images_are_captioned_and_words_show_where_the_model_looks(
    demo: Demo, tab: Tab, screenshots: Path | None
) -> None:
    refusals = [1, 2]

    def busy_at_first(route: Any) -> None:
        if refusals:
            refusals.pop()
            fulfill(route, refusal("busy"), 429, **{"Retry-After": "0.1"})
        else:
            route.continue_()

    tab.page.route("**/caption", busy_at_first)
    page = tab.open()
    page.set_input_files("#files", demo.scenes[:3])
    lines = page.locator("#captions .line")
    lines.first.wait_for()
    uri = "data:image/png;base64," + base64.b64encode(demo.scenes[0].read_bytes()).decode()
    body = {"images": uri, "num_captions": 3, "decoding": {"kind": "beam", "num_beams": 3}}
    expected = [each["text"] for each in demo.ask("caption", body)["captions"]]
    assert lines.all_text_contents() == expected
    page.locator("#captions .facts", has_text="match").first.wait_for()  # the filter scores what the captioner wrote
    assert page.locator("#strip button").count() == 3
    assert page.locator("#image").get_attribute("alt") == expected[0]

    assert heat_of(tab) == 0
    words = lines.first.locator(".word")
    words.nth(1).hover()
    page.locator("#looking", has_text="the model looks").wait_for()
    assert heat_of(tab) > 100
    page.fill("#match-texts", f"{expected[0]}\na red fire truck\na dog to the left of a red apple")
    page.click("#match-form button")
    page.locator("#matches li").nth(2).wait_for()
    assert page.locator("#matches .line").first.text_content() == expected[0]
    texts = words.all_text_contents()
    words.nth(max((i + 1 for i, text in enumerate(texts[:-1]) if text in ("small", "big")), default=0)).hover()
    page.locator("#looking", has_text="the model looks").wait_for()
    tab.shot(screenshots, "page", page.locator("#match-panel"))
    page.mouse.move(5, 5)
    assert heat_of(tab) == 0
    page.fill("#match-texts", "<img src=x onerror=alert(1)>")
    page.click("#match-form button")
    page.locator("#matches li").nth(2).wait_for(state="detached")
    assert page.locator("#matches .line").text_content() == "<img src=x onerror=alert(1)>"

    page.locator("#strip button").nth(1).click()  # its captions were written meanwhile, its texts are its own
    lines.first.wait_for()
    assert page.locator("#matches li").count() == 0
    page.click("#remove")
    assert page.locator("#strip button").count() == 2
    tab.problems[:] = [problem for problem in tab.problems if "429" not in problem]


def test_an_image_that_comes_before_the_list_of_models_is_captioned(
    demo: Demo, tab: Tab, screenshots: Path | None
) -> None:
    held: list[Any] = []
    tab.page.route("**/models", lambda route: held.append(route))  # a busy server answers when an image was chosen
    page = tab.open()
    page.emulate_media(color_scheme="dark")
    page.set_input_files("#files", demo.scenes[1:4])
    page.locator("#captions", has_text="writing").wait_for()
    held[0].continue_()
    page.locator("#captions .facts", has_text="match").first.wait_for()
    page.locator("#captions .line").first.locator(".word").last.hover()
    page.locator("#looking", has_text="the model looks").wait_for()
    tab.shot(screenshots, "page-dark", page.locator("#match-panel"))


def test_questions_and_conversations(demo: Demo, tab: Tab) -> None:
    tab.answer_by_rule()
    page = tab.open()
    page.set_input_files("#files", demo.scenes[:1])
    page.fill("#question", "what is this?")
    page.press("#question", "Enter")
    page.locator("#answers .said").wait_for()
    assert "<b>what is this?</b>" in (page.locator("#answers .said").text_content() or "")  # as text
    for number, message in enumerate(("hello", "and now?"), 1):
        page.fill("#message", message)
        page.press("#message", "Enter")
        page.locator("#turns .said", has_text=f"turn {number}").wait_for()
    assert page.locator("#turns .asked").all_text_contents() == ["hello", "and now?"]


def test_pasted_and_dropped_images_and_files_that_are_none(demo: Demo, tab: Tab, tmp_path: Path) -> None:
    page = tab.open()
    encoded = base64.b64encode(demo.scenes[0].read_bytes()).decode()
    for kind, holder in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.evaluate(
            """([kind, holder, encoded]) => {
              const transfer = new DataTransfer();
              const bytes = Uint8Array.from(atob(encoded), (char) => char.charCodeAt(0));
              transfer.items.add(new File([bytes], kind + ".png", { type: "image/png" }));
              const kinds = { paste: ClipboardEvent, drop: DragEvent };
              const event = new kinds[kind](kind, { [holder]: transfer, bubbles: true, cancelable: true });
              document.body.dispatchEvent(event);
            }""",
            [kind, holder, encoded],
        )
        page.locator("#image-name", has_text=kind).wait_for()
    assert page.locator("#strip button").count() == 2
    page.locator("#captions .line").first.wait_for()
    (tmp_path / "notes.txt").write_text("no image")
    page.set_input_files("#files", tmp_path / "notes.txt")
    page.locator("#captions", has_text="known format").wait_for()  # the reason that the server gives
    tab.problems[:] = [problem for problem in tab.problems if "422" not in problem]  # the browser logs refused calls


def test_search_by_text_and_by_image(tab: Tab, screenshots: Path | None) -> None:
    page = tab.open()
    page.click("#tab-search")
    page.fill("#search-text", "a dog on a blue background")
    page.press("#search-text", "Enter")
    results = page.locator("#results li")
    results.nth(NUM_SAMPLES - 1).wait_for()
    assert re.search(r"match (< )?[\d.]+ % · similarity -?\d\.\d{3}", results.first.text_content() or "")
    tab.shot(screenshots, "page-search", results.nth(9))
    results.nth(2).get_by_text("Find similar").click()
    page.locator("#search-image").wait_for()
    assert page.input_value("#search-text") == ""
    expect(results.first).not_to_contain_text("match")
    page.fill("#where", "nonsense")
    page.click("#search-form .primary")
    page.locator("#alert", has_text="nonsense").wait_for()
    tab.problems[:] = [problem for problem in tab.problems if "422" not in problem]

    def with_markup(route: Any) -> None:
        reply = route.fetch()
        found = SearchReply.model_validate(reply.json())
        found.results[0].caption = "<script>alert(1)</script>"
        route.fulfill(response=reply, body=found.model_dump_json())

    page.route("**/search", with_markup)
    page.fill("#where", "width > 10")
    page.click("#search-form .primary")
    results.first.get_by_text("<script>alert(1)</script>").wait_for()  # as text
    results.nth(1).get_by_text("Look at it").click()
    page.locator("#captions .line").first.wait_for()


def test_a_capfilt_run_is_browsed_and_labelled(demo: Demo, tab: Tab, screenshots: Path | None) -> None:
    page, run = tab.open(), demo.folder / "demo" / "capfilt"
    page.click("#tab-capfilt")
    cards = page.locator("#cards li")
    cards.nth(NUM_SAMPLES - 1).wait_for()
    assert cards.locator("img").count() == NUM_SAMPLES
    page.evaluate("find('run').lastChild.textContent = 'demo/web · itm > 0.5'")  # not where this test has it
    tab.shot(screenshots, "page-capfilt", cards.nth(4))
    page.select_option("#show", "only synthetic")
    page.click("#browse-form button")
    page.locator("#browse-form:not([aria-busy])").wait_for()
    for card in range(cards.count()):
        verdicts = cards.nth(card).locator(".verdict b").all_text_contents()
        assert ["kept" in verdict for verdict in verdicts] == [False, True]

    page.click("#label-mode")
    page.fill("#num-texts", "10")
    page.click("#sample-form button")
    page.locator("#place", has_text="Text 1 of 10, 0 answered").wait_for()
    for key, count in (("y", 1), ("n", 2), ("u", 3)):
        page.keyboard.press(key)
        page.locator("#place", has_text=f"Text {count + 1} of 10, {count} answered").wait_for()
    tab.shot(screenshots, "page-labels", page.locator("#asking"))
    page.keyboard.press("ArrowLeft")
    page.locator("#unsure[aria-pressed=true]").wait_for()
    page.keyboard.press("u")  # takes it back
    page.locator("#place", has_text="Text 3 of 10, 2 answered").wait_for()
    file = run / "labels" / "itm-10-0.jsonl"
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_text().count("\n") < 4:  # the page does not wait for the server
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shown = file.relative_to(demo.folder)
    assert page.locator("#calibrate").text_content() == f"openblip capfilt-calibrate demo/capfilt {shown}"
    assert [label.is_true for label in read_labels(file)] == [True, False, None]
    page.reload()  # the answers are the server's
    page.click("#label-mode")
    page.fill("#num-texts", "10")
    page.click("#sample-form button")
    page.locator("#place", has_text="Text 3 of 10, 2 answered").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(browser: Any, demo: Demo, scheme: str) -> None:
    tab = Tab(browser, demo.address, color_scheme=scheme)
    tab.answer_by_rule()
    page = tab.open()
    page.set_input_files("#files", demo.scenes[:1])
    page.locator("#captions .facts", has_text="match").first.wait_for()
    page.fill("#question", "what?")
    page.press("#question", "Enter")
    page.locator("#answers .said").wait_for()
    page.evaluate("alertUser('something went wrong')")
    pairs = page.evaluate(CONTRAST)
    page.click("#tab-search")
    pairs += page.evaluate(CONTRAST)
    page.click("#tab-capfilt")
    page.locator("#cards li").first.wait_for()
    pairs += page.evaluate(CONTRAST)
    page.click("#label-mode")
    page.locator("#asking").wait_for()
    pairs += page.evaluate(CONTRAST)
    page.click("#yes")
    page.keyboard.press("ArrowLeft")
    page.locator("#yes[aria-pressed=true]").wait_for()
    pairs += page.evaluate(CONTRAST)
    assert len(pairs) > 150
    assert [pair for pair in pairs if pair[1] < pair[2]] == []
    tab.context.close()


def test_a_phone(browser: Any, demo: Demo, screenshots: Path | None) -> None:
    """390 pixels as most have, and 360 as the narrowest; in the dark."""
    settings = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2, "color_scheme": "dark"}
    tab = Tab(browser, demo.address, viewport={"width": 390, "height": 844}, **settings)
    page = tab.open()

    def assert_fits() -> None:
        for width in (390, 360):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width

    assert_fits()
    page.set_input_files("#files", demo.scenes[:2])
    page.locator("#captions .facts", has_text="match").first.wait_for()
    assert_fits()
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#captions .line").nth(1).locator(".word").last.tap()
    page.locator("#looking", has_text="the model looks").wait_for()
    assert heat_of(tab) > 100
    viewer, captions = page.locator(".viewer").bounding_box(), page.locator("#captions").bounding_box()
    page.mouse.wheel(0, captions["y"] - viewer["y"] - viewer["height"] - 12)  # they stand below the image
    page.wait_for_timeout(500 if screenshots else 0)
    tab.shot(screenshots, "page-phone")
    for name in ("search", "capfilt"):
        page.tap(f"#tab-{name}")
        page.locator(f"#{name}").wait_for()
        assert_fits()
    assert tab.problems == []
    tab.context.close()


def test_everything_works_with_the_keyboard(demo: Demo, tab: Tab) -> None:
    tab.answer_by_rule()
    page = tab.open()
    page.set_input_files("#files", demo.scenes[:1])
    page.locator("#captions .facts", has_text="match").first.wait_for()
    reached: set[str] = set()
    page.keyboard.press("Tab")
    for _ in range(60):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
        page.keyboard.press("Tab")
    assert reached >= {"tab-look", "pick", "remove", "decoding", "num-captions", "prompt", "match-texts", "question"}
    assert reached >= {"word current", "message"}
    page.locator("#captions .word").first.focus()
    page.locator("#looking", has_text="the model looks").wait_for()
    first = page.locator("#looking").text_content() or ""
    page.keyboard.press("ArrowRight")
    expect(page.locator("#looking")).to_have_text(re.compile(f"^(?!{re.escape(first)}$).*the model looks"))
    assert page.evaluate("document.activeElement.className") == "word current"
    page.locator("#tab-look").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-search"
    assert page.locator("#search").is_visible()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input:not([hidden]), select, textarea, button")].filter((element) =>
          !element.textContent.trim() && !element.labels?.length && !element.getAttribute("aria-label")
          && !element.querySelector("img[alt]")).length"""
    )
    assert unnamed == 0


def test_a_key_is_asked_for_and_what_was_given_meanwhile_is_captioned(demo: Demo, tab: Tab) -> None:
    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            fulfill(route, refusal("unauthorized"), 401)

    tab.page.route(re.compile(r"/(models|caption|match|capfilt)"), guard)
    page = tab.open()
    page.locator("#key-form").wait_for()
    page.set_input_files("#files", demo.scenes[:1])
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    page.locator("#models", has_text=f"{CAPTIONER}, {FILTER}").wait_for()
    page.locator("#captions .facts", has_text="match").first.wait_for()
    assert not page.locator("#key-form").is_visible()
    tab.problems[:] = [problem for problem in tab.problems if "401" not in problem]


def test_the_policy_lets_nothing_else_load(tab: Tab) -> None:
    reply = tab.page.request.get(tab.address)
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert tab.page.request.get(tab.address, headers={"If-None-Match": reply.headers["etag"]}).status == 304
    text = reply.text()
    assert not re.search(r"""\s(style|on\w+)=["']|(src|href)=["']https?:""", text)

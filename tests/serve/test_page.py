"""The page in a real browser, against a server with the shipped models; screenshots for the docs are made here.

pytest tests/serve/test_page.py --page-screenshots docs/images
"""

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_server import CAPTIONER, make_app, serving
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = playwright.expect
expect.set_options(timeout=60_000)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]
NUM_SAMPLES = 24

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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Scenes, a CapFilt run over them, a server and a browser."""
    from openblip.capfilt.config import CapFiltConfig
    from openblip.capfilt.local import run_capfilt
    from openblip.emoji_scenes.writer import write_emoji_scenes

    root = tmp_path_factory.mktemp("page")
    write_emoji_scenes(
        root / "web", split="web", num_samples=NUM_SAMPLES, seed=3, noise=0.4, num_workers=1, samples_per_shard=12
    )
    config = CapFiltConfig(source=str(root / "web"), captioner=CAPTIONER, filter="openblip-mini-filter", num_workers=1)
    run_capfilt(config, root / "run", device="cpu")
    app = make_app(root / "run")
    with serving(app) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield {"root": root, "app": app, "address": address, "browser": browser}
        browser.close()


class Tab:
    """A page of the browser that notes errors, refused loads and requests to other places."""

    def __init__(self, world: dict[str, Any], address: str | None = None, **context: Any) -> None:
        self.address = address or world["address"]
        self.context = world["browser"].new_context(**{"viewport": {"width": 1240, "height": 860}, **context})
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: self.problems.append(line.text) if line.type == "error" else None)
        self.page.on("request", self._note)
        self.page.set_default_timeout(60_000)
        self.page.goto(self.address)

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.problems.append(f"request to {request.url}")

    def shot(self, directory: Path | None, name: str) -> None:
        """Keep what the page shows as a light image of the docs."""
        if directory is not None:
            with Image.open(io.BytesIO(self.page.screenshot())) as image:
                image.convert("RGB").save(directory / f"{name}.webp", quality=82, method=6)


@pytest.fixture
def tab(world: dict[str, Any]) -> Iterator[Tab]:
    opened = Tab(world)
    yield opened
    assert opened.problems == []
    opened.context.close()


@pytest.fixture(scope="module")
def scenes(world: dict[str, Any]) -> list[Path]:
    """Image files of the source."""
    import tarfile

    found = []
    for shard in sorted((world["root"] / "web").glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                if not member.name.endswith((".txt", ".json")):
                    path = world["root"] / Path(member.name).name
                    path.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
                    found.append(path)
    return found


@pytest.fixture(scope="module")
def screenshots(request: pytest.FixtureRequest) -> Path | None:
    chosen = request.config.getoption("--page-screenshots", default=None)
    return Path(chosen) if chosen else None


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


def test_images_are_captioned_and_words_show_where_the_model_looks(
    world: dict[str, Any], tab: Tab, scenes: list[Path], screenshots: Path | None
) -> None:
    import openblip

    page = tab.page
    world["app"].state.busy = 2  # the first tries meet a full queue
    page.set_input_files("#files", scenes[:3])
    lines = page.locator("#captions .line")
    lines.first.wait_for()
    expected = openblip.load(CAPTIONER).caption(
        scenes[0], decoding=openblip.Beam(num_beams=3), num_captions=3, return_scores=True
    )
    assert lines.all_text_contents() == [each.text for each in sorted(expected, key=lambda each: -each.logprob)]
    page.locator("#captions .facts", has_text="match").first.wait_for()  # the filter scores what the captioner wrote
    assert page.locator("#strip button").count() == 3
    assert page.locator("#image").get_attribute("alt") == expected[0].text

    assert heat_of(tab) == 0
    words = lines.first.locator(".word")
    words.nth(1).hover()
    page.locator("#looking", has_text="the model looks").wait_for()
    assert heat_of(tab) > 100
    page.fill("#match-texts", f"{expected[0].text}\na red fire truck\n<img src=x onerror=alert(1)>")
    page.click("#match-form button")
    page.locator("#matches li").nth(2).wait_for()
    assert page.locator("#matches .line").first.text_content() == expected[0].text
    words.filter(has_text="lemon").or_(words.last).first.hover()
    page.locator("#looking", has_text="the model looks").wait_for()
    tab.shot(screenshots, "page")
    page.mouse.move(5, 5)
    assert heat_of(tab) == 0

    page.locator("#strip button").nth(1).click()  # its captions were written meanwhile, its texts are its own
    lines.first.wait_for()
    assert page.locator("#matches li").count() == 0
    page.click("#remove")
    assert page.locator("#strip button").count() == 2
    tab.problems[:] = [problem for problem in tab.problems if "429" not in problem]


def test_an_image_that_comes_before_the_list_of_models_is_captioned(world: dict[str, Any], scenes: list[Path]) -> None:
    tab = Tab(world, address="about:blank")
    held: list[Any] = []
    tab.page.route("**/models", lambda route: held.append(route))  # a busy server answers after the image was chosen
    tab.page.goto(world["address"])
    tab.page.set_input_files("#files", scenes[:1])
    tab.page.locator("#captions", has_text="writing").wait_for()
    held[0].continue_()
    tab.page.locator("#captions .facts", has_text="match").first.wait_for()
    tab.context.close()


def test_questions_and_conversations(tab: Tab, scenes: list[Path]) -> None:
    page = tab.page
    page.set_input_files("#files", scenes[:1])
    page.fill("#question", "what is this?")
    page.press("#question", "Enter")
    page.locator("#answers .said").wait_for()
    assert "<b>what is this?</b>" in (page.locator("#answers .said").text_content() or "")  # as text
    for number, message in enumerate(("hello", "and now?"), 1):
        page.fill("#message", message)
        page.press("#message", "Enter")
        page.locator("#turns .said", has_text=f"turn {number}").wait_for()
    assert page.locator("#turns .asked").all_text_contents() == ["hello", "and now?"]


def test_pasted_and_dropped_images_and_files_that_are_none(tab: Tab, scenes: list[Path], tmp_path: Path) -> None:
    page = tab.page
    encoded = base64.b64encode(scenes[0].read_bytes()).decode()
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
    page.locator("#alert", has_text="notes.txt").wait_for()  # with the reason that the server gives
    tab.problems[:] = [problem for problem in tab.problems if "422" not in problem]  # the browser logs refused calls


def test_search_by_text_and_by_image(
    world: dict[str, Any], tab: Tab, scenes: list[Path], screenshots: Path | None
) -> None:
    names = ["a cat beside a drum", "<script>alert(1)</script>", ""]
    uris = ["data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in scenes[:3]]
    world["app"].state.results = [
        {"shard": "0", "key": f"k{i}", "caption": name, "similarity": 0.5 - i / 10, "thumbnail": uri}
        for i, (name, uri) in enumerate(zip(names, uris, strict=True))
    ]
    page = tab.page
    page.click("#tab-search")
    page.fill("#search-text", "a cat")
    page.press("#search-text", "Enter")
    results = page.locator("#results li")
    results.nth(2).wait_for()
    assert "match 93 % · similarity 0.500" in (results.first.text_content() or "")
    assert names[1] in (results.nth(1).text_content() or "")
    results.first.get_by_text("Find similar").click()
    page.locator("#search-image").wait_for()
    assert page.input_value("#search-text") == ""
    page.fill("#where", "nonsense")
    page.click("#search-form .primary")
    page.locator("#alert", has_text="cannot be used").wait_for()
    tab.problems.clear()
    results.nth(1).get_by_text("Look at it").click()
    page.locator("#captions .line").first.wait_for()


def test_a_capfilt_run_is_browsed_and_labelled(world: dict[str, Any], tab: Tab, screenshots: Path | None) -> None:
    from openblip.capfilt.labels import read_labels

    page, run = tab.page, world["root"] / "run"
    page.click("#tab-capfilt")
    cards = page.locator("#cards li")
    cards.nth(NUM_SAMPLES - 1).wait_for()
    assert cards.locator("img").count() == NUM_SAMPLES
    page.evaluate("find('run').lastChild.textContent = 'scenes/web · itm > 0.5'")  # no path of this machine in the docs
    tab.shot(screenshots, "page-capfilt")
    page.select_option("#show", "only synthetic")
    page.click("#browse-form button")
    expect(cards).not_to_have_count(NUM_SAMPLES)
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
    page.keyboard.press("ArrowLeft")
    page.locator("#unsure[aria-pressed=true]").wait_for()
    with page.expect_response("**/capfilt/labels"):
        page.keyboard.press("u")  # takes it back
    page.locator("#place", has_text="Text 3 of 10, 2 answered").wait_for()
    file = run / "labels" / "itm-10-0.jsonl"
    assert page.locator("#calibrate").text_content() == f"openblip capfilt-calibrate {run} {file}"
    assert [label.is_true for label in read_labels(file)] == [True, False, None]
    page.reload()  # the answers are the server's
    page.click("#label-mode")
    page.fill("#num-texts", "10")
    page.click("#sample-form button")
    page.locator("#place", has_text="Text 3 of 10, 2 answered").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(world: dict[str, Any], scenes: list[Path], scheme: str) -> None:
    tab = Tab(world, color_scheme=scheme)
    page = tab.page
    page.set_input_files("#files", scenes[:1])
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


def test_a_phone(world: dict[str, Any], scenes: list[Path], screenshots: Path | None) -> None:
    tab = Tab(world, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, device_scale_factor=2)
    page = tab.page
    fits = "document.documentElement.scrollWidth <= 360"
    assert page.evaluate(fits)
    page.set_input_files("#files", scenes[:2])
    page.locator("#captions .facts", has_text="match").first.wait_for()
    assert page.evaluate(fits)
    page.locator("#captions .word").nth(1).tap()
    page.locator("#looking", has_text="the model looks").wait_for()
    assert heat_of(tab) > 100
    tab.shot(screenshots, "page-phone")
    for name in ("search", "capfilt"):
        page.tap(f"#tab-{name}")
        page.locator(f"#{name}").wait_for()
        assert page.evaluate(fits)
    assert tab.problems == []
    tab.context.close()


def test_everything_works_with_the_keyboard(world: dict[str, Any], tab: Tab, scenes: list[Path]) -> None:
    page = tab.page
    page.set_input_files("#files", scenes[:1])
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


def test_a_key_is_asked_for(world: dict[str, Any]) -> None:
    with serving(make_app(world["root"] / "run", key="secret")) as address:
        tab = Tab(world, address)
        tab.page.locator("#key-form").wait_for()
        tab.page.fill("#key", "secret")
        tab.page.press("#key", "Enter")
        tab.page.locator("#models", has_text=CAPTIONER).wait_for()
        assert not tab.page.locator("#key-form").is_visible()
        tab.context.close()


def test_the_policy_lets_nothing_else_load(world: dict[str, Any], tab: Tab) -> None:
    reply = tab.page.request.get(tab.address)
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert tab.page.request.get(tab.address, headers={"If-None-Match": reply.headers["etag"]}).status == 304
    text = reply.text()
    assert not re.search(r"""\s(style|on\w+)=["']|(src|href)=["']https?:""", text)

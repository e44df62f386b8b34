"""The page in a real browser, found by the names that a screen reader says."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mflux.serve import Engine

from .conftest import PROMPT, Running, running, wait_for

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
expect.set_options(timeout=90_000)

PAGE = Path(__file__).parents[2] / "src" / "mflux" / "serve" / "page"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Chromium as the system has it; nothing of it reaches anything but this machine."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    arguments = ["--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--no-sandbox")
    with sync_api.sync_playwright() as playwright:
        options = {"executable_path": path} if path else {"channel": "chrome"}
        try:
            browser = playwright.chromium.launch(args=arguments, **options)
        except sync_api.Error as error:
            pytest.skip(f"there is no Chromium here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    context.set_default_timeout(90_000)
    yield context
    context.close()


@pytest.fixture
def page(context):
    """A page that must not complain, of which nothing comes from elsewhere."""
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("console", lambda message: wrong.append(message.text) if _is_wrong(message) else None)
    page.on("request", lambda request: wrong.append(request.url) if _is_foreign(request.url) else None)
    yield page
    assert wrong == []


def _is_wrong(message) -> bool:
    # What the server refuses is told by the browser as well.
    return message.type == "error" and "Failed to load resource" not in message.text


def _is_foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "blob:", "data:"))


def generate(page, prompt: str = PROMPT, **fields: object) -> None:
    page.get_by_role("textbox", name="Prompt", exact=True).fill(prompt)
    for name, value in fields.items():
        page.get_by_role("spinbutton", name=name.capitalize()).fill(str(value))
    page.get_by_role("button", name="Generate").click()


def gallery(page):
    return page.get_by_role("region", name="Gallery")


def test_from_a_prompt_to_an_image(page, shared: Running):
    page.goto(shared.url)
    for role, name in (
        ("textbox", "Prompt"), ("combobox", "Model"), ("spinbutton", "Width"), ("spinbutton", "Height"),
        ("spinbutton", "Steps"), ("spinbutton", "Seed"), ("spinbutton", "Pictures"),
    ):  # fmt: skip
        expect(page.get_by_role(role, name=name, exact=True)).to_be_visible()
    # What the model has no use for is not offered.
    expect(page.get_by_label("Negative prompt")).to_be_hidden()
    expect(page.get_by_label("Guidance")).to_be_hidden()
    expect(page.get_by_label("Strength")).to_be_hidden()
    expect(page.get_by_label("Width")).to_have_value("128")
    expect(page.get_by_label("Steps")).to_have_value("8")

    generate(page, seed=4)
    image = gallery(page).get_by_role("img", name=PROMPT)
    expect(image).to_be_visible()
    expect(page.get_by_text("The image is ready.")).to_be_visible()
    assert image.evaluate("one => one.decode().then(() => one.naturalWidth)") == 128
    expect(page.get_by_role("progressbar")).to_have_count(0)
    with page.expect_download() as download:
        gallery(page).get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "mflux-4.png"
    job = shared.engine.jobs[0]
    # The server's bytes, in which the settings are.
    assert Path(download.value.path()).read_bytes() == job.pictures[0].data


def test_what_is_typed_before_the_models_are_known(page, shared: Running):
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.goto(shared.url)
    generate(page, steps=3)
    page.wait_for_timeout(50)
    # What is typed after the click belongs to the next one.
    page.get_by_role("textbox", name="Prompt", exact=True).fill("a blue square")
    # Nothing gets in front of what is being typed.
    page.get_by_label("Height").focus()
    held[0].continue_()
    expect(gallery(page).get_by_role("img", name=PROMPT)).to_be_visible()
    assert shared.engine.jobs[0].steps == 3
    expect(page.get_by_label("Steps")).to_have_value("3")
    expect(page.get_by_label("Width")).to_have_value("128")
    expect(page.get_by_label("Height")).to_have_value("")
    page.keyboard.type("64")
    expect(page.get_by_label("Height")).to_have_value("64")
    page.get_by_label("Height").fill("")
    page.get_by_label("Seed").focus()
    expect(page.get_by_label("Height")).to_have_value("128")


def test_progress_preview_and_cancel(page, shared: Running, pace):
    pace.seconds = 0.3
    page.goto(shared.url)
    generate(page, steps=20)
    bar = page.get_by_role("progressbar", name="Progress")
    expect(bar).to_have_attribute("aria-valuetext", re.compile(r"step \d+ of 20, about \d+ s"))
    assert 0 <= int(bar.get_attribute("aria-valuenow")) <= 100
    expect(page.get_by_role("status").filter(has_text=re.compile(r"step \d+ of 20"))).to_be_visible()
    preview = page.get_by_role("img", name="Preview")
    expect(preview).to_be_visible()
    assert preview.evaluate("one => one.decode().then(() => one.naturalWidth)") > 16

    # Another one waits, and is cancelled; then Escape ends the running one.
    generate(page, "a blue square")
    waiting = page.get_by_role("listitem").filter(has_text="a blue square")
    expect(waiting.get_by_role("status")).to_have_text("waiting, next")
    waiting.get_by_role("button", name="Cancel").click()
    expect(waiting).to_have_count(0)
    page.get_by_role("textbox", name="Prompt", exact=True).press("Escape")
    expect(bar).to_have_count(0)
    expect(page.get_by_text("Cancelled.")).to_be_visible()
    assert [job.status for job in shared.engine.jobs[:2]] == ["cancelled", "cancelled"]


def test_the_gallery_survives_and_gives_settings_back(page, shared: Running):
    page.goto(shared.url)
    generate(page, "a green square <b>on</b> black", seed=11, steps=6)
    expect(gallery(page).get_by_role("img")).to_have_count(1)
    page.reload()
    image = gallery(page).get_by_role("img", name="a green square <b>on</b> black")
    expect(image).to_be_visible()
    expect(page.get_by_label("Seed")).to_have_value("")
    gallery(page).get_by_role("button", name="Use settings").click()
    for label, value in (("Seed", "11"), ("Steps", "6"), ("Width", "128")):
        expect(page.get_by_label(label)).to_have_value(value)
    prompt = page.get_by_role("textbox", name="Prompt", exact=True)
    expect(prompt).to_have_value("a green square <b>on</b> black")
    gallery(page).get_by_role("button", name="Delete").click()
    expect(image).to_have_count(0)
    page.reload()
    expect(page.get_by_text("Nothing yet")).to_be_visible()


def test_what_was_finished_meanwhile_is_there(page, shared: Running, pace):
    pace.seconds = 0.1
    page.goto(shared.url)
    generate(page, "a red triangle", steps=10)
    expect(page.get_by_role("progressbar")).to_be_visible()
    page.goto("about:blank")
    wait_for(lambda: shared.engine.jobs[0].status == "done")
    page.goto(shared.url)
    expect(gallery(page).get_by_role("img", name="a red triangle")).to_be_visible()


def test_a_source_picture(page, shared: Running, tmp_path):
    page.goto(shared.url)
    generate(page, seed=4)
    gallery(page).get_by_role("button", name="Use as source").click()
    expect(page.get_by_role("img", name="Source picture mflux-4.png")).to_be_visible()
    page.get_by_label("Strength").fill("0.5")
    generate(page, "a blue circle")
    expect(gallery(page).get_by_role("img")).to_have_count(2)
    job = shared.engine.jobs[0]
    assert job.settings["image_strength"] == 0.5
    assert job.steps == 4
    page.get_by_role("button", name="Remove source picture mflux-4.png").click()
    expect(page.get_by_label("Strength")).to_be_hidden()

    # One that mflux made is dropped: its settings are offered.
    page.evaluate(
        """async (data) => {
            const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            document.getElementById("form").dispatchEvent(
                new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        _base64(shared.engine.jobs[1].pictures[0].data),
    )
    expect(page.get_by_role("img", name="Source picture dropped.png")).to_be_visible()
    page.get_by_role("button", name="Use its settings").click()
    expect(page.get_by_label("Seed")).to_have_value("4")

    # And one chosen by the keyboard alone.
    file = tmp_path / "chosen.png"
    file.write_bytes(shared.engine.jobs[1].pictures[0].data)
    page.get_by_label("Source picture", exact=True).set_input_files(file)
    expect(page.get_by_role("img", name="Source picture chosen.png")).to_be_visible()
    expect(page.get_by_role("img", name="Source picture dropped.png")).to_have_count(0)


def test_errors_in_the_servers_words(page, shared: Running):
    page.goto(shared.url)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_have_text("there is no prompt: say what the image shows")
    generate(page, width=100)
    expect(page.get_by_role("alert")).to_contain_text("100 is not a multiple of 16")
    expect(page.get_by_label("Width")).to_have_attribute("aria-invalid", "true")
    generate(page, width=128)
    expect(gallery(page).get_by_role("img")).to_have_count(1)
    expect(page.get_by_role("alert")).to_have_text("")


def test_by_the_keyboard_alone(page, shared: Running):
    page.goto(shared.url)
    expect(page.get_by_label("Steps")).to_have_value("8")
    page.keyboard.press("Tab")
    expect(page.get_by_role("textbox", name="Prompt", exact=True)).to_be_focused()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    expect(gallery(page).get_by_role("img", name=PROMPT)).to_be_visible()
    seen = []
    for _ in range(16):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("document.activeElement.labels?.[0]?.textContent || document.activeElement.textContent")
        )
    assert seen[:2] == ["Generate", "Model"]
    for name in ("Width", "Source picture", "Use settings", "Use as source", "Download", "Delete"):
        assert name in seen


def test_several_images_and_a_queue(page, shared: Running, pace):
    pace.seconds = 0.02
    page.goto(shared.url)
    generate(page, pictures=2, seed=7)
    generate(page, "a blue square")
    expect(gallery(page).get_by_role("img")).to_have_count(4)
    names = [one.get_attribute("alt") for one in gallery(page).get_by_role("img").all()]
    assert sorted(names) == sorted([PROMPT, "a blue square"] * 2)


def test_a_key_is_asked_for(page, serve):
    with Engine(["demo"]) as engine, serve(engine, key="secret") as server:
        page.goto(server.url)
        key = page.get_by_label("API key")
        expect(key).to_be_focused()
        key.fill("wrong")
        key.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("this server wants a key")
        key.fill("secret")
        key.press("Enter")
        expect(key).to_be_hidden()
        generate(page)
        expect(gallery(page).get_by_role("img")).to_have_count(1)
        page.reload()
        expect(page.get_by_label("Width")).to_have_value("128")
        expect(key).to_be_hidden()
        assert "secret" not in page.url


def test_the_server_goes_and_comes_back(page):
    with Engine(["demo"]) as engine:
        with running(engine) as server:
            page.goto(server.url)
            page.get_by_role("textbox", name="Prompt", exact=True).fill("what was typed")
        page.get_by_role("button", name="Generate").click()
        banner = page.get_by_text("The server does not answer")
        expect(banner).to_be_visible()
        with running(engine, port=server.port):
            expect(banner).to_be_hidden()
            expect(page.get_by_role("textbox", name="Prompt", exact=True)).to_have_value("what was typed")
            page.get_by_role("button", name="Generate").click()
            expect(gallery(page).get_by_role("img")).to_have_count(1)


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_sticks_out(page, shared: Running, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(shared.url)
    generate(page, "word " * 100 + "Wörter" * 60)
    expect(gallery(page).get_by_role("img")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate(
        "[...document.querySelectorAll('body *')].filter((one) => one.offsetParent)"
        ".map((one) => parseFloat(getComputedStyle(one).fontSize))"
    )
    assert min(sizes) >= 14


def test_it_is_small_and_from_here_alone():
    files = [path for path in PAGE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60_000
    assert sum(len(path.read_text().splitlines()) for path in files if path.suffix == ".js") < 900
    for path in files:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text


def _base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()

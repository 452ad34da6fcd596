"""The slides of docs/reading: one file, all of it, by keys and on paper."""

import re

import pytest

pytest.importorskip("markdown_it", reason="pip install -r requirements-docs.txt")

from examples import slides  # noqa: E402
from examples.browser import NoBrowser, browser  # noqa: E402

pytestmark = pytest.mark.ecosystem


@pytest.fixture(scope="module")
def deck(tmp_path_factory):
    file = tmp_path_factory.mktemp("slides") / "slides.html"
    file.write_text(slides.deck(), "utf-8")
    return file


@pytest.fixture(scope="module")
def shown(deck):
    """The file in a browser, at the size of a projector; any complaint or request fails the test."""
    complaints = []
    try:
        with browser() as opened:
            page = opened.new_page(viewport={"width": 1280, "height": 720})
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on(
                "request", lambda request: complaints.append(request.url) if is_away(request.url) else None
            )
            page.goto(deck.as_uri())
            page.wait_for_selector("body[data-ready]")
            yield page
    except NoBrowser as error:
        pytest.skip(str(error))
    assert complaints == []


def is_away(url: str) -> bool:
    return not url.startswith(("file:", "data:"))


def test_all_that_the_pages_ask_and_compute_is_there(deck):
    text = deck.read_text("utf-8")
    for name in slides.CHAPTERS:
        page = (slides.READING / f"{name}.md").read_text("utf-8")
        for command in re.findall(r"^\$ python -m examples.*", page, re.M):
            assert command in text, command
        assert f'id="{name}"' in text
        assert page.count("<!-- diff ") == 0 or text.count('<span class="plus">') > 30
    assert text.count('class="question"') == 17
    assert text.count('class="try"') == 8


def test_nothing_is_loaded_from_elsewhere(deck):
    text = deck.read_text("utf-8")
    assert not re.findall(r'(?:src|srcset|href)="(?!data:|#|http)[^"]*"', text)
    assert not re.findall(r'(?:src|srcset)="http', text)


def test_every_slide_fits_and_can_be_read(shown):
    scales = shown.evaluate("slides.map((slide) => Number(slide.dataset.scale))")
    assert min(scales) >= 0.7  # of 26 pixels for text, 19 for code


def test_it_opens_on_the_first(shown):
    assert shown.evaluate("history.replaceState(null, '', location.pathname); go(); now") == 0


def test_keys_walk_through_all_slides(shown):
    shown.keyboard.press("Home")
    count = shown.evaluate("slides.length")
    for _ in range(3 * count):  # what is hidden takes a key of its own
        shown.keyboard.press("ArrowRight")
    assert shown.evaluate("now") == count - 1
    shown.keyboard.press("ArrowUp")
    assert shown.evaluate("slides[now].id") == slides.CHAPTERS[-1]
    shown.keyboard.press("Home")
    assert shown.evaluate("now") == 0


def test_a_question_is_asked_before_it_is_answered(shown):
    number = shown.evaluate(
        "slides.findIndex((slide) => slide.querySelector('.question') && slide.querySelector('.later'))"
    )
    shown.evaluate(f"show({number}, false)")
    hidden = shown.locator("section.now .later").first
    assert not hidden.is_visible()
    shown.keyboard.press("ArrowRight")
    assert hidden.is_visible()
    assert shown.evaluate("now") == number


def test_a_page_of_paper_for_each_slide(shown):
    pdf = shown.pdf(prefer_css_page_size=True, print_background=True)
    pages = len(re.findall(rb"/Type\s*/Page[^s]", pdf))
    assert pages == shown.evaluate("slides.length")

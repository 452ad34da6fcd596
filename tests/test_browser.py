"""The page of `decoders look` in a real browser: nothing fails, everything opens, by mouse and by keys."""

from pathlib import Path

import pytest

from decoders.cli import main
from examples.browser import NoBrowser, browser

pytestmark = pytest.mark.ecosystem
CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
STORY = "Once upon a time there was a fox. The fox"
HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)> "quotes" \' & <!--'
FUYU = str(CHECKPOINTS / "tiny-fuyu")
PAGES = {
    "phi": [str(CHECKPOINTS / "tiny-phi"), STORY],
    "gpt-neo": [str(CHECKPOINTS / "tiny-gpt-neo"), STORY, "--max-new-tokens", "40"],
    "openai-gpt": [str(CHECKPOINTS / "tiny-openai-gpt"), STORY],
    "readme": [str(CHECKPOINTS / "tiny-phi3"), STORY],
    "phi3": [str(CHECKPOINTS / "tiny-phi3"), STORY, "--with", "Once upon a time there was a cat. The cat"],
    "persimmon": [str(CHECKPOINTS / "tiny-persimmon"), "time " * 300, "--last", "200"],
    "fuyu": [FUYU, "where is the red circle?", "--image", f"{FUYU}/shapes.png"],
    "models": [
        str(CHECKPOINTS / "tiny-phi"),
        "Once upon a time",
        "--with-model",
        str(CHECKPOINTS / "tiny-gpt-neo"),
    ],
    "hostile": [str(CHECKPOINTS / "tiny-phi"), HOSTILE],
}
VIEWS = ["text", "attention", "lens", "writers", "magnitudes", "block"]


@pytest.fixture(scope="module")
def chromium():
    try:
        with browser() as opened:
            yield opened
    except NoBrowser as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, arguments in PAGES.items():
        assert main(["look", *arguments, "-o", str(folder / f"{name}.html")]) == 0
    return folder


@pytest.fixture
def shown(chromium, pages):
    """Opens a page; whatever the browser complains about fails the test."""
    complaints, contexts = [], []

    def open_page(name: str, width: int = 1280, scheme: str = "light"):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("a dialog opened"), dialog.dismiss()))
        page.on(
            "request",
            lambda request: (
                complaints.append(request.url) if not request.url.startswith(("file:", "data:")) else None
            ),
        )
        page.goto((pages / f"{name}.html").as_uri())
        page.wait_for_selector("#block .code .on")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def data(page) -> dict:
    return page.evaluate("JSON.parse(document.getElementById('data').textContent)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1366, 1280, 1024, 768, 390])
@pytest.mark.parametrize("name", PAGES)
def test_every_view_opens(shown, name, width, scheme):
    page = shown(name, width, scheme)
    for view in VIEWS:
        box = page.locator(f"#{view}").bounding_box()
        assert box["height"] > 100 and box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert page.locator("text=undefined").count() == 0 and page.locator("text=[object").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["phi", "phi3"])
def test_words_can_be_read_on_their_colours(shown, name, scheme):
    """Contrast of light and dark, which every eye sees: 4.5 as WCAG wants it for text, 3 on the strongest colours."""
    page = shown(name, 1280, scheme)
    worst = page.evaluate("""() => {
      const channel = x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
      const light = rgb => 0.2126 * channel(rgb[0] / 255) + 0.7152 * channel(rgb[1] / 255) + 0.0722 * channel(rgb[2] / 255);
      const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return [n.slice(0, 3), n[3] ?? 1]; };
      const behind = node => { if (!node) return [255, 255, 255]; const [rgb, a] = parse(getComputedStyle(node).backgroundColor);
        if (a === 1) return rgb; const below = behind(node.parentElement); return rgb.map((c, i) => a * c + (1 - a) * below[i]); };
      let worst = [];
      for (const node of document.querySelectorAll('.lens button, .token, .word, p, td, th, h2, .soft, .code div')) {
        if (!node.textContent.trim()) continue;
        const [a, b] = [light(parse(getComputedStyle(node).color)[0]), light(behind(node))];
        worst.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.className, node.textContent.slice(0, 20)]);
      }
      return worst.sort((x, y) => x[0] - y[0]).slice(0, 3);
    }""")
    assert worst[0][0] >= 4.5, worst


def test_pointing_at_a_token_tells_about_it(shown):
    page = shown("phi")
    run = data(page)["runs"][0]
    page.locator("#text [role=option]").nth(6).hover()
    panel = page.locator("#text [aria-live]")
    assert panel.locator("h3").inner_text().startswith("token 6: ")
    rows = panel.locator("tr")
    assert rows.count() == 10
    first = run["words"][str(run["next"]["ids"][6][0])].replace(" ", "␣")
    assert rows.nth(0).locator(".word").inner_text() == first
    page.locator("h1").hover()
    assert panel.locator("h3").inner_text().startswith(f"token {run['prompt'] - 1}: ")


def test_arrow_keys_choose_tokens_and_all_views_follow(shown):
    page = shown("phi")
    prompt = data(page)["runs"][0]["prompt"]
    page.locator("#text .token.chosen").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    word = page.locator(f"#text [role=option] >> nth={prompt}").inner_text().strip()
    assert (
        page.locator("nav .chosen").inner_text().startswith(f"token {prompt} ")
        and word in page.locator("nav .chosen").inner_text()
    )
    for view in ("#attention", "#lens", "#writers"):
        assert word in page.locator(view).inner_text()
    assert page.evaluate("document.activeElement.classList.contains('chosen')")
    page.keyboard.press("End")
    assert page.locator("#text [role=option]").last.get_attribute("aria-selected") == "true"
    page.get_by_role("button", name="token before").click()
    assert page.locator("#text .token.chosen").count() == 1


def test_a_map_opens_large_by_mouse_and_by_keys(shown):
    page = shown("gpt-neo")
    page.locator("#attention .maps button").nth(8).click()  # 6 heads: layer 1, head 2
    assert page.locator("#attention h3").inner_text() == "layer 1, head 2: who reads whom"
    page.keyboard.press("ArrowDown")
    assert page.locator("#attention h3").inner_text() == "layer 2, head 2: who reads whom"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#attention h3").inner_text() == "layer 2, head 1: who reads whom"
    assert page.locator("#attention .maps button[aria-pressed=true]").count() == 1
    canvas = page.locator("#attention .big canvas")
    size = canvas.bounding_box()
    canvas.hover(position={"x": 5, "y": size["height"] - 5})
    assert "reads" in page.locator("#attention .big ~ p, #attention .scroll ~ p").last.inner_text()
    canvas.click(position={"x": 5, "y": size["height"] / 2})
    T = len(data(page)["runs"][0]["ids"])
    assert abs(int(page.locator("nav .chosen").inner_text().split()[1]) - T // 2) <= 1
    assert page.locator("#attention .arcs path").count() >= 1


def test_windows_are_seen(shown):
    """Of a local layer the last query's first keys have the colour of what is hidden, of a global one not."""
    page = shown("gpt-neo")
    run = data(page)["runs"][0]
    T, window = len(run["ids"]), run["windows"][1]
    assert T > window == 32 and run["windows"][0] is None
    colours = [
        page.locator("#attention .maps canvas")
        .nth(n)
        .evaluate(f"c => [...c.getContext('2d').getImageData(0, {T - 1}, 1, 1).data].slice(0, 3)")
        for n in (0, 6)
    ]
    none = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--none').trim()")
    assert "#" + "".join(f"{c:02x}" for c in colours[1]) == none and colours[0] != colours[1]


def test_the_lens_tells_its_ten(shown):
    page = shown("phi")
    run = data(page)["runs"][0]
    T = len(run["ids"])
    page.locator("#lens td button").nth(2 * T + 3).click()  # the third row from above: after layer 1
    panel = page.locator("#lens [aria-live]")
    assert (
        panel.locator("h3").inner_text().startswith("after layer 1, behind ")
        and panel.locator("tr").count() == 10
    )
    output = [word.inner_text() for word in panel.locator("tr .word").all()]
    assert output == [
        run["words"][str(id)].replace(" ", "␣").replace("\n", "↵") for id in run["lens"][2]["ids"][3]
    ]
    page.keyboard.press("ArrowDown")
    assert panel.locator("h3").inner_text().startswith("after layer 0, behind ")


def test_a_box_shows_its_lines_and_values(shown):
    page = shown("persimmon")
    output = data(page)["runs"][0]["diagrams"][0]
    boxes = page.locator("#block [data-box]")
    assert boxes.count() == len(output["boxes"])
    for n in range(boxes.count()):
        key = boxes.nth(n).get_attribute("data-box")
        boxes.nth(n).focus()
        page.keyboard.press("Enter")
        on = [
            int(n)
            for n in page.locator("#block .code .on").evaluate_all("all => all.map(x => x.dataset.line)")
        ]
        assert on == [n for n, _ in output["lines"] if any(a <= n <= b for a, b in output["boxes"][key])]
        assert f"layers.0.{output['stages'][key][0]}" in page.locator("#block h3").inner_text()
    assert page.locator("#block canvas.strip").count() == 1


def test_both_kinds_of_layers_are_drawn(shown):
    page = shown("gpt-neo")
    page.get_by_role("button", name="layers that see 32 tokens").click()
    assert "the last 32 keys" in page.locator("#block svg").inner_html()


def test_the_picture_follows_the_token(shown):
    page = shown("fuyu")
    image = page.locator("#picture canvas")
    before = image.evaluate("c => c.toDataURL()")
    assert "of its attention (mean of all heads)" in page.locator("#picture").inner_text()
    page.get_by_role("button", name="show layer 0 head 0 alone").click()
    alone = image.evaluate("c => c.toDataURL()")
    page.locator("#text [role=option]").last.click()
    assert len({before, alone, image.evaluate("c => c.toDataURL()")}) == 3


def test_two_texts_are_chosen_together(shown):
    page = shown("phi3")
    output = data(page)
    i, j = output["compared"]["pairs"][4]
    page.locator("#text [role=option]").nth(i).click()
    second = page.locator("#text .panes > div").nth(1)
    assert second.locator("[role=option]").nth(j).get_attribute("aria-selected") == "true"
    assert "how far the residual streams part" in page.locator("#difference").inner_text().lower()
    page.locator("#difference button").first.click()
    assert page.locator("#text .token.chosen").count() == 2


def test_others_text_is_not_run(shown):
    page = shown("hostile")
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    assert HOSTILE[:60] in page.locator("#text .text").inner_text()


def test_it_can_be_printed_and_named_by_a_screen_reader(shown):
    page = shown("phi")
    unnamed = page.evaluate("""() => [...document.querySelectorAll('button, [role], canvas[role]')].filter(
      x => !x.getAttribute('aria-label') && !x.textContent.trim()).map(x => x.outerHTML.slice(0, 80))""")
    assert unnamed == []
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and page.locator("#lens").is_visible()


def test_nan_is_shown_and_not_a_broken_page(chromium, tmp_path):
    from decoders import look, phi, weights

    model = weights.load(phi.PhiForCausalLM, CHECKPOINTS / "tiny-phi")
    model.model.layers[1].mlp.fc2.weight.data[3] = float("nan")
    file = look.write(tmp_path / "nan.html", look.page([look.Run(model, list(range(20, 32)))]))
    page, errors = chromium.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_selector("#block .code .on")
    assert (
        page.get_by_role("alert").inner_text()
        == "layers.1.mlp_out is not finite at token 0: it begins there."
    )
    assert errors == []
    page.close()


def test_a_diary_steps_through_its_pages(chromium, tmp_path):
    """What is chosen in one page stays chosen in the next."""
    from decoders import phi, tokenize, weights
    from examples.diary import Diary

    model = weights.load(phi.PhiForCausalLM, CHECKPOINTS / "tiny-phi")
    kept = Diary(tmp_path, model, tokenize.load(CHECKPOINTS / "tiny-phi"), STORY, 1, "tiny-phi")
    for step in range(3):
        kept.write(step, [3.0, 2.0, 1.5][:step])
    page, errors = chromium.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "index.html").as_uri())
    inside = page.frame_locator("#page")
    assert page.locator("#told").inner_text() == "2 of 2, loss 2.000 nats a token"
    inside.locator("#attention .maps button").nth(5).click()
    inside.locator("#text [role=option]").nth(4).click()
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#told").inner_text() == "1 of 2, loss 3.000 nats a token"
    page.wait_for_timeout(300)
    inside.locator("text=(step 1)").first.wait_for()
    assert inside.locator("#attention h3").inner_text() == "layer 1, head 1: who reads whom"
    assert inside.locator("nav .chosen").inner_text().startswith("token 4 ")
    page.get_by_role("button", name="play").click()
    assert page.get_by_role("button", name="stop").is_visible()
    page.wait_for_timeout(1400)
    assert page.locator("#told").inner_text().startswith("2 of 2") and errors == []
    page.close()


def test_labels_of_the_map_can_be_read_from_the_back_of_a_hall(shown):
    """14 px at 1280; and a button makes the map large enough for every label of a long text."""
    page = shown("gpt-neo", 1280)
    sizes = (
        "names => [...document.querySelectorAll(names)].map(x => parseFloat(getComputedStyle(x).fontSize))"
    )
    for names in (".maps .label", ".big .side span", ".big .top span", ".arcs"):
        found = page.evaluate(sizes, names)
        assert found and min(found) >= 14, names
    width = page.locator(".big canvas").bounding_box()["width"]
    page.locator("button.large").click()
    tokens = len(data(page)["runs"][0]["ids"])
    assert page.locator(".big canvas").bounding_box()["width"] == 24 * tokens > width
    labels = page.evaluate("[...document.querySelectorAll('.big .side span')].map(x => x.textContent)")
    assert len(labels) == tokens and all(labels)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.locator("button.large").click()
    assert page.locator(".big canvas").bounding_box()["width"] == width

"""The first page in a real browser: its states, its sizes, its keyboard."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect
from sqlalchemy import update

from pacs.repository.tables import Study
from tests.e2e.conftest import DESKTOP, MANY, ODD, PHONE, Opener
from tests.e2e.site import Site
from tests.support.populated import Made, many, populate

TOTAL = len(ODD) + MANY
LIST = "**/api/v1/study-list*"
looks = pytest.mark.parametrize(
    ("viewport", "scheme", "language"),
    [
        pytest.param(viewport, scheme, language, id=f"{name}-{scheme}-{language}")
        for name, viewport in (("desktop", DESKTOP), ("phone", PHONE))
        for scheme in ("light", "dark")
        for language in ("zh", "en")
    ],
)


def script(name: str) -> str:
    """Return one of the scripts beside this file."""
    return (Path(__file__).parent / name).read_text("utf-8")


CONTRAST = script("contrast.js")
NAMELESS = script("nameless.js")


def rows(page: Page) -> Any:
    return page.locator("#rows > .study")


def shown_names(page: Page) -> list[str]:
    return page.locator(".opener").all_inner_texts()


def ready(page: Page) -> Page:
    expect(rows(page).first).to_be_visible()
    expect(page.locator("#n-studies")).to_have_text(re.compile(r"\d"))
    return page


def fits(page: Page) -> bool:
    """Nothing makes the page scroll sideways."""
    return bool(
        page.evaluate(
            "document.documentElement.scrollWidth <="
            " document.documentElement.clientWidth"
        )
    )


@looks
def test_every_look_is_whole_readable_and_named(
    site: Site,
    open_page: Opener,
    viewport: dict[str, int],
    scheme: str,
    language: str,
) -> None:
    page = ready(
        open_page(
            f"{site.url}/?lang={language}", viewport=viewport, color_scheme=scheme
        )
    )
    page.locator("#more-fields").click()
    page.locator(".opener").nth(2).click()
    expect(page.locator(".panel tbody tr")).to_have_count(8)

    assert fits(page)
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(NAMELESS) == []
    wide = page.evaluate(
        "[...document.querySelectorAll('.figures, .search, .study, .detail, .panel')]"
        ".filter(one => one.getBoundingClientRect().right > innerWidth)"
        ".map(one => one.className)"
    )
    assert wide == []


@looks
def test_an_empty_archive_says_how_to_send(
    empty_site: Site,
    open_page: Opener,
    viewport: dict[str, int],
    scheme: str,
    language: str,
) -> None:
    page = open_page(
        f"{empty_site.url}/?lang={language}", viewport=viewport, color_scheme=scheme
    )

    expect(page.locator(".state code")).to_have_text(
        "dcmsend -aec HUYING 127.0.0.1 11112 +sd +r ./dicom"
    )
    expect(page.locator("#n-bytes")).to_have_text("0 B")
    assert fits(page)
    assert page.evaluate(CONTRAST) == []


def test_the_first_studies_appear_by_themselves(
    empty_site: Site, open_page: Opener
) -> None:
    page = open_page(empty_site.url)
    expect(page.locator(".state code")).to_be_visible()

    populate(empty_site.database, many(3))

    expect(rows(page)).to_have_count(3)
    expect(page.locator("#state")).to_be_hidden()


@looks
def test_a_failure_says_so_and_can_be_tried_again(
    site: Site,
    browser: Browser,
    open_page: Opener,
    complaints: list[str],
    viewport: dict[str, int],
    scheme: str,
    language: str,
) -> None:
    page = ready(
        open_page(
            f"{site.url}/?lang={language}", viewport=viewport, color_scheme=scheme
        )
    )
    page.route(LIST, lambda route: route.fulfill(status=503))
    page.locator("#text").fill("wang")

    expect(page.locator(".state.bad")).to_contain_text("503")
    assert page.evaluate(CONTRAST) == []
    page.unroute(LIST)
    page.locator(".retry").click()

    expect(rows(page).first).to_be_visible()
    expect(page.locator("#state")).to_be_hidden()
    # The browser itself reports the answer that this test gave.
    assert [text for text in complaints if "503" not in text] == []
    complaints.clear()


def test_a_lost_connection_is_told_from_a_refusal(
    site: Site, open_page: Opener, complaints: list[str]
) -> None:
    page = ready(open_page(site.url))
    page.route(LIST, lambda route: route.abort())
    page.locator("#text").fill("a")
    expect(page.locator(".state.bad")).to_contain_text("连接不上服务器")
    page.unroute(LIST)
    page.route(LIST, lambda route: route.fulfill(status=403))
    page.locator("#text").fill("ab")
    expect(page.locator(".state h2")).to_have_text("此账号不查看患者检查")
    expect(page.locator(".state.bad, .retry, #search")).not_to_be_visible()

    assert all("Failed to load resource" in text for text in complaints)
    complaints.clear()


def test_an_ended_session_leads_to_the_login_page(
    site: Site, open_page: Opener, complaints: list[str]
) -> None:
    page = ready(open_page(site.url))
    page.route("**/login?ended", lambda route: route.fulfill(body="the login page"))
    page.route(LIST, lambda route: route.fulfill(status=401))
    page.locator("#text").fill("ab")

    page.wait_for_url(f"{site.url}/login?ended")

    assert all("401" in text for text in complaints)
    complaints.clear()


def test_figures_that_are_refused_are_not_asked_for_again(
    site: Site, open_page: Opener, complaints: list[str]
) -> None:
    asked: list[str] = []
    page = open_page("about:blank")
    page.clock.install()
    page.on("request", lambda request: asked.append(request.url))
    page.route("**/api/v1/activity", lambda route: route.fulfill(status=403))
    page.goto(site.url)
    expect(page.locator("#figures")).to_be_hidden()
    expect(rows(page).first).to_be_visible()

    page.clock.run_for(60_000)

    assert len([url for url in asked if url.endswith("/activity")]) == 1
    assert all("403" in text for text in complaints)
    complaints.clear()


def test_an_open_node_has_nobody_to_log_out(site: Site, open_page: Opener) -> None:
    page = ready(open_page(site.url))

    expect(page.locator("#account")).to_be_hidden()


def test_a_thumbnail_is_read_once_its_study_is_open(
    site: Site, open_page: Opener, complaints: list[str]
) -> None:
    held: list[Route] = []
    page = open_page("about:blank")
    page.route("**/thumbnail", lambda route: held.append(route))  # noqa: PLW0108
    page.goto(site.url)
    ready(page)
    assert held == []
    page.locator(".opener").nth(2).click()
    preview = page.locator(".preview")
    expect(preview.locator(".bone")).to_be_visible()
    expect(preview).to_have_attribute("aria-busy", "true")

    held.pop().fulfill(status=503)
    expect(preview).to_contain_text("缩略图读取失败")
    preview.locator("button").click()
    page.wait_for_function("document.querySelector('.preview .bone')")
    held.pop().continue_()

    picture = preview.get_by_alt_text("检查缩略图")
    expect(picture).to_be_visible()
    width = len("1.2.826.9.3")
    assert picture.evaluate("one => one.naturalWidth") == width
    expect(preview).not_to_have_attribute("aria-busy", "true")

    page.locator(".opener").nth(0).click()
    expect(page.locator(".preview .bone")).to_be_visible()
    held.pop().fulfill(status=406)
    expect(preview).to_have_text("没有缩略图")
    assert all(re.search("503|406", text) for text in complaints)
    complaints.clear()


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("width", [320, 360, 390])
def test_no_choice_is_cut_on_a_phone(
    site: Site, open_page: Opener, width: int, language: str
) -> None:
    page = ready(
        open_page(
            f"{site.url}/?lang={language}", viewport={"width": width, "height": 760}
        )
    )

    cut = page.locator(".choices").evaluate_all(
        "all => all.filter(one => one.scrollWidth > one.clientWidth).length"
    )
    outside = page.locator(".choices button").evaluate_all(
        "all => all.filter(one => one.getBoundingClientRect().right > innerWidth)"
        ".length"
    )
    assert (cut, outside) == (0, 0)


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_bones_are_shown_while_the_first_page_is_read(
    site: Site, open_page: Opener, viewport: dict[str, int]
) -> None:
    held: list[Route] = []
    page = open_page("about:blank", viewport=viewport)
    page.route(LIST, lambda route: held.append(route))  # noqa: PLW0108
    page.goto(site.url)

    expect(page.locator(".ghost").first).to_be_visible()
    expect(page.locator("#list")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#status")).to_have_text("正在读取…")
    assert fits(page)

    held[0].continue_()
    expect(page.locator(".ghost")).to_have_count(0)
    expect(page.locator("#list")).not_to_have_attribute("aria-busy", "true")


def test_hostile_text_stays_text(site: Site, open_page: Opener) -> None:
    page = ready(open_page(site.url))

    assert shown_names(page)[0] == "<script>alert(1)</script> O'Brien"
    first = rows(page).first
    expect(first.locator(".c-ids")).to_contain_text("<img src=x onerror=alert(1)>")
    expect(first.locator(".c-description")).to_have_text('"><svg onload=alert(1)>')
    assert page.locator("#rows script, #rows img, #rows svg").count() == 0
    first.locator(".opener").click()
    expect(page.locator(".panel tbody tr")).to_have_count(1)


def test_overrides_of_direction_are_shown_as_wrong(
    site: Site, open_page: Opener
) -> None:
    page = ready(open_page(site.url))
    overrides = re.compile("[\u202a-\u202e\u2066-\u2069]")

    assert shown_names(page)[1] == "\ufffdgnp.exe\ufffd A"
    assert overrides.search(page.locator("#rows").inner_html()) is None
    isolated = rows(page).nth(1).locator(".c-description bdi")
    assert isolated.evaluate("one => getComputedStyle(one).unicodeBidi") == "isolate"


def test_characters_beyond_the_basic_plane_survive(
    site: Site, open_page: Opener
) -> None:
    page = ready(open_page(site.url))
    assert shown_names(page)[2] == "𠮷野𡈽"

    page.locator("#text").fill("𠮷")

    expect(rows(page)).to_have_count(1)
    expect(page.locator(".opener")).to_have_text("𠮷野𡈽")


def test_long_texts_are_cut_and_kept_in_the_title(
    site: Site, open_page: Opener
) -> None:
    page = ready(open_page(site.url))
    row = rows(page).nth(3)

    for line in (row.locator(".opener"), row.locator(".c-description .line")):
        assert line.evaluate("one => one.scrollWidth > one.clientWidth")
        assert line.evaluate("one => getComputedStyle(one).textOverflow") == "ellipsis"
        assert line.get_attribute("title")
    heights = rows(page).evaluate_all("all => all.map(one => one.offsetHeight)")
    assert heights[3] == heights[0]


def test_a_search_is_one_request_and_never_in_the_address(
    site: Site, open_page: Opener
) -> None:
    page = ready(open_page(site.url))
    asked: list[Request] = []
    page.on("request", lambda request: asked.append(request))  # noqa: PLW0108

    # All keys within one turn of the browser: no pause is long enough to search in.
    page.locator("#text").evaluate(
        "box => { for (const key of 'zhang') { box.value += key;"
        " box.dispatchEvent(new Event('input', { bubbles: true })); } }"
    )
    expect(page.locator("#status")).to_have_text(re.compile(r"^\d+ 个检查$"))

    lists = [one for one in asked if "study-list" in one.url]
    assert [parse_qs(urlsplit(one.url).query)["text"] for one in lists] == [["zhang"]]
    assert page.url == f"{site.url}/"
    assert page.evaluate("history.length") <= 2
    assert {name[0] for name in shown_names(page)} <= {"张", "Z"}


def test_a_new_search_ends_the_one_before(site: Site, open_page: Opener) -> None:
    page = ready(open_page(site.url))
    held: list[Route] = []

    def hold_first(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route(LIST, hold_first)
    with page.expect_request(LIST):
        page.locator("#text").fill("zzzz")
    with page.expect_event("requestfailed"):
        page.locator("#text").fill("𠮷")

    expect(rows(page)).to_have_count(1)
    assert shown_names(page) == ["𠮷野𡈽"]


def test_every_field_narrows_the_list(site: Site, open_page: Opener) -> None:
    page = ready(open_page(site.url))
    page.locator("#more-fields").click()

    page.locator("#patient-id").fill("P-4")
    expect(rows(page)).to_have_count(1)
    page.locator("#modalities button", has_text="MR").click()
    expect(page.locator(".state h2")).to_have_text("没有符合条件的检查")
    page.locator("#clear").click()
    expect(rows(page)).to_have_count(50)
    page.locator("#from").fill("2025-12-30")
    page.locator("#to").fill("2025-12-30")
    expect(rows(page)).to_have_count(1)
    expect(page.locator("#periods [aria-pressed=true]")).to_have_count(0)
    page.locator("#periods button").nth(0).click()
    expect(rows(page)).to_have_count(50)
    page.locator("#name").fill("wang")
    expect(rows(page).first).to_be_visible()
    expect(page.locator("#status")).to_have_text(re.compile(r"^\d+ 个检查$"))
    assert {name[0] for name in shown_names(page)} == {"王"}
    page.locator("#clear").click()
    page.locator("#accession").fill("9999")
    expect(rows(page)).to_have_count(1)


def test_further_pages_come_as_one_scrolls_and_each_study_once(
    site: Site, open_page: Opener
) -> None:
    page = ready(open_page(site.url))
    expect(rows(page)).to_have_count(50)

    for so_far in (100, TOTAL):
        page.locator("#foot").scroll_into_view_if_needed()
        expect(rows(page)).to_have_count(so_far)

    expect(page.locator("#status")).to_have_text(f"{TOTAL} 个检查")
    expect(page.locator("#more")).to_be_hidden()
    ids = rows(page).locator(".c-ids").all_inner_texts()
    assert len(set(ids)) == TOTAL


def test_the_keyboard_is_enough(site: Site, open_page: Opener) -> None:
    page = ready(open_page(site.url))
    page.keyboard.press("/")
    expect(page.locator("#text")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".opener").nth(0)).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    third = page.locator(".opener").nth(2)
    expect(third).to_be_focused()
    outline = third.evaluate("one => getComputedStyle(one).outlineStyle")
    assert outline == "solid"

    page.keyboard.press("Enter")
    expect(third).to_have_attribute("aria-expanded", "true")
    expect(page.locator(".panel tbody tr")).to_have_count(8)
    page.keyboard.press("Tab")
    expect(page.locator(".uid button")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".panel")).to_have_count(0)
    expect(third).to_be_focused()
    page.keyboard.press("End")
    # The next page may be there already.
    expect(page.locator(".opener").nth(49)).to_be_focused()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#text")).to_be_focused()


def test_a_study_opens_with_its_series_and_links(site: Site, open_page: Opener) -> None:
    page = ready(open_page(site.url, permissions=["clipboard-read", "clipboard-write"]))
    rows(page).nth(2).locator(".c-date").click()

    head, *body = page.locator(".panel tr").all_inner_texts()
    assert head.split() == ["序号", "检查类型", "序列描述", "部位", "图像"]
    assert len(body) == 8
    numbers = [line.split()[0] for line in body]
    assert numbers == sorted(
        numbers, key=lambda n: float("inf") if n == "–" else int(n)
    )
    hrefs = page.locator(".panel a").evaluate_all(
        "all => all.map(one => one.getAttribute('href'))"
    )
    assert all(href.startswith("/dicom-web/studies/1.2.826.9.3") for href in hrefs)
    page.locator(".head > button").click()
    expect(page.locator(".head > button")).to_have_text("已复制")
    assert page.evaluate("navigator.clipboard.readText()") == (
        "getscu -S -aec HUYING 127.0.0.1 11112"
        " -k 0008,0052=STUDY -k 0020,000d=1.2.826.9.3"
    )
    page.locator(".uid button").click()
    expect(page.locator(".uid button")).to_have_text("已复制")
    assert page.evaluate("navigator.clipboard.readText()") == "1.2.826.9.3"

    rows(page).nth(0).locator(".c-date").click()
    expect(page.locator(".panel")).to_have_count(1)
    expect(rows(page).nth(0).locator(".opener")).to_have_attribute(
        "aria-expanded", "true"
    )


def test_series_that_cannot_be_read_can_be_tried_again(
    site: Site, open_page: Opener, complaints: list[str]
) -> None:
    page = ready(open_page(site.url))
    page.route("**/dicom-web/**", lambda route: route.fulfill(status=500))
    page.locator(".opener").first.click()
    expect(page.locator(".note.bad")).to_be_visible()
    page.unroute("**/dicom-web/**")
    page.locator(".note button").click()

    expect(page.locator(".panel tbody tr")).to_have_count(1)
    assert all("500" in text for text in complaints)
    complaints.clear()


@pytest.mark.parametrize(
    ("locale", "lang"), [("en-US", "en"), ("zh-TW", "zh-CN"), ("fr-FR", "zh-CN")]
)
def test_the_first_language_is_the_browsers_or_chinese(
    site: Site, open_page: Opener, locale: str, lang: str
) -> None:
    page = ready(open_page(site.url, locale=locale))

    expect(page.locator("html")).to_have_attribute("lang", lang)


def test_the_language_stays_as_one_chose(site: Site, open_page: Opener) -> None:
    page = ready(open_page(site.url))
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    assert shown_names(page)[2] == "𠮷野𡈽"
    page.locator(".opener").nth(2).click()

    page.locator("#language").click()

    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page).to_have_title("Studies · 互影 Huying")
    assert shown_names(page)[2] == "Ma Ji"
    expect(page.locator(".panel tbody tr")).to_have_count(8)
    page.reload()
    expect(page.locator("h1")).to_have_text("Studies")
    page.goto(f"{site.url}/?lang=zh")
    expect(page.locator("h1")).to_have_text("检查列表")


def test_both_languages_say_everything(site: Site, open_page: Opener) -> None:
    page = ready(open_page(site.url))
    texts = page.evaluate(
        "import(document.querySelector('script').src).then(page => page.TEXTS)"
    )
    used = page.evaluate(
        "[...document.querySelectorAll('*')].flatMap(one => [one.dataset?.t,"
        " one.dataset?.tLabel, one.dataset?.tPlaceholder]).filter(Boolean)"
    )

    assert texts["zh"].keys() == texts["en"].keys()
    assert set(used) <= texts["zh"].keys()
    han = re.compile(r"[\u4e00-\u9fff]")
    assert [key for key, text in texts["zh"].items() if not han.search(text)] == []
    assert [key for key, text in texts["en"].items() if han.search(text)] == []
    for key, text in texts["zh"].items():
        assert ("{n}" in text) == ("{n}" in texts["en"][key]), key


def test_values_are_written_as_people_read_them(site: Site, open_page: Opener) -> None:
    page = ready(open_page(f"{site.url}/?lang=en"))

    def js(call: str) -> Any:
        return page.evaluate(
            f"import(document.querySelector('script').src).then(page => page.{call})"
        )

    assert [js(f"bytes({n})") for n in (0, 999, 1000, 1536, 10**6, 5 * 2**30)] == [
        "0 B", "999 B", "0.98 KB", "1.5 KB", "977 KB", "5 GB",
    ]  # fmt: skip
    assert js("names('Wang^Xiao Dong=王^小东=おう')") == {
        "first": "Wang Xiao Dong",
        "second": "王小东",
    }
    assert js("names('==')") == {"first": "", "second": ""}
    assert js("age('20000229', '20240228')") == "23 y"
    assert js("age('20231201', '20240115')") == "1 mo"
    assert js("age('20240101', '20240115')") == "14 d"
    assert js("age('20250101', '20240115')") == ""
    assert js("age('17890101', '20240115')") == ""
    assert js("age(null, '20240115')") == ""
    assert js("timeOfDay('093015.123')") == "09:30"
    assert js("day('2024')") == ""


def test_times_of_receipt_are_those_of_beijing(
    empty_site: Site, open_page: Opener
) -> None:
    populate(empty_site.database, [Made()])
    with empty_site.database.write() as connection:
        # 2020-12-31 20:15:30 UTC.
        connection.execute(update(Study).values(updated_us=1_609_445_730_000_000))

    page = ready(open_page(empty_site.url, timezone_id="America/New_York"))

    updated = page.locator(".study .c-updated")
    expect(updated).to_have_text("2021-01-01")
    expect(updated).to_have_attribute("title", "2021-01-01 04:15:30")


def test_activity_is_shown(site: Site, open_page: Opener) -> None:
    page = ready(open_page(site.url))

    expect(page.locator("#n-studies")).to_have_text(f"{TOTAL}")
    expect(page.locator("#in-day")).to_have_text(re.compile(r"^2,840 1\.39 GB$"))
    expect(page.locator("#spark rect")).to_have_count(60)
    expect(page.locator("#spark")).to_have_attribute(
        "aria-label", re.compile("最多 500 幅")
    )


def test_new_images_are_announced_and_change_nothing_unasked(
    empty_site: Site, open_page: Opener
) -> None:
    populate(empty_site.database, [Made(uid="1.1", study_date="20240101")])
    page = ready(open_page(empty_site.url))
    with page.expect_response("**/api/v1/activity"):
        pass
    with empty_site.database.write() as connection:
        connection.execute(update(Study).values(n_instances=77))

    expect(page.locator("#fresh")).to_be_visible()
    expect(page.locator(".study .c-images")).to_have_text("2")
    page.locator("#fresh").click()

    expect(page.locator(".study .c-images")).to_have_text("77")
    expect(page.locator("#fresh")).to_be_hidden()


@pytest.mark.parametrize("width", [320, 600, 901, 1000, 1101, 1920])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_width_shows_names_and_descriptions(
    site: Site, open_page: Opener, width: int, language: str
) -> None:
    page = ready(
        open_page(
            f"{site.url}/?lang={language}", viewport={"width": width, "height": 760}
        )
    )

    assert fits(page)
    for part in (".c-patient", ".c-ids", ".c-description"):
        box = rows(page).first.locator(part).bounding_box()
        assert box is not None
        assert box["width"] >= 120, part


def test_nothing_moves_for_those_who_asked_for_that(
    site: Site, open_page: Opener
) -> None:
    page = open_page("about:blank", reduced_motion="reduce")
    page.route(LIST, lambda _route: None)
    page.goto(site.url)

    bone = page.locator(".bone").first
    expect(bone).to_be_visible()
    assert bone.evaluate("one => getComputedStyle(one).animationName") == "none"


def test_everything_comes_from_the_node_itself(site: Site, open_page: Opener) -> None:
    asked: list[str] = []
    page = open_page("about:blank")
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site.url)
    ready(page)

    assert asked
    assert [url for url in asked if not url.startswith(site.url)] == []

"""The pages to listen to: what they say, and what they do in a real browser, where there is one."""

import base64
import csv
import html
import json
import os
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

import evaluate
from conftest import ROOT, write_dump
from lib import figures
from lib.dump import Dump
from lib.library import picture_of
from lib.page import url_of, write_song
from test_evaluate import ids_of, make_checkpoint

SCRIPT = "<img src=x onerror=document.title='hacked'><script>document.title='hacked'</script>"
TAGS = ["guitar", SCRIPT, "flute"]
THRESHOLDS = [0.01, 0.99, 0.02]  # an untrained network's scores are near 0.5: each clip has the first and the last tag
NAMES = ["plain.wav", "a 'b' \"c\".wav", "<i>&lt;&amp;#1.wav", "100% #2?.wav", "é🎸;=.wav", "<img src=x onerror=a>.wav"]
NAMES += [r"back\slash.wav", "javascript:alert(1).wav", "' onclick='document.title=1.wav", "%41.wav", "absent.wav"]
SONGS = [NAMES[3], NAMES[4], os.fsdecode(b"\xff.wav")]
FIRST = 29  # row of the first test clip; they have these names
VERDICTS = ["annotators", "network", "both", "neither"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Music under odd names, its dump, an untrained checkpoint, a report on it, and pages for some of the music."""
    data = tmp_path_factory.mktemp("data") / "a #folder, 100% & more"
    data.mkdir()
    for name in [*NAMES[:-1], SONGS[-1]]:
        soundfile.write(os.fsencode(data / name), 0.1 * np.sin(np.arange(33000) / 9), 11025)
    write_dump(data, n_clips=40, names=[TAGS[0], TAGS[2], TAGS[1]], files=dict(enumerate(NAMES, FIRST)))
    lines = ["clip_id\ttrack_number\ttitle\tartist\talbum\tmp3_path"]
    lines += [f"{101 + row}\t1\t{SCRIPT} {row}\tartist' onclick='{row}\talbum {row}\tp" for row in range(40)]
    (data / "clip_info_final.csv").write_text("\n".join(lines), encoding="utf-8")
    parts = ids_of(train=(101, 121), validation=(122, 124), test=(101 + FIRST, 141))
    changes = dict(tag_names=TAGS, thresholds=torch.tensor(THRESHOLDS, dtype=torch.float64), clip_ids=parts)
    make_checkpoint(data / "best.pt", dump=Dump(data).fingerprint, **changes)
    shutil.copy(ROOT / "experiments/pictures/curves.png", data)
    common = dict(checkpoint=data / "best.pt", device="cpu", output=data / "out")
    evaluate.main(evaluate.Settings(**common, data=data, resamples=20))
    evaluate.main(evaluate.Settings(**common, tag=[data / name for name in SONGS], page=True, top=2))
    return data


def rows_of(table):
    with open(table, encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def cells_of(page):
    """Return the text of each row of a page's tables."""
    text = re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    rows = [re.split("<t[hd][^>]*>", row)[1:] for row in re.split("<tr>|</table>", text)]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in row] for row in rows]


class Elements(HTMLParser):
    """A page's elements: [(name, {attribute: value}), ...]."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))


def test_a_report_lists_the_clips_and_runs_nothing_that_a_table_holds(folder):
    listed = rows_of(folder / "out/worth_a_listen.csv")
    tables = (rows_of(folder / f"out/{name}_test.csv") for name in ("labels", "predictions"))
    labels, scores = ({row["mp3_path"]: row for row in table} for table in tables)
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    elements = Elements(page).found
    assert [name for name, _ in elements].count("script") == 1
    assert not any(attribute.startswith("on") for _, attributes in elements for attribute in attributes)

    sides = dict.fromkeys(
        (row["tag"], ("no, network yes", "yes, network no")[int(row["annotators"])]) for row in listed
    )
    headings = re.findall("<h4>(.*)</h4>", html.unescape(page))
    assert headings == [f"{tag}: annotators {side}" for tag, side in sides]
    _, *entries = page.split('<li class="clip"')
    assert len(entries) == len(listed) == 21
    for entry, row in zip(entries, listed):
        (_, clip), *elements = Elements(f'<li class="clip"{entry}').found
        assert {name: clip[f"data-{name}"] for name in row} == row
        name, number = row["mp3_path"], FIRST + NAMES.index(row["mp3_path"])
        links = [unquote(attributes["href"]) for element, attributes in elements if element == "a"]
        assert links == [f"../{name}"] and f"artist&#39; onclick=&#39;{number}" in entry
        assert f"▶ {SCRIPT} {number}</a>" in html.unescape(entry)
        said = ("no", "yes")[int(row["annotators"])], ("yes", "no")[int(row["annotators"])]
        assert "annotators <b>{}</b>, network <b>{}</b>".format(*said) in entry
        annotated = [tag for tag in TAGS if labels[name][tag] == "1"]
        assert f"Annotated: {', '.join(annotated) or 'none of these tags'}." in html.unescape(entry)
        bars = re.findall(r"--score: (.*); --threshold: (.*)\"></span>\n<span>(.*?) ", entry)
        order = sorted(range(3), key=lambda tag: -float(scores[name][TAGS[tag]]) / THRESHOLDS[tag])
        for (score, threshold, shown), tag in zip(bars, [TAGS.index(row["tag"]), *order], strict=True):
            expected = float(scores[name][TAGS[tag]])
            assert (score, threshold) == (f"{expected:.3f}", f"{THRESHOLDS[tag]:.3f}")
            assert shown == f"{expected:.2f}" + "*" * (expected >= THRESHOLDS[tag])


def test_a_report_says_what_the_results_say(folder):
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    results, rows = json.loads((folder / "out/results.json").read_text()), cells_of(page)
    expected = []
    for row in results["test"]["tags"]:
        names = "roc_auc", "average_precision", "roc_auc_of_baseline", "roc_auc_of_names_only", "threshold", "precision"
        scores = [row[name] for name in (*names, "recall", "repeatability")]
        expected.append([row["tag"], str(row["positives"]), *("" if x is None else f"{x:.3f}" for x in scores)])
    assert [row for row in rows if row[:1] and row[0] in TAGS] == expected
    intervals = re.findall(r"<title>95% interval: (.*) to (.*)</title>\n<path d=\"M (\S+) 5 H (\S+) M (\S+) 1", page)
    for score, found in (("roc_auc", intervals[::2]), ("average_precision", intervals[1::2])):
        ends = [[row[f"{score}{end}"] for end in ("_low", "_high", "")] for row in results["test"]["tags"]]
        assert [place[:2] for place in found] == [tuple(f"{end:.3f}" for end in row[:2]) for row in ends]
        least = min(np.ravel(ends))
        assert np.allclose(np.array(found)[:, 2:].astype(float), 100 * (np.array(ends) - least) / (1.001 - least))

    for part, place in (("validation", 1), ("test", 2)):
        shown = {row[0]: row[place] for row in rows if len(row) == 3}
        assert shown["ROC-AUC"].startswith("{value:.4f} [{low:.4f}, {high:.4f}]".format_map(results[part]["roc_auc"]))
        assert ("left out" in shown) and (shown["left out"] != "") == (part == "validation"), "only there"
    said = {row[0]: " ".join(row[1].split()) for row in rows if len(row) == 2}
    assert said["data"] == str(folder) and said["clips"] == "20 train, 2 validation, 11 test, random split"
    assert said["epoch"] == "0 of unknown, the best on validation" and said["made with"] == "an earlier version"
    assert ["0", "0.1", "", "0.500"] in rows, "the curves in numbers"
    for text in ("SYNTHETIC clips", "Brackets: 95%, 20 resamples over tracks", "nothing published to compare with"):
        assert text in page

    pictures = [folder / "curves.png", *(folder / f"out/{name}.png" for name in ("per_tag", "correlations"))]
    embedded = re.findall('<img src="data:image/png;base64,(.*?)" alt="[^"]+">', page)
    assert [base64.b64decode(picture) for picture in embedded] == [picture.read_bytes() for picture in pictures]
    tables = (rows_of(folder / f"out/{name}_test.csv") for name in ("labels", "predictions"))
    labels, scores = (np.array([[float(row[tag]) for tag in TAGS] for row in table]) for table in tables)
    annotated, predicted = (np.corrcoef(columns.T) for columns in (labels, scores))
    pairs = sorted(((0, 1), (0, 2), (1, 2)), key=lambda pair: -annotated[pair])
    words = [f"{TAGS[a]} and {TAGS[b]}, {annotated[a, b]:.2f} ({predicted[a, b]:.2f})" for a, b in pairs]
    joined = ";\n".join(words)
    assert f"(and in the scores):\n{joined}\n" in html.unescape(page)


def test_a_picture_that_was_not_drawn_is_not_replaced_by_an_older_one(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "out", out := tmp_path / "out")
    monkeypatch.setattr(figures, "tag_correlations", lambda *_, **__: 1 / 0)
    evaluate.main(evaluate.Settings(checkpoint=folder / "best.pt", data=folder, output=out, device="cpu", resamples=9))
    assert "no picture drawn" in capsys.readouterr().err
    assert (out / "report.html").read_text(encoding="utf-8").count("data:image/png") == 1, "the curves"


def test_a_songs_page_shows_its_tags_over_time(tmp_path):
    tagger = SimpleNamespace(thresholds={"slow": 0.5, "<b>": 0.2}, cautions=["note: <careful>"])
    scores = np.array([[0.6, 0.1], [0.4, 0.3], [0.5, 0.2]])
    edges, tags = np.array([0, 65.4, 130, 200]), {"slow": 0.5, "<b>": 0.1}
    write_song(tmp_path / "page.html", tmp_path / "a/song.mp3", tagger, tags, b"\x89PNG", edges, scores)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    columns = re.findall(r'<i style="width: (\S+)%; --score: (\S+)"\s+(class="given")? title="(.*)"></i>', page)
    assert [float(width) for width, *_ in columns] == pytest.approx([32.7, 32.3, 35] * 2)
    assert [float(score) for _, score, *_ in columns] == [0.6, 0.4, 0.5, 0.1, 0.3, 0.2]
    assert [bool(given) for *_, given, _ in columns] == [True, False, True, False, True, True]
    assert [title for *_, title in columns][:3] == ["0:00: 0.60", "1:05: 0.40", "2:10: 0.50"]
    assert "<div>slow 0.50* <small>(0.50)" in page and "<div>&lt;b&gt; 0.10 <small>(0.20)" in page
    assert (
        'src="a/song.mp3"' in page and "note: &lt;careful&gt;" in page and base64.b64encode(b"\x89PNG").decode() in page
    )
    assert re.findall("<small>([0-9:]+)</small>", page) == ["0:00", "0:50", "1:40", "2:30", "3:20"]


def test_a_url_leads_to_the_file_itself(tmp_path):
    for name in ("here/page", "there/lists", "there/music"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "here/lists").symlink_to(tmp_path / "there/lists")
    assert url_of(tmp_path / "here/lists/../music/a.mp3", tmp_path / "here/page") == "../../there/music/a.mp3"
    assert url_of(tmp_path / "here/lists/a.mp3", tmp_path / "here/page") == "../lists/a.mp3", "both can be moved"
    assert url_of(tmp_path / os.fsdecode(b"a:\xff#.mp3"), tmp_path) == "a%3A%FF%23.mp3"


class Browser(webdriver.Chrome):
    """A Chromium without a window, which saves into a folder and keeps a log of requests."""

    def __init__(self, downloads):
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for option in ("--headless=new", "--no-sandbox", "--window-size=1200,900"):
            options.add_argument(option)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        super().__init__(options, webdriver.ChromeService(shutil.which("chromedriver")))

    def open(self, path):
        self.get(path.as_uri())

    def keys(self, *keys):
        webdriver.ActionChains(self).send_keys(*keys).perform()

    def wait_for(self, condition, *arguments):
        """Return the value of a JavaScript expression as soon as it is true."""
        return WebDriverWait(self, 10, 0.05).until(lambda _: self.value(condition, *arguments))

    def value(self, expression, *arguments):
        return self.execute_script(f"const audio = document.querySelector('audio'); return {expression}", *arguments)

    def click(self, element):
        """Click an element or the first of a CSS selector, once it is where nothing lies above it."""
        if isinstance(element, str):
            element = self.find_element(By.CSS_SELECTOR, element)
        self.value("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", element)
        element.click()

    def current(self):
        """Return the clip in the frame."""
        return self.find_element(By.CLASS_NAME, "current")

    def verdicts(self):
        return self.value("[...document.querySelectorAll('input:checked')].map(input => input.value)")

    def requests(self):
        """Return the URLs of all requests since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.get_log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]


@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium with its chromedriver on this machine")
    with Browser(tmp_path) as browser:
        yield browser


def test_clips_are_played_judged_and_saved(folder, browser, tmp_path):
    browser.open(folder / "out/report.html")
    listed = rows_of(folder / "out/worth_a_listen.csv")
    assert {row["mp3_path"] for row in listed} == {*NAMES}
    assert browser.value("audio.src") == "" and not any("wav" in url for url in browser.requests()), (
        "loads no music yet"
    )
    browser.click("[data-key=n]")
    seconds = browser.wait_for("audio.currentTime")
    assert browser.wait_for("audio.currentTime > arguments[0]", seconds), "it moves"

    given = [VERDICTS[place % 4] for place in range(len(listed))]
    for place, row in enumerate(listed):
        if row["mp3_path"] == "absent.wav":
            browser.wait_for("!document.querySelector('#absent').hidden")
            assert "absent.wav" in browser.find_element(By.ID, "absent").text
        else:
            browser.wait_for("audio.duration > 2.9 && audio.currentTime > 0")
            assert browser.value("document.querySelector('#absent').hidden")
        clip = browser.current()
        assert row["mp3_path"] in clip.text and clip.find_elements(By.TAG_NAME, "audio")
        assert browser.value("arguments[0].contains(document.activeElement)", clip), "the keyboard is there, too"
        top, bottom = browser.value("(box => [box.top, box.bottom])(arguments[0].getBoundingClientRect())", clip)
        assert 0 < top and bottom < browser.value("document.querySelector('footer').getBoundingClientRect().top"), (
            "seen"
        )
        assert unquote(browser.value("audio.src")).endswith(f"/{row['mp3_path']}")
        browser.keys(str(1 + place % 4), "n")
    browser.keys("b")
    assert browser.current().get_attribute("data-mp3_path") == listed[-2]["mp3_path"]

    browser.refresh()
    assert browser.verdicts() == given, "kept"
    assert browser.find_element(By.ID, "tally").text == (
        "clip – of 21; verdicts: annotators 6, network 5, both 5, neither 5"
    )
    browser.click("[data-key=s]")
    table = tmp_path / "verdicts.csv"
    WebDriverWait(browser, 10).until(lambda _: table.exists())
    saved = rows_of(table)
    assert [row.pop("verdict") for row in saved] == given
    assert [float(row.pop("threshold")) for row in saved] == [THRESHOLDS[TAGS.index(row["tag"])] for row in saved]
    assert saved == listed

    assert browser.title == folder.name, "no name has run as a script"
    assert all(url.startswith(("file:///", "data:", "blob:")) for url in browser.requests()), "none leaves the page"
    assert [entry for entry in browser.get_log("browser") if "absent.wav" not in entry["message"]] == []


def test_one_finds_the_way_through_the_clips(folder, browser):
    browser.open(folder / "out/report.html")
    browser.click(".tags a[href='#tag-3']")
    browser.keys("n")
    clip = browser.current()
    assert clip.get_attribute("data-tag") == "flute", "the first of that tag"
    browser.wait_for("!audio.paused")
    browser.keys("p")
    browser.wait_for("audio.paused && audio.currentTime < 2.5")
    browser.execute_script("document.dispatchEvent(new KeyboardEvent('keydown', {key: '1', ctrlKey: true}))")
    assert browser.verdicts() == []
    other = clip.find_element(By.XPATH, "following-sibling::li")
    browser.click(other.find_element(By.CSS_SELECTOR, "input[value=both]"))
    assert browser.current() == other
    browser.click("[data-key=b]")
    assert browser.current() == clip
    place = browser.value("[...document.querySelectorAll('.clip')].indexOf(arguments[0])", other)
    browser.execute_script(f"Math.random = () => ({place} + 0.5) / 21")
    browser.keys("r")
    assert browser.current() != other, "it has a verdict"
    browser.refresh()
    assert browser.verdicts() == ["both"]
    browser.keys("n")
    assert browser.current() == browser.find_element(By.CLASS_NAME, "clip")
    browser.keys("1")
    browser.refresh()
    browser.keys("n")
    assert browser.current() == browser.find_elements(By.CLASS_NAME, "clip")[1], "the first without a verdict"
    browser.execute_script("Storage.prototype.setItem = () => { throw new Error('full'); }")
    browser.keys("2")
    assert "does not keep them" in browser.find_element(By.ID, "tally").text


def test_a_policy_forbids_what_does_not_come_from_the_page(folder, browser):
    browser.open(folder / "out/report.html")
    browser.execute_script("""
        window.refused = [];
        document.addEventListener("securitypolicyviolation", event => refused.push(event.effectiveDirective));
        const url = "http://127.0.0.1:9/", codes = [`<img src=${url}>`, `<base href=${url}>`, `<audio src=${url}>`];
        for (const code of [...codes, "<b onclick='document.title = 1' id='b'>text</b>"])
            document.body.insertAdjacentHTML("afterbegin", code);
        document.querySelector("#b").click();
        fetch(url).catch(() => {});
    """)
    expected = ["base-uri", "connect-src", "img-src", "media-src", "script-src-attr"]
    assert browser.wait_for("refused.length == 5 && refused.sort()") == expected
    assert browser.title == folder.name


def test_the_table_sorts_by_any_column_and_fits_a_phone(folder, browser):
    browser.open(folder / "out/report.html")
    headings = browser.find_elements(By.CSS_SELECTOR, "th button")
    rows = "[...document.querySelectorAll('.tags tbody tr')]"
    column = f"{rows}.map(row => row.cells[arguments[0]].dataset.value)"
    browser.value(f"{rows}.forEach((row, place) => {{ row.cells[1].dataset.value = ['9', '', '10'][place]; }})")
    for place, heading in enumerate(headings):
        browser.click(heading)
        once = browser.value(column, place)
        browser.click(heading)
        twice = browser.value(column, place)
        numbers = [float(value or 0) for value in once] if place else []
        assert numbers == sorted(numbers, reverse=True) if place else once == sorted(TAGS)
        assert [value or "0" for value in twice] == [value or "0" for value in once[::-1]]
    pale = browser.value("getComputedStyle(document.body).backgroundColor")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert browser.value("getComputedStyle(document.body).backgroundColor") != pale
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert browser.value("document.documentElement.scrollWidth") == 390


def test_a_line_moves_with_a_song_and_a_click_goes_there(folder, browser):
    pages = [picture_of(folder / name, folder / "out").with_suffix(".html") for name in SONGS]
    browser.open(pages[2])
    assert browser.title == r"\udcff.wav" and browser.wait_for("audio.duration") > 2.9
    browser.open(pages[0])
    strips = browser.find_elements(By.CLASS_NAME, "strip")
    assert browser.title == SONGS[0] and len(strips) == 2
    assert len(strips[0].find_elements(By.TAG_NAME, "i")) == 3, "a column for each second"
    line = "document.querySelector('#now').getBoundingClientRect().left"
    image = browser.find_element(By.CSS_SELECTOR, "#over-time img")
    browser.keys("p")
    start = browser.wait_for(f"audio.currentTime && {line}")
    assert browser.wait_for(f"{line} > arguments[0]", start), "it moves"
    browser.keys("p")
    webdriver.ActionChains(browser).move_to_element_with_offset(image, image.size["width"] // 4, 0).click().perform()
    assert 0.75 * 33000 / 11025 <= browser.value("audio.currentTime") < 2.8
    browser.wait_for(f"{line} > arguments[0]", image.location["x"] + 0.74 * image.size["width"])
    os.rename(folder / SONGS[1], folder / "moved.wav")
    browser.open(pages[1])
    browser.wait_for("!document.querySelector('#absent').hidden")
    assert SONGS[1] in browser.find_element(By.ID, "absent").text
    os.rename(folder / "moved.wav", folder / SONGS[1])

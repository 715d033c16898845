"""The page of `cai compare` in a real browser: twenty comparisons with a kill among them, and what texts may not do."""

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from test_compare import EVIL, MENDED, asked, command, jsonl, lines_of, pairs, serving, transcripts, url_of
from test_people import comparisons, config

from cai_jax import records, workdir
from cai_jax.compare.matches import of_queue
from cai_jax.errors import InputError
from cai_jax.stages import people

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --window-size=1280,900"
LEFT, RIGHT = "\ue012", "\ue014"  # the arrow keys of WebDriver
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="wants chromium and chromedriver")


class Browser:
    """Chromium through ChromeDriver, by the protocol of W3C WebDriver."""

    def __init__(self, driver, folder):
        said = next(line for line in driver.stdout if "started successfully" in line)
        self.base = f"http://127.0.0.1:{re.search('port ([0-9]+)', said)[1]}/session"
        chrome = {"binary": CHROMIUM, "args": [*FLAGS.split(), f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}, "unhandledPromptBehavior": "ignore"}
        self.base += "/" + self("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def __call__(self, path, **body):
        data = json.dumps(body).encode()
        asked = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()) from None

    def js(self, code, *args):
        return self("/execute/sync", script=code, args=args)

    def press(self, key):
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self("/actions", actions=[{"type": "key", "id": "keys", "actions": keys}])

    def cdp(self, name, **params):
        return self("/goog/cdp/execute", cmd=name, params=params)

    def key(self, key, **about):
        self.cdp("Input.dispatchKeyEvent", type="keyDown", key=key, code=f"Key{key.upper()}", **about)
        self.cdp("Input.dispatchKeyEvent", type="keyUp", key=key, code=f"Key{key.upper()}")

    def until(self, code):
        """What a piece of JavaScript says, as soon as it is true."""
        for _ in range(400):
            if found := self.js(f"return {code}"):
                return found
            time.sleep(0.025)
        raise AssertionError(f"never: {code}; the page says: {self.js('return document.body.innerText')}")

    def logged(self):
        return [entry["message"] for entry in self("/se/log", type="browser")]

    def close(self):
        asked = urllib.request.Request(self.base, method="DELETE")
        with urllib.request.urlopen(asked, timeout=60):
            pass


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            started = Browser(driver, tmp_path_factory.mktemp("profile"))
            yield started
            started.close()
        finally:
            driver.terminate()


@pytest.fixture
def begin():
    """Begins the command; what still runs of it at the end is killed."""
    begun = []
    yield lambda *flags: begun.append(command(*flags)) or begun[-1]
    for process in begun:
        with process:
            process.kill()


def opened(browser, url):
    browser("/url", url=url)
    browser.until(READY)


def shown(browser):
    """-> (the two answers, the count)."""
    return browser.js("return ['answer1', 'answer2', 'count'].map((id) => document.getElementById(id).textContent)")


def act(browser, way):
    """Presses a key, or clicks on a button by its id, and waits until that is saved."""
    before = shown(browser)[2]
    browser.js("document.getElementById('said').textContent = ''")
    if len(way) == 1:
        browser.press(way)
    else:
        browser.js("document.getElementById(arguments[0]).click()", way)
    browser.until("document.getElementById('said').textContent")
    assert shown(browser)[2] != before


WAYS = {
    LEFT: "left",
    "2": "right",
    "t": "good",
    "left": "left",
    "b": "bad",
    RIGHT: "right",
    "1": "left",
    "s": "skip",
    "right": "right",
}
P_LEFT = {"left": 1.0, "right": 0.0, "good": 0.5, "bad": 0.5}


def test_twenty_comparisons_and_a_kill_among_them(browser, begin, tmp_path):
    run, out = transcripts(tmp_path, 20, said=lambda model, id: f"{id} {model} {EVIL}"), tmp_path / "out.jsonl"
    flags = f"--run={run}", "--models=sl_cai,rl_cai", f"--out={out}", "--rater=Ann", "--scale=harmlessness"
    process, seen = begin(*flags), []
    opened(browser, url_of(process))
    for n in range(20):
        if n == 10:
            process.kill()
            process.communicate()
            browser.js("document.getElementById('note').value = 'stays'")
            browser.press("1")
            browser.until("document.getElementById('trouble').textContent.startsWith('Not saved: nobody answers')")
            assert browser.js("return document.getElementById('note').value") == "stays"
            assert shown(browser)[2] == "Comparison 11 of 20" and len(lines_of(out)) == 9  # one was skipped
            process = begin(*flags)
            opened(browser, url_of(process))
        if n == 5:
            browser("/refresh")
            browser.until(READY)
        one, two, count = shown(browser)
        assert count == f"Comparison {n + 1} of 20"
        assert browser.js("return [...document.querySelectorAll('main *')].map((e) => e.tagName)") == TAGS
        way = list(WAYS)[n % len(WAYS)]
        if n == 12:  # a slip, and undone
            act(browser, "b")
            act(browser, "u")
            assert shown(browser) == [one, two, count]
        if n == 3:
            time.sleep(0.3)  # read it
        act(browser, way)
        assert browser.js("return document.title") != "hit"
        seen.append((one, two, WAYS[way]))
    browser.until("!document.getElementById('done').hidden")
    assert (
        browser.js("return ['match', 'choices', 'skip'].some((id) => document.getElementById(id).checkVisibility())") is False
    )
    assert "18 rated, 2 skipped." in browser.js("return document.body.innerText")
    assert browser.js("return document.getElementById('bar').value") == 20
    exported = browser.js("return fetch(document.querySelector('#done a').href).then((r) => r.text())")
    process.terminate()
    process.communicate()
    kept = lines_of(out)
    assert len({r["id"] for r in kept}) == 18 and exported.count("\n") == 18
    assert kept[3]["seconds"] >= 0.2 and {r["rater"] for r in kept} == {"Ann"}
    judged = [(one, two, P_LEFT[choice]) for one, two, choice in seen if choice != "skip"]
    for (one, two, p_left), r in zip(judged, kept, strict=True):
        assert {one, two} == {r["response_a"], r["response_b"]} and r["p_a"] == (
            p_left if one == r["response_a"] else 1 - p_left
        )
        for name, response in ((r["model_a"], r["response_a"]), (r["model_b"], r["response_b"])):
            assert response == f"{r['id']} {name.upper()[::-1]} {MENDED}"
    assert {r["response_a"] == one for (one, _, p), r in zip(judged, kept, strict=True) if p in (0, 1)} == {True, False}
    assert [line for line in browser.logged() if "/rate" not in line] == []  # nothing that the policy had to stop


READY = "document.readyState == 'complete' && document.getElementById('count').textContent"
TAGS = [
    "SECTION",
    "DIV",
    "H3",
    "P",
    *("DIV", *("ARTICLE", "H2", "DIV") * 2),
    "LABEL",
    "KBD",
    "TEXTAREA",
    "H1",
    "P",
    "P",
    "A",
    "P",
]


def test_what_people_said_of_the_queue_is_what_the_run_goes_on_with(browser, begin, tmp_path):
    """Two people label what the stage asks for; both prefer the refusal, but Ben likes nothing of the first."""
    records.write(tmp_path / "preferences/comparisons.jsonl", comparisons())
    workdir.finish("preferences", tmp_path, {}, ("comparisons.jsonl",))
    with pytest.raises(InputError, match="6 of 60 comparisons wait for people"):
        people.run(config(share=0.1), tmp_path, None)
    outs = []
    for rater in ("Ann", "Ben"):
        outs.append(tmp_path / f"{rater}.jsonl")
        process = begin(f"--queue={tmp_path / people.QUEUE}", f"--out={outs[-1]}", f"--rater={rater}")
        opened(browser, url_of(process))
        for n in range(6):
            one, two, _ = shown(browser)
            assert one.startswith("First ") != two.startswith("First ")  # a recipe and a refusal
            act(browser, "b" if (rater, n) == ("Ben", 0) else RIGHT if one.startswith("First ") else LEFT)
        browser.until("!document.getElementById('done').hidden")
        process.terminate()
        process.communicate()
    both = tmp_path / "both.jsonl"
    both.write_text("".join(out.read_text() for out in outs))
    assert people.run(config(share=0.1, labels=str(both)), tmp_path, None)
    asked = {r["id"]: r["p_a"] for r in lines_of(tmp_path / "people/comparisons.jsonl") if r["source"] == "people"}
    first = lines_of(outs[0])[0]["id"]
    assert len(asked) == 6 and asked.pop(first) == 0.25 and set(asked.values()) == {0.0}  # b refuses


def test_the_second_of_two_tabs_moves_on(browser, tmp_path):
    with serving(pairs(), tmp_path / "out.jsonl") as (client, _):
        opened(browser, f"http://{client.place}{client.path}")
        assert client.rate(0, "left")[0] == 200
        browser.press("2")
        browser.until("document.getElementById('trouble').textContent.includes('in another tab')")
        assert shown(browser)[2] == "Comparison 2 of 4"
        act(browser, "2")
    assert [(r["id"], r["p_a"]) for r in lines_of(tmp_path / "out.jsonl")] == [("q0", 1.0), ("q1", 1.0)]  # q1: b is on the left


def test_keys_rate_only_when_they_are_meant_to(browser, tmp_path):
    with serving(pairs(), tmp_path / "out.jsonl") as (client, kept):
        opened(browser, f"http://{client.place}{client.path}")
        for modifiers in (1, 2, 4):  # Alt, Control, Meta
            browser.key("s", modifiers=modifiers)
        browser.key("s", autoRepeat=True)  # held down
        for key in ("x", "3"):
            browser.press(key)
        browser.press("n")
        for key in "1tsu":
            browser.press(key)
        browser.press("\ue00c")  # Escape
        assert browser.js("return document.getElementById('note').value") == "1tsu" and kept.standing == {}
        act(browser, "1")
        assert browser.js("return document.getElementById('note').value") == ""
        assert browser.js("return document.activeElement.id") == "count"
        act(browser, "u")
        assert browser.js("return document.getElementById('note').value") == "1tsu" and kept.standing == {}
        act(browser, "1")
    assert [(r["id"], r["note"]) for r in lines_of(tmp_path / "out.jsonl")] == [("q0", "1tsu")]


CONTRAST = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const linear = (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
const parts = (colour) => numbers(colour).slice(0, 3).map((x, i) => linear(x / 255) * [0.2126, 0.7152, 0.0722][i]);
const light = (colour) => parts(colour).reduce((sum, x) => sum + x);
const style = (e) => getComputedStyle(e);
const behind = (e) => numbers(style(e).backgroundColor)[3] === 0 ? behind(e.parentElement) : style(e).backgroundColor;
return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && e.innerText).map((e) => {
  const [a, b] = [light(style(e).color), light(behind(e))];
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName, e.id];
}).sort((x, y) => x[0] - y[0]);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_long_texts_fit_any_screen_and_can_be_read(width, scheme, browser, tmp_path):
    row = {"id": "q", "messages": asked("w" * 300), "response_a": "x" * 100_000, "response_b": "\n".join(["line"] * 500)}
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    try:
        browser.cdp("Emulation.setDeviceMetricsOverride", **screen)
        browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        with serving(of_queue(jsonl(tmp_path / "q.jsonl", [row]), 0), tmp_path / "out.jsonl") as (client, _):
            opened(browser, f"http://{client.place}{client.path}")
            for end in (0, 10**7):
                wide, bar = browser.js(
                    "window.scrollTo(0, arguments[0]); const bar = document.querySelector('footer').getBoundingClientRect();"
                    "return [document.documentElement.scrollWidth, [bar.top, bar.bottom]]",
                    end,
                )
                assert wide <= width and 600 < bar[0] < bar[1] <= 800.5
            sizes = browser.js(
                "return [...document.querySelectorAll('#choices button')].map((b) => b.getBoundingClientRect().height)"
            )
            assert min(sizes) >= 44 and len(set(sizes)) == 1
            ratio, *what = browser.js(CONTRAST)[0]
            assert ratio >= 4.5, what
            dark = browser.js("return getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", dark))) < 60) == (scheme == "dark")
    finally:
        browser.cdp("Emulation.clearDeviceMetricsOverride")
        browser.cdp("Emulation.setEmulatedMedia", features=[])


def test_what_a_screen_reader_is_told(browser, tmp_path):
    with serving(pairs(), tmp_path / "out.jsonl") as (client, _):
        opened(browser, f"http://{client.place}{client.path}")
        nodes = browser.cdp("Accessibility.getFullAXTree")["nodes"]
    found = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
    names = ["Answer 1", "Both good", "Both bad", "Answer 2", "Skip", "Undo the last"]
    assert sorted(name for role, name in found if role == "button") == sorted(names)
    told = {("textbox", "Note, if there is something to say"), ("progressbar", "Comparison 1 of 4"), ("region", "Conversation")}
    told |= {
        ("article", "Answer 1"),
        ("article", "Answer 2"),
        ("group", "Which answer helps more?"),
        ("status", ""),
        ("alert", ""),
    }
    assert told <= set(found)

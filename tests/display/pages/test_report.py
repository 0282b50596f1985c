"""The report: its structure by an HTML parser, and what it does in headless Chromium."""

import base64
import contextlib
import dataclasses
import json
import math
import os
import re
import select
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import cli
from mpsearch.core.evaluation import Evaluation
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.display.page import page
from mpsearch.plan_search.plan_usage import with_usage
from mpsearch.plan_search.results.compared import Compared
from mpsearch.plan_search.results.measured_front import measured_front
from mpsearch.plan_search.results.result import SearchResult

ROOT = Path(__file__).resolve().parent.parent.parent.parent
PRECISIONS = mps.precisions("w2 w4 w8a8")
EVIL = "</script><script>alert('x')</script>&amp;\"{{verdict}}<b>"


def made(count=6, *, names=None, tolerance=None, uniform=True, damage=None, seed=0, wins=True, budget=None):
    """A result without a search: random plans over `count` layers, with known numbers."""
    generator = np.random.default_rng(seed)
    names = names or [f"block.{i}.fc" for i in range(count)]
    layers = tuple(
        mps.Layer(name, "linear", (10, i + 1), macs=10 * (i + 1), group="pair" if i < 2 else "")
        for i, name in enumerate(names)
    )
    numel = np.array([layer.numel for layer in layers], float)
    bits = np.array([2.0, 4.0, 8.0])
    cost = np.outer(1 + generator.random(count), 4.0**-bits)
    posterior = mps.CostTable(
        layers, PRECISIONS, cost, usage={"memory_bytes": np.outer(numel, bits / 8)},
        reference_usage={"memory_bytes": 4 * numel.sum()}, unit="nats", origin={"estimator": "posterior of 9 plans"},
    )  # fmt: skip
    rows = [np.full(count, p) for p in range(3)] if uniform else []
    rows += [generator.integers(0, 3, count) for _ in range(12)]
    for options in rows:
        options[:2] = options[0]  # one group
    plans = [
        with_usage(mps.Plan({x.name: PRECISIONS[p] for x, p in zip(layers, options, strict=True)}), posterior)
        for options in rows
    ]
    values = [float(cost[np.arange(count), options].sum()) for options in rows] if damage is None else damage(len(rows))
    measured = MeasuredPlans(tuple(plans), values, np.full(len(rows), 0.001), "nats", {"samples": 64})
    number = len(rows) - 1
    plan = dataclasses.replace(
        plans[number], budget=budget or {"memory_bytes": plans[number].usage["memory_bytes"] + 1.0},
        predicted={"sensitivity": 0.5, "unit": "nats", "status": "feasible", "bound": 0.4, "gap": 0.2},
        origin={"search": {"select": {"damage": values[number], "se": 0.001, "unit": "nats"}, "seed": 0}},
    )  # fmt: skip
    plain = Evaluation(0.0, 0.0, 0.3, 0.02, 0.9, 0.01, 50)
    found = Evaluation(0.05, 0.004, 0.35, 0.03, 0.8, 0.011, 50, reference=plain)
    comparison = [Compared("plan", "plan", plan.usage, found, 0.05, 0.004, 0.0, 0.0)]
    if uniform:
        comparison.append(Compared("w4", "uniform", plans[1].usage, found, 0.07, 0.005, 0.02, 0.0021))
    settings = {
        "max_passes": 40.0, "budget": {"memory_bytes": "1MB"}, "tolerance": tolerance, "metric": "kl", "seed": 0,
        "stages": {"tables": 3.0, "plans": 20.0, "report": 1.5}, "environment": {"mpsearch": "0.1.0", "python": "3.11"},
    }  # fmt: skip
    return SearchResult(
        plan, "mixed precision wins by 0.02 ± 0.0021 nats over uniform w4", wins, found,
        ("w4", found) if uniform else None, comparison, measured_front(measured, "memory_bytes"),
        {"posterior": posterior}, measured, 24.5, settings, 1.25, {"weights": "abc"}, {},
    )  # fmt: skip


class Tree(HTMLParser):
    """Elements as (tag, attributes, text inside), and the stack, which has to be empty at the end."""

    VOID = ("meta", "link", "wbr")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.all = [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), (tag, attributes)
        self.all.append([tag, dict(attributes), "", len(self.stack)])
        if tag not in self.VOID:
            self.stack.append(self.all[-1])

    def handle_startendtag(self, tag, attributes):
        self.all.append([tag, dict(attributes), "", len(self.stack)])

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        for one in self.stack:
            one[2] += data

    def of(self, tag, **wanted):
        return [one for one in self.all if one[0] == tag and all(one[1].get(k) == v for k, v in wanted.items())]

    def rows(self, **wanted):
        """Texts of the cells of the body of a table."""
        start = self.all.index(self.of("table", **wanted)[0])
        depth, found = self.all[start][3], []
        for tag, _, text, level in self.all[start + 1 :]:
            if level <= depth:
                break
            if tag == "tr":
                found.append([])
            elif tag in ("td", "th"):
                found[-1].append(text)
        return found

    @property
    def data(self):
        return json.loads(self.of("script", id="data")[0][2])


def plan_of(data, point, folder):
    """What the script writes into plan.json, read back."""
    layers = {name: data["precisions"][p] for name, p in zip(data["layers"], point["choice"], strict=True)}
    (folder / "plan.json").write_text(json.dumps({"mpsearch_plan": 1, "layers": layers, **point["plan"]}))
    return mps.Plan.load(folder / "plan.json")


def test_the_page_is_whole_and_needs_no_network():
    text = page(made())
    tree = Tree(text)
    titles = [one[2] for one in tree.of("h2")]
    assert titles == [
        "Plan", "Against uniform precision", "Pareto curve", "Layers", "Proof", "Passes", "Settings", "Environment",
    ]  # fmt: skip
    assert tree.of("h1")[0][2] == "Mixed precision wins by 0.02 ± 0.0021 nats over uniform w4"
    ids = [one[1]["id"] for one in tree.all if "id" in one[1]]
    assert len(ids) == len(set(ids))
    for one in tree.all:
        for name in ("src", "href"):
            assert one[1].get(name, "data:").startswith("data:")
        assert one[1].get("aria-labelledby", ids[0]) in ids
        assert one[0] != "th" or one[1].get("scope") in ("col", "row")
        assert one[0] != "svg" or one[1]["aria-label"]
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert "{{" not in text
    assert tree.of("meta", **{"http-equiv": "Content-Security-Policy"})[0][1]["content"].startswith(
        "default-src 'none'"
    )


def test_what_the_tables_say():
    result = made()
    tree = Tree(page(result))
    posterior = result.tables["posterior"]
    rows = tree.rows(id="layers")
    assert rows[0] == ["#", "name", "kind", "group", "precision", "parameters", "memory", "sensitivity [nats]"]
    for number, (layer, row) in enumerate(zip(posterior.layers, rows[1:], strict=True)):
        precision = result.plan[layer.name]
        size = layer.numel * precision.weight_bits / 8
        cost = posterior.sensitivity[number, PRECISIONS.index(precision)]
        assert row[:6] == [str(number + 1), layer.name, "linear", layer.group, str(precision), str(layer.numel)]
        assert row[6] == f"{size:#.3g} B"
        assert float(row[7]) == pytest.approx(cost, rel=5e-3)
    text = tree.of("body")[0][2]
    for words in (
        "0.05 ± 0.004", "80.0 ± 1.1 %", "0.02 ± 0.0021", "unquantized", "gap20 %", "posterior of 9 plans",
        "24.5 forward-pass equivalents of 40 allowed", "budgetmemory_bytes 1MB", "python3.11", "weightsabc",
    ):  # fmt: skip
        assert words in text, words
    bars = tree.of("rect")
    assert [float(one[1]["height"]) for one in bars] == [p.weight_bits for p in result.plan.values()]
    assert [one[2] for one in bars] == [f"{name}: {precision}" for name, precision in result.plan.items()]


def test_the_points_are_the_plans_that_none_beats(tmp_path):
    result = made(damage=lambda count: np.linspace(1.0, 0.1, count).tolist())
    data = Tree(page(result)).data
    both = list(zip((p.usage["memory_bytes"] for p in result.plans.plans), result.plans.damage.tolist(), strict=True))
    best = [a for a in both if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in both)]
    assert [(p["use"], p["damage"]) for p in data["points"] if p["front"]] == sorted(best)
    assert [p["uniform"] for p in data["points"] if p["kind"] == "uniform"] == ["w2", "w4", "w8a8"]
    assert [p["kind"] for p in data["points"]].count("chosen") == 1
    assert data["limit"] == result.plan.budget["memory_bytes"]
    assert data["tolerance"] is None
    assert data["log"]
    known = {tuple(map(str, plan.values())): plan for plan in result.plans.plans}
    for point in data["points"]:
        found = plan_of(data, point, tmp_path)
        assert list(found) == list(result.plan)
        assert dict(found) == dict(known[tuple(map(str, found.values()))])
        assert found.usage["memory_bytes"] == point["use"]
        assert data["x"][0] < point["use"] < data["x"][1]
        assert data["y"][0] < point["damage"] < data["y"][1]
        if point["kind"] == "chosen":
            assert found == result.plan
    use = [point["use"] for point in data["points"]]
    assert data["x"][1] - data["x"][0] < 1.2 * (max(use) - min(use))
    for axis, ticks in (("x", "xTicks"), ("y", "yTicks")):
        places = [value for value, _ in data[ticks]]
        assert len(places) >= 3
        assert data[axis][0] <= min(places)
        assert max(places) <= data[axis][1]


def test_damage_that_is_not_positive_has_a_linear_axis():
    data = Tree(page(made(damage=lambda count: np.linspace(-0.1, 0.2, count).tolist()))).data
    assert not data["log"]
    assert data["y"][0] < -0.1


def test_equal_plans_have_an_axis_too():
    data = Tree(page(made(1, damage=lambda count: [0.5] * count))).data
    assert data["x"][0] < data["x"][1]
    assert data["y"][0] < data["y"][1]


def test_a_tolerance_is_drawn_and_no_bound_is_claimed():
    result = made(tolerance=0.25)
    plan = dataclasses.replace(result.plan, budget={}, predicted={**result.plan.predicted, "bound": None, "gap": None})
    tree = Tree(page(dataclasses.replace(result, plan=plan)))
    assert tree.data["tolerance"] == 0.25
    assert tree.data["limit"] is None
    assert "gapnot known" in tree.of("body")[0][2]


def test_without_a_uniform_precision_that_fits():
    tree = Tree(page(made(uniform=False)))
    assert "No uniform precision fits what was asked for." in tree.of("body")[0][2]
    assert not [point for point in tree.data["points"] if point["kind"] == "uniform"]


@pytest.mark.parametrize(("wins", "mark"), [(True, "wins"), (False, "loses"), (None, "level")])
def test_the_verdict_has_its_colour(wins, mark):
    assert Tree(page(made(wins=wins))).of("body")[0][1]["class"] == mark


def test_names_are_escaped():
    result = made(3, names=[EVIL, "b'\"", "c" * 300])
    result = dataclasses.replace(result, verdict=EVIL, identity={EVIL: EVIL}, settings={**result.settings, EVIL: EVIL})
    tree = Tree(page(result))
    assert len(tree.of("script")) == 2
    assert not tree.of("b", style=None)
    assert [one for one in tree.of("th") if one[2] == EVIL]
    assert tree.of("h1")[0][2] == EVIL
    assert tree.data["layers"][0] == EVIL
    assert tree.of("rect")[0][2].startswith(EVIL)


def test_a_thousand_layers():
    text = page(made(1000))
    assert len(text) < 500_000
    assert len(Tree(text).rows(id="layers")) == 1001


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = [torch.randn(20, 5) for _ in range(4)]
    mps.search(model, data, mps.Budget(average_bits=3), mps.precisions("w2 w3 w4"), max_passes=20, progress=False).save(
        folder
    )
    return folder


def test_the_command_writes_the_page_of_a_folder(searched, tmp_path, capsys):
    assert cli.main(["report", str(searched), "-o", str(tmp_path / "report.html"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    result = SearchResult.load(searched)
    assert said == {"report": str(tmp_path / "report.html"), "verdict": result.verdict, "wins": result.wins}
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text == page(result)
    tree = Tree(text)
    recorded = {one[0]: one[1] for one in tree.rows(**{"class": "keys"}) if len(one) == 2}
    assert recorded["gap"]
    environment = result.settings["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["mpsearch"] == mps.__version__
    assert all(f"{name}{value}" in tree.of("main")[0][2] for name, value in environment.items())


def test_the_command_tells_what_is_missing(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path), "-o", str(tmp_path / "report.html")]) == 2
    assert "summary.json" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_command_writes_no_page_under_another_name(searched, tmp_path, capsys):
    assert cli.main(["report", str(searched), "-o", str(tmp_path / "report.png")]) == 2
    assert "expected a name that ends with .html" in capsys.readouterr().err
    assert not (tmp_path / "report.png").exists()


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout, not an installed package")
def test_the_template_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["package-data"]["mpsearch.display"] == ["report.html"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


class Browser:
    """Headless Chromium, driven over a pipe: commands and events are JSON texts that end in a zero byte."""

    def __init__(self, folder):
        here, there = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{here[0]} 4>&{there[1]}', "bash", CHROMIUM, "--headless", "--no-sandbox",
             "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(here[0], there[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(here[0])
        os.close(there[1])
        self.out, self.into = os.fdopen(here[1], "wb", 0), os.fdopen(there[0], "rb", 0)
        self.left, self.number, self.session, self.events = b"", 0, None, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True)

    def close(self):
        with contextlib.suppress(EOFError, BrokenPipeError):
            self.session = None
            self("Browser.close")
        self.process.wait(20)
        self.out.close()
        self.into.close()

    def __call__(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            found = self.read()
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def read(self):
        while b"\0" not in self.left:
            ready = select.select([self.into], [], [], 60)[0]
            more = self.into.read(1 << 16) if ready else b""
            if not more:
                raise EOFError("Chromium says nothing more")
            self.left += more
        text, self.left = self.left.split(b"\0", 1)
        return json.loads(text)

    def wait(self, method):
        """The next event of this name, also one that has come already."""
        while True:
            for number, event in enumerate(self.events):
                if event["method"] == method:
                    return self.events.pop(number)["params"]
            self.events.append(self.read())

    def open(self, path, width=1200, height=900, dark=False):
        self.events.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script):
        """The value of a script in the page."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def mouse(self, kind, x, y):
        more = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x, y):
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            more = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)

    def middle(self, selector):
        """The middle of an element, scrolled into sight."""
        return self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.scrollIntoView({{block: 'center',"
            " behavior: 'instant'}); const box = one.getBoundingClientRect();"
            " return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )

    def picture(self, path):
        height = self.run("document.documentElement.scrollHeight")
        width = self.run("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self):
        """Errors and warnings of the console, exceptions, and whatever was asked of a network."""
        self.run("0")
        return [
            event
            for event in self.events
            if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
            or (
                event["method"] == "Network.requestWillBeSent"
                and not event["params"]["request"]["url"].startswith(("file:", "data:", "blob:"))
            )
        ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def written(folder, result):
    path = folder / "report.html"
    result.report(path)
    return path


KINDS = {
    "plain": lambda: made(),
    "deep": lambda: made(1000),
    "escaped": lambda: made(3, names=[EVIL, "b'\"", "c" * 300]),
    "tolerance": lambda: made(tolerance=0.25),
    "no uniform": lambda: made(uniform=False),
    "linear": lambda: made(damage=lambda count: np.linspace(-0.1, 0.2, count).tolist()),
    "one layer": lambda: made(1, damage=lambda count: [0.5] * count),
}


@in_browser
@pytest.mark.parametrize("kind", KINDS)
def test_no_complaint_and_nothing_sticks_out(browser, tmp_path, kind):
    path = written(tmp_path, KINDS[kind]())
    for width, dark in ((320, True), (700, False), (1600, False)):
        browser.open(path, width, dark=dark)
        assert browser.complaints() == []
        assert browser.run("document.documentElement.scrollWidth") == width
        assert browser.run(
            "[...document.querySelectorAll('#curve svg *')].every(one => !one.outerHTML.includes('NaN'))"
        )
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == dark


@in_browser
def test_hover_shows_the_plan_at_a_point(browser, tmp_path):
    result = made()
    browser.open(written(tmp_path, result))
    points = Tree((tmp_path / "report.html").read_text()).data["points"]
    browser.middle("#curve svg")
    places = browser.run(
        "[...document.querySelectorAll('#curve .point path')].map(one => {"
        " const box = one.getBoundingClientRect(); return [box.left + box.width / 2, box.top + box.height / 2]; })"
    )
    assert browser.run("document.getElementById('point-name').textContent") == "Chosen plan"
    told = set()
    for point, (x, y) in zip(points, places, strict=True):
        browser.mouse("mouseMoved", x, y)
        if all(math.dist((x, y), other) > 2 for other in places if other != [x, y]):
            assert browser.run("document.getElementById('point-text').textContent") == point["text"]
            assert browser.run("document.querySelector('#curve .shown').getAttribute('aria-label')").startswith(
                f"{point['name']}: {point['text']}"
            )
            told.add(point["text"])
    assert len(told) > 5
    assert browser.complaints() == []


@in_browser
def test_click_and_keys_download_the_plan(browser, tmp_path):
    browser.open(written(tmp_path, made()))
    data = Tree((tmp_path / "report.html").read_text()).data
    browser("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "down"), eventsEnabled=True)

    def downloaded():
        while browser.wait("Browser.downloadProgress")["state"] != "completed":
            pass
        (path,) = (tmp_path / "down").iterdir()
        assert path.name == "plan.json"
        found = mps.Plan.load(path)
        path.unlink()
        return found

    chosen = next(number for number, point in enumerate(data["points"]) if point["kind"] == "chosen")
    browser.click(*browser.middle("#curve .uniform path"))
    first = next(point for point in data["points"] if point["kind"] == "uniform")
    assert downloaded() == plan_of(data, first, tmp_path)
    browser.run(f"document.querySelectorAll('#curve .point')[{chosen}].focus()")
    browser.press("Enter")
    assert downloaded() == plan_of(data, data["points"][chosen], tmp_path)
    browser.press("ArrowRight")
    browser.press("Enter")
    after = data["points"][(chosen + 1) % len(data["points"])]
    assert downloaded() == plan_of(data, after, tmp_path)
    browser.click(*browser.middle("#download"))
    assert downloaded() == plan_of(data, after, tmp_path)
    assert browser.complaints() == []


@in_browser
@pytest.mark.parametrize("column", range(8))
def test_click_sorts_the_layers(browser, tmp_path, column):
    result = made(30)
    browser.open(written(tmp_path, result))
    posterior = result.tables["posterior"]
    keys = []
    for number, layer in enumerate(posterior.layers):
        precision = result.plan[layer.name]
        option = PRECISIONS.index(precision)
        size, cost = posterior.usage["memory_bytes"][number, option], posterior.sensitivity[number, option]
        keys.append((number, number, layer.kind, layer.group, precision.weight_bits, layer.numel, size, cost)[column])
    order = sorted(range(30), key=keys.__getitem__)
    shown = "[...document.querySelectorAll('#layers tbody tr td:first-child')].map(one => Number(one.textContent) - 1)"
    place = browser.middle(f"#layers th:nth-child({column + 1}) button")
    browser.click(*place)
    assert browser.run(shown) == order
    head = f"document.querySelectorAll('#layers thead th')[{column}].getAttribute('aria-sort')"
    assert browser.run(head) == "ascending"
    browser.click(*place)
    falling = browser.run(shown)
    assert [keys[number] for number in falling] == [keys[number] for number in reversed(order)]
    assert browser.run(head) == "descending"
    assert browser.run("document.querySelectorAll('#layers [aria-sort]').length") == 1
    assert browser.complaints() == []


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_is_told_from_its_ground(browser, tmp_path, dark):
    """Contrast of at least 4.5 (WCAG 2.2, 1.4.3) for every text of the page and of the curve."""
    browser.open(written(tmp_path, made()), dark=dark)
    found = browser.run("""
      [...document.querySelectorAll('body *')].filter(one => [...one.childNodes].some(part => part.nodeType === 3 && part.data.trim())
        && one.checkVisibility() && !['SCRIPT', 'NOSCRIPT', 'title'].includes(one.tagName)).map(one => {
        let ground = one;
        while (ground.parentElement && getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
        const style = getComputedStyle(one);
        const color = one.closest('svg') ? style.fill : style.color;
        return [one.textContent.trim().slice(0, 40), color, getComputedStyle(ground).backgroundColor];
      })""")
    assert len(found) > 60

    def luminance(color):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for text, color, ground in found:
        low, high = sorted((luminance(color), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, color, ground)

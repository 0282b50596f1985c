"""Every public name is documented: what it is, each of its arguments and attributes. A single argument may stand in the sentence.

The pages of docs/ list every option and every name of the command line, links between pages lead somewhere, and the tables of README.md
hold what benchmarks/results hold.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest

import mpsearch
from mpsearch import CostTable, Plan, Precision
from mpsearch.cli.parser import parser
from mpsearch.core.formats import NUMBER_FORMATS
from mpsearch.export import EXPORTERS, READERS, TARGETS
from mpsearch.imports import IMPORTERS, TABLE_IMPORTERS
from mpsearch.plan_search.proposers import PROPOSERS
from mpsearch.resources import DEVICES, RESOURCES
from mpsearch.sensitivity import ESTIMATORS
from mpsearch.solvers import SOLVERS

ROOT = Path(__file__).resolve().parents[2]
checkout = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="needs a checkout, not an installed package")

PARTS = (
    "sensitivity",
    "solvers",
    "resources",
    "export",
    "imports",
    "display.figures",
    "quantizers",
    "testing",
)


def public():
    """Qualified name -> object, of everything that a user may import."""
    found = {f"mpsearch.{name}": getattr(mpsearch, name) for name in mpsearch.__all__}
    for part in PARTS:
        module = importlib.import_module(f"mpsearch.{part}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "") or ""
            if (
                name[0] != "_"
                and own.startswith(module.__name__)
                and (inspect.isclass(value) or inspect.isfunction(value))
            ):
                found[f"mpsearch.{part}.{name}"] = value
    return found


def promised():
    """Methods of protocols, and `cost` of `mps.forecast`: documented there, not in each class that keeps the promise."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("mpsearch.")]
    protocols = [x for module in modules for x in vars(module).values() if getattr(x, "_is_protocol", False)]
    return {"cost"} | {name for protocol in protocols for name in vars(protocol) if name[0] != "_"}


PUBLIC = public()
PROMISED = promised()


def told(docstring):
    """Names that stand before a colon at the start of a line, several with commas."""
    names = re.findall(r"^\s*([\w*, ]+):(?: |$)", docstring, re.MULTILINE)
    return {name.strip().lstrip("*") for line in names for name in line.split(",")}


def undocumented(function):
    """Parameters of a function of several that its docstring neither tells nor refers to."""
    docstring = inspect.getdoc(function) or ""
    if re.search(r"[Ss]ee `", docstring):
        return []
    told_of = told(docstring)
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls") and name[0] != "_"]
    return [name for name in names if name not in told_of] if len(names) > 1 else []


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_is_documented(name):
    value = PUBLIC[name]
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        assert undocumented(value) == []
        return
    if dataclasses.is_dataclass(value):
        fields = {field.name for field in dataclasses.fields(value) if field.name[0] != "_"}
        assert fields - told(inspect.getdoc(value)) == set()
    for method, function in vars(value).items():
        function = getattr(function, "__func__", function)
        if method[0] == "_" or not inspect.isfunction(function):
            continue
        assert inspect.getdoc(function), f"no docstring of {method}"
        inherited = any(method in vars(base) for base in value.__mro__[1:])
        if method not in PROMISED and not inherited:
            assert undocumented(function) == [], f"in {method}"


def test_type_checkers_see_the_public_names_where_they_are_loaded_from():
    """`from module import name as name`, for type checkers alone, against the list that is read at run time."""
    tree = ast.parse(inspect.getsource(mpsearch))
    exported = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpsearch.")
        for alias in node.names
    }
    assert exported == mpsearch._MODULES
    assert sorted(exported) == mpsearch.__all__
    assert set(exported) <= set(dir(mpsearch))
    with pytest.raises(AttributeError, match="no attribute 'birds'"):
        mpsearch.birds  # noqa: B018


@checkout
def test_the_citation_is_that_of_this_version():
    """The keys that the format requires (https://citation-file-format.github.io, 1.2.0), and the facts of pyproject.toml."""
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"] == mpsearch.__version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert citation["keywords"] == project["keywords"]


@checkout
@pytest.mark.slow
def test_the_reference_has_a_page_of_every_public_name(tmp_path):
    pytest.importorskip("pdoc")
    command = [sys.executable, "docs/reference.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    pages = {page: page.read_text() for page in tmp_path.rglob("*.html")}
    anchors = {name for text in pages.values() for name in re.findall(r'<section id="(\w+)">', text)}
    assert {name.rsplit(".", 1)[1] for name in PUBLIC} <= anchors
    first = pages[tmp_path / "mpsearch.html"]
    for folder in ("sensitivity", "solvers", "resources", "export"):
        assert f'href="mpsearch/{folder}.html"' in first


def rows(page, title):
    """Cells of the rows of the tables below a title."""
    section = re.split(rf"^## {title}$", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)[1]
    lines = re.findall(r"^\| (`.*) \|$", section.split("\n## ")[0], re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


@checkout
def test_the_page_of_names_is_that_of_the_code():
    """Every name once, with its settings; `python docs/names.py` writes it anew."""
    place = ROOT / "docs" / "names.py"
    spec = importlib.util.spec_from_file_location("names", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert place.with_suffix(".md").read_text() == module.page()
    for title, known in (
        ("Estimators", ESTIMATORS),
        ("Solvers", SOLVERS),
        ("Proposers", PROPOSERS),
        ("Resources", RESOURCES),
    ):
        for row, (name, cls) in zip(rows("names.md", title), known.items(), strict=True):
            assert row[0] == f"`{name}`"
            settings = [text.split("=")[0] for text in re.findall(r"`([^`]+)`", row[2])]
            assert settings == [field.name for field in dataclasses.fields(cls)]
    read_back = {row[0].strip("`"): row[3] == "yes" for row in rows("names.md", "Tools to export to")}
    assert read_back == {name: name in READERS for name in EXPORTERS}
    assert [row[0].strip("`") for row in rows("names.md", "Bytes as a tool stores them")] == [*TARGETS]
    assert [row[0].strip("`") for row in rows("names.md", "Tools to import from")] == [*IMPORTERS, *TABLE_IMPORTERS]


@checkout
def test_devices_and_formats_are_listed():
    assert (
        f"Devices of `roofline`: {', '.join(f'`{name}`' for name in DEVICES)}."
        in (ROOT / "docs" / "names.md").read_text()
    )
    listed = [row[0].strip("`") for row in rows("names.md", "Number formats")]
    assert listed == [name for name, facts in NUMBER_FORMATS.items() if not facts.parametric]
    explained = {name for row in rows("files.md", "Precision") for name in re.findall(r"`([a-z]\w*)`", row[0])}
    assert {name for name in explained if name[0] != "w"} <= set(NUMBER_FORMATS)


@checkout
def test_every_option_of_the_command_line_is_listed():
    """With the commands that take it, and its default where all of them have the same."""
    commands = next(action for action in parser()._actions if action.choices).choices
    takes, defaults = {}, {}
    for command, taker in commands.items():
        for action in taker._actions:
            name = max(action.option_strings, key=len, default="")
            if name not in ("", "--help", "--quiet", "--json"):
                takes.setdefault(name, []).append(command)
                defaults.setdefault(name, set()).add(str(action.default or ""))
    told = {re.match(r"`(--[\w-]+)", row[0])[1]: row for row in rows("command_line.md", "Options")}
    assert {name: row[1].split(", ") for name, row in told.items()} == takes
    for name, values in defaults.items():
        if len(values) == 1 and values.isdisjoint({"", "[]", "0"}):
            assert told[name][3] == f"`{values.pop()}`", name
    for row in told.values():
        for value, command in re.findall(r"`([^`]+)` \((\w+)\)", row[3]):
            assert value in [action.default for action in commands[command]._actions], row[0]


@checkout
def test_the_files_that_the_page_shows_can_be_read(tmp_path):
    page = (ROOT / "docs" / "files.md").read_text()
    shown = dict(re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    for ending, kind in (("csv", CostTable), ("json", Plan)):
        (tmp_path / f"shown.{ending}").write_text(shown[ending])
        read = kind.load(tmp_path / f"shown.{ending}")
        assert {"stem", "body"} == {getattr(layer, "name", layer) for layer in read.layers}
    examples = page.split("| example |")[1].split("\n\n")[0]
    for text in re.findall(r"`(w\w+)`", examples):
        assert str(Precision.parse(text)) == text


def anchors(page):
    """Of its titles, as they are made where the page is shown: small letters, blanks as hyphens, other signs left out."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def texts():
    """Page -> its prose: of every Markdown file outside results, and of the notebooks."""
    found = {
        page: page.read_text() for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"))
    }
    for page in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(page.read_text())["cells"]
        found[page] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return found


@checkout
def test_links_lead_somewhere():
    for page, text in texts().items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" not in link:
                path, _, anchor = link.partition("#")
                target = page.parent / path if path else page
                assert target.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@checkout
def test_files_that_the_pages_name_exist():
    """Paths between backquotes that begin with a folder of the repository, and scripts behind `python`."""
    for page, text in texts().items():
        for path in re.findall(
            r"`(?:python )?((?:benchmarks|docs|notebooks|tests|sensitivity|solvers)/[\w./-]+)[` ]", text
        ):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def tables(path):
    """Header and rows of every table of a page."""
    found = []
    for block in re.findall(r"^(?:\|.*\|\n)+", path.read_text() + "\n", re.MULTILINE):
        header, _, *lines = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
        found.append((header, lines))
    return found


@checkout
@pytest.mark.parametrize("page", ["README.md", "benchmarks/LOG.md"])
def test_tables_are_those_of_the_results(page):
    """Where a page has columns of a table in results, its rows stand there."""
    compared = 0
    for path in (ROOT / "benchmarks" / "results").glob("*.md"):
        for header, lines in tables(path):
            for told, shown in tables(ROOT / page):
                if len(told) > 3 and set(told) <= set(header):
                    columns = [*range(len(told))] if told == header else [header.index(name) for name in told]
                    known = [[line[column] for column in columns] for line in lines]
                    assert [row for row in shown if row not in known] == [], path.name
                    compared += 1
    assert compared >= {"README.md": 3, "benchmarks/LOG.md": 1}[page]


def shown_rows(first):
    """Rows of the table of README.md whose first column has this title."""
    return next(lines for header, lines in tables(ROOT / "README.md") if header[0] == first)


@checkout
def test_the_table_of_plans_on_cifar_is_that_of_its_file():
    csv = pd.read_csv(ROOT / "benchmarks" / "results" / "cifar_resnet20.csv")
    expected = [
        [
            f"{row.average_bits_limit:g} bits",
            row.estimator,
            f"{row.memory_bytes / 1e3:.1f} kB",
            f"{row.kl:.3f} ± {row.kl_se:.3f}",
            f"{100 * row.accuracy:.1f} %",
            f"{row.uniform}, {row.uniform_memory_bytes / 1e3:.1f} kB",
            f"{row.uniform_kl:.3f} ± {row.uniform_kl_se:.3f}",
            f"{100 * row.uniform_accuracy:.1f} %",
            f"{row.kl_difference:.3f} ± {row.kl_difference_se:.3f}",
        ]
        for row in csv.itertuples()
    ]
    assert shown_rows("budget") == expected


@checkout
def test_the_table_of_solvers_is_that_of_its_file():
    """Median time of three tables; the most that a plan called optimal lost, told where it is a hundredth of a percent."""
    csv = pd.read_csv(ROOT / "benchmarks" / "results" / "solvers.csv")
    header, lines = next(
        (header, lines) for header, lines in tables(ROOT / "README.md") if header[:2] == ["table", "Exact"]
    )
    assert len(lines) == 5
    for line in lines:
        layers, options, kind, budgets = re.fullmatch(r"(\d+) x (\d+) (\w+), (\d) budgets?", line[0]).groups()
        fitting = (
            (csv.layers == int(layers))
            & (csv.options == int(options))
            & (csv.table == kind)
            & (csv.budgets == int(budgets))
        )
        for solver, cell in zip(header[1:], line[1:], strict=True):
            runs = csv[fitting & (csv.solver == solver)]
            if runs.empty:
                assert cell == "-"
                continue
            median = runs.seconds.median()
            told = f"{median:.3g} s" if median >= 1 else f"{1e3 * median:.3g} ms"
            if runs.regret.max() >= 1e-4:
                told += f", up to {float(f'{100 * runs.regret.max():.2g}'):g} % worse"
            assert cell == told, (line[0], solver)

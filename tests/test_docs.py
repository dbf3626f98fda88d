"""The pages of docs/ hold no dead link, no option, parameter or error text that is not there, no code that fails."""

import ast
import dataclasses
import functools
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import DOCS, LINK, PAGES, ROOT, commands, fenced, known_options, parse, slug, tables

import mpcompile
from mpcompile import NM, errors
from mpcompile.cli.inspect_commands import default_as_yaml
from mpcompile.driver.run_plan import RUNTIMES, plan_of
from mpcompile.passes import PASSES, NMMask
from mpcompile.recipe.schema import Recipe
from mpcompile.runtimes.tensorrt.rules import SPARSITY_RULES

RESULTS = ROOT / "benchmarks" / "results"
pages = pytest.mark.parametrize("page", PAGES)


def test_contributing_names_what_there_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = [link for link in LINK.findall(text) if not link.startswith("http")]
    assert files
    for path in (*files, *re.findall(r"`((?:mpcompile|passes|runtimes|tests|benchmarks)/[\w./]*)`", text)):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


@pages
def test_links_lead_somewhere(page: str) -> None:
    for link in LINK.findall(PAGES[page]):
        target, _, anchor = link.partition("#")
        assert not target.startswith(("http:", "https:", "/")), f"{link}: a page links inside the repository alone"
        path = (DOCS / target).resolve() if target else DOCS / f"{page}.md"
        assert path.is_file(), link
        assert path.is_relative_to(ROOT), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_pages_stand_in_one_order() -> None:
    """Navigation and overview name every page once, in the same order."""
    navigation = re.findall(r"^\s*- .*: ([\w-]+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    overview = re.findall(r"^\| \[[^]]+\]\(([\w-]+)\.md\)", PAGES["index"], re.MULTILINE)
    assert navigation == ["index", *overview]
    assert sorted(navigation) == sorted(PAGES)
    assert "](docs/index.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pages
def test_every_page_has_an_example_that_is_tested(page: str) -> None:
    """Python is run, a recipe is read, a command is parsed: by the tests below."""
    shown = [words for words in commands(PAGES[page]) if words[0] == "mpcompile"]
    assert shown or fenced(PAGES[page], "python") or fenced(PAGES[page], "yaml")


@pages
def test_options_exist(page: str) -> None:
    own = "".join(line for line in PAGES[page].splitlines(keepends=True) if "python benchmarks/" not in line)
    own = re.sub(r"torchrun[^`]*? -m mpcompile", "mpcompile", own)  # without the options of torchrun itself
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", own))
    assert shown <= known_options(), shown - known_options()


@pages
def test_commands_shown_are_understood(page: str) -> None:
    for program, *args in commands(PAGES[page]):
        if program == "mpcompile":
            parse(args)


@pytest.mark.parametrize("line", ["bench", "bench out/ --pattern 2:4", "m.pt --seed x", "m.pt --no-such 1"])
def test_a_command_that_is_not_understood_is_found(line: str) -> None:
    with pytest.raises(Exception, match=r"Missing|No such option|valid integer"):
        parse(line.split())


@pages
def test_make_knows_its_targets(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in re.findall(r"`make ([\w-]+)", PAGES[page]):
        assert re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE), word


@pages
def test_recipes_shown_are_recipes(page: str) -> None:
    for text in fenced(PAGES[page], "yaml"):
        assert plan_of(Recipe.from_yaml(text)).passes


@pages
def test_python_shown_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = fenced(PAGES[page], "python")
    if not blocks:
        pytest.skip("no Python on this page")
    exec(compile("\n".join(blocks), str(DOCS / f"{page}.md"), "exec"), {"__name__": "shown"})


def test_the_runtime_shown_works_from_a_package_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's first two blocks as a package with the entry point that the page shows, also with a fixed batch."""
    page = PAGES["writing-a-runtime"]
    package, info = tmp_path / "your_package", tmp_path / "your_package-1.0.dist-info"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "runtime.py").write_text("\n".join(fenced(page, "python")[:2]), encoding="utf-8")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: your-package\nVersion: 1.0\n", encoding="utf-8")
    [project] = fenced(page, "toml")
    [(name, target)] = tomllib.loads(project)["project"]["entry-points"]["mpcompile.runtimes"].items()
    (info / "entry_points.txt").write_text(f"[mpcompile.runtimes]\n{name} = {target}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = Recipe.checked({"target": name, "batch": 1, "bench": {"batches": [1], "seconds": 0.1}})
    model = mpcompile.Request("mpcompile.testing:TinyMLP", input_size=(1, 8, 8), mean=(0.5,), std=(0.5,))
    artifact = mpcompile.compile(model, recipe, passes=[NMMask(NM(2, 4))], output=tmp_path / "out")
    assert artifact.report.environment[f"target {name}"] == f"your-package 1.0 ({target})"
    assert artifact.report.latency


def test_parameters_are_those_of_the_passes() -> None:
    """Every pass with its effect, every parameter with its default, in the order of `mpcompile passes`."""
    sections = re.findall(r"^### ([\w-]+)\n(.*?)(?=^##)", PAGES["recipes"], re.DOTALL | re.MULTILINE)
    assert [name for name, _ in sections] == list(PASSES)
    for name, text in sections:
        assert text.strip().lower().startswith(str(PASSES[name].effect)), name
        shown = [(row["parameter"], row["default"]) for table in tables(text) for row in table]
        fields = dataclasses.fields(PASSES[name])  # type: ignore[arg-type]
        assert shown == [(f"`{field.name}`", f"`{default_as_yaml(field)}`") for field in fields], name


def test_keys_are_those_of_a_recipe() -> None:
    def keys(value: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
        for key, default in value.items():
            if isinstance(default, dict):
                yield from keys(default, f"{key}.")
            else:
                yield f"{prefix}{key}", default

    def spelt(value: object) -> str:
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    [shown] = [table for table in tables(PAGES["recipes"]) if "key" in table[0]]
    expected = [(f"`{key}`", f"`{spelt(value)}`") for key, value in keys(Recipe().model_dump(mode="json"))]
    assert [(row["key"], row["default"]) for row in shown] == expected


def test_targets_and_rules_are_those_of_the_runtimes() -> None:
    where = [row for table in tables(PAGES["fast-where"]) for row in table]
    named = set(re.findall(r"`([\w-]+)`", " ".join(row.get("target", "") for row in where)))
    assert set(RUNTIMES) <= named
    rules = [(row["rule"], row["says"], row["standing"]) for row in where if "rule" in row]
    assert rules == [(rule.name, rule.says, rule.standing) for rule in SPARSITY_RULES]


def test_every_results_file_is_named_and_can_be_made_again() -> None:
    named = {Path(link).name for link in LINK.findall(PAGES["results"]) if "benchmarks/results/" in link}
    assert named == {path.name for path in RESULTS.iterdir()}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for table in tables(PAGES["results"]):
        for row in table:
            [script] = re.findall(r"python (benchmarks/\w+\.py)", row["command"])
            assert (ROOT / script).is_file(), script
            if "file" in row:
                written = re.findall(r"results/([\w.{},/]+)", (ROOT / script).read_text(encoding="utf-8"))
                assert any(text.startswith((f"{Path(script).stem}.", f"{Path(script).stem}{{")) for text in written), (
                    script
                )
            assert "bench-models" not in row["command"] or re.search("^bench-models:", makefile, re.MULTILINE)


@pytest.mark.parametrize("page", ["results", "paper", "fast-where", "patterns"])
def test_numbers_found_are_those_of_the_files(page: str) -> None:
    """What stands in a column `found` stands in the file that its row names, digit by digit."""
    number = re.compile(r"\d+\.\d+|\d+(?=%)")
    checked = 0
    for table in tables(PAGES[page]):
        for row in table:
            for link in LINK.findall(row.get("file", "")):
                if link.endswith(".md"):
                    there = set(number.findall((DOCS / link).read_text(encoding="utf-8")))
                    told = set(number.findall(row["found"]))
                    assert told <= there, f"{link} has no {', '.join(sorted(told - there))}"
                    checked += len(told)
    assert checked


def test_published_shares_follow_from_their_rows() -> None:
    [table] = [table for table in tables(PAGES["results-accuracy"]) if "dense → result" in table[0]]
    rows = [(row["dense → result"].split(" → "), row["of dense"]) for row in table if "→" in row["dense → result"]]
    assert len(rows) >= 20
    for (dense, result), share in rows:
        assert share == f"{100 * float(result) / float(dense):.1f} %", (dense, result)


@functools.cache
def texts_of_the_source() -> list[tuple[str, int | None]]:
    """Every text of the source but docstrings, its fields as …, and the exit code where it is that of an error."""
    codes = {name: kind.exit_code for name, kind in vars(errors).items() if hasattr(kind, "exit_code")}

    def spelt(node: ast.AST) -> str | None:
        if isinstance(node, ast.JoinedStr):
            return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None

    found: list[tuple[str, int | None]] = []
    links = (ROOT / "mpcompile" / "passes", ROOT / "mpcompile" / "runtimes")  # to the folders at the root
    for path in (path for folder in ("mpcompile", "passes", "runtimes") for path in (ROOT / folder).rglob("*.py")):
        if any(path.is_relative_to(link) for link in links):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        left_out |= {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in node.values}
        for node in ast.walk(tree):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            inside = [(node, codes.get(called)), *((part, codes[called]) for part in ast.walk(node) if called in codes)]
            found += [(text, code) for part, code in inside if id(part) not in left_out and (text := spelt(part))]
    return found


def test_errors_quoted_are_those_of_the_source() -> None:
    """Each quoted text, cut at its …, is in one text of the source, and under the exit code of its error."""
    source = texts_of_the_source()
    sections = re.findall(r"^## Exit code (\d)(.*?)(?=^## |\Z)", PAGES["troubleshooting"], re.DOTALL | re.MULTILINE)
    assert [int(code) for code, _ in sections] == list(range(1, 8))
    for code, text in sections:
        for row in (row for table in tables(text) for row in table):
            pieces = [re.escape(piece) for piece in row["error"].strip("`").split("…") if piece]
            assert max(map(len, pieces)) >= 9, f"{row['error']}: too little of it is quoted to tell it apart"
            found = [of for literal, of in source if re.search(".*?".join(pieces), literal)]
            assert found, f"{row['error']}: no text of the source is like it"
            raised = {of for of in found if of is not None}
            assert int(code) in raised or not raised, f"{row['error']}: its exit code is {raised}"


def test_lines_quoted_are_those_of_the_source() -> None:
    """What a page quotes in a column `line`, cut at its …, is in one text of the source."""
    source = [text for text, _ in texts_of_the_source()]
    quoted = [
        row["line"].strip("`") for page in PAGES.values() for table in tables(page) for row in table if "line" in row
    ]
    assert quoted
    for text in quoted:
        pattern = ".*?".join(re.escape(piece) for piece in text.split("…") if len(piece) > 2)
        assert any(re.search(pattern, literal) for literal in source), text


def test_messages_quoted_are_those_of_the_native_operators() -> None:
    source = "".join(path.read_text("utf-8") for path in (ROOT / "runtimes" / "native" / "src").glob("ort_*.cpp"))
    quoted = [
        row["message"].strip("`") for table in tables(PAGES["troubleshooting"]) for row in table if "message" in row
    ]
    assert len(quoted) > 5
    for text in quoted:
        assert f'"{text}"' in source, text


def test_errors_in_python_are_told_with_their_exit_codes() -> None:
    [told] = [table for table in tables(PAGES["python"]) if "class" in table[0]]
    kinds = {name: kind for name, kind in vars(errors).items() if hasattr(kind, "exit_code")}
    expected = {f"`{name}`": str(kind.exit_code) for name, kind in kinds.items() if kind is not errors.MpcompileError}
    assert {row["class"]: row["exit code"] for row in told} == expected


def test_the_verdict_is_read_as_it_is_written() -> None:
    source = [" ".join(text.split()) for text, _ in texts_of_the_source()]
    quoted = [" ".join(text.split()) for text in re.findall(r'\*"(.*?)"\*', PAGES["start"], re.DOTALL)]
    assert len(quoted) > 5
    for text in quoted:
        pattern = ".*?".join(re.escape(piece) for piece in text.split("…"))
        assert any(re.fullmatch(pattern, literal) for literal in source), text


def test_the_site_builds(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install -e '.[docs]' (make docs does)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert (tmp_path / "site" / f"{page}.html").is_file()
    assert (tmp_path / "site" / "repository" / "benchmarks" / "results" / "budget.svg").is_file()

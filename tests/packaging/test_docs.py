"""What the documents say exists: links, paths, commands, options, extras, Python examples."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from medusa_deploy.runtime.tree import Tree
from medusa_deploy.tools.cli import VERBS
from support.documents import DOCS, README, ROOT, blocks, commands, inline_commands, outside_blocks
from support.text import text_bundle

FOLDERS = ("benchmarks", "calibration", "docs", "export", "heads", "runtime", "src", "tests", "tools")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
# Commands of other programs, which no test here runs.
FOREIGN = ("cd", "curl", "git", "ls", "source", ".", "cat")
# Which test runs a verb, where it isn't tests/tools/verbs/test_VERB.py.
RUN_BY = {"export": "tests/tools/verbs/test_export_verb.py", "triton": "tests/runtime/serve/test_triton.py"}


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-")


def id_of(value: Path | list[str]) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else " ".join(value)


@pytest.mark.parametrize("path", DOCS, ids=id_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", outside_blocks(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        headings = re.findall(r"^#+ (.*)", file.read_text("utf-8"), re.MULTILINE) if anchor and file.is_file() else []
        if not file.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", DOCS, ids=id_of)
def test_every_path_in_code_type_exists(path: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", outside_blocks(path))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_has_commands_and_python() -> None:
    assert ["make", "demo"] in list(commands(README))
    assert any(words[0] == "medusa-deploy" for words in commands(README))
    assert runtime_examples()


@pytest.mark.parametrize(("path", "words"), [(path, words) for path in DOCS for words in commands(path)], ids=id_of)
def test_every_command_is_one_that_exists(path: Path, words: list[str]) -> None:
    words = [word.removeprefix(".venv/bin/") for word in words]
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "medusa-deploy":
        check_verb(words[1:])
    elif Path(words[0]).name in ("pip", "pipx") or words[1:3] == ["-m", "pip"]:
        groups = [group for word in words for group in re.findall(r"(?:medusa-deploy|\.)\[([\w,-]+)\]", word)]
        asked = {extra for group in groups for extra in group.split(",")}
        assert asked <= set(EXTRAS)
    elif words[0] in ("python", "python3"):
        assert words[1] in ("-m", "-c") or (ROOT / words[1]).is_file()
        assert [word for word in words[2:] if word.startswith(FOLDERS) and not (ROOT / word).exists()] == []
    else:
        assert words[0] in FOREIGN or (ROOT / words[0]).is_file()


@pytest.mark.parametrize("words", list(inline_commands(README)), ids=id_of)
def test_every_command_in_the_text_of_the_readme_is_one_that_exists(words: list[str]) -> None:
    check_verb(words[1:])


def check_verb(words: list[str]) -> None:
    """The command line parses, and a test runs its verb."""
    if words[0] in ("--version", "--help"):
        return
    verb = {verb.name: verb for verb in VERBS}[words[0]]
    parser = argparse.ArgumentParser(prog=verb.name, allow_abbrev=False, exit_on_error=False)
    importlib.import_module(f"medusa_deploy.tools.verbs.{verb.name}").add_arguments(parser)
    words = words[1 : next((index for index, word in enumerate(words) if word in ("|", ">", "2>")), None)]
    if words != ["--help"]:
        parser.parse_args(words)
    assert (ROOT / RUN_BY.get(verb.name, f"tests/tools/verbs/test_{verb.name}.py")).is_file()


@pytest.mark.parametrize("path", DOCS, ids=id_of)
def test_every_python_example_compiles_and_imports_what_exists(path: Path) -> None:
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medusa_deploy"):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.fixture(scope="module", name="text_bundle")
def _text_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_bundle(tiny_bundle, tmp_path_factory.mktemp("docs") / "bundle")


def runtime_examples() -> list[str]:
    """Python blocks of the README that need nothing but a bundle."""
    examples = [text for text in blocks(README, "python") if "load(" in text]
    return [text for text in examples if not re.search(r"medusa_deploy\.(export|calibration|tools)", text)]


@pytest.mark.parametrize("example", runtime_examples(), ids=lambda text: text.splitlines()[0])
def test_the_python_examples_run(example: str, text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = re.sub(r"\bload\(\s*([\"'])[^\"']*\1", f"load({str(text_bundle)!r}", example)
    exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})  # noqa: S102


def test_the_readme_is_short_and_its_first_command_is_on_the_first_screen() -> None:
    text = README.read_text("utf-8")
    assert len(text.split()) <= 800
    assert text.splitlines().index("$ make demo") < 40
    assert len((ROOT / "docs" / "design.md").read_text("utf-8").splitlines()) <= 200


def test_the_worked_example_of_the_concepts_is_what_the_code_says() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text("utf-8")
    example = re.search(r"`Tree\.from_choices\((\[.*?\])\)`", text, re.DOTALL)
    assert example
    tree = Tree.from_choices(ast.literal_eval(example[1]))
    mismatch = np.array([0, 0, 1, 0])
    for row, (ancestors, product) in enumerate(zip(tree.ancestors, tree.ancestors @ mismatch, strict=True)):
        picture = " ".join("FT"[int(seen)] for seen in ancestors)
        assert re.search(rf"^  {picture}\b", text, re.MULTILINE)
        assert re.search(rf"^ {row}     {picture}       {mismatch[row]}          {product}     ", text, re.MULTILINE)
    for name, values in (("parent", tree.parents), ("depth", tree.depths)):
        assert re.search(rf"{name} +{' +'.join(map(str, values))}$", text, re.MULTILINE)


def test_no_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.$}])/(?:home|mnt|opt|root|Users|work|workspace)/")
    kinds = ("", ".md", ".py", ".toml", ".txt", ".json", ".jsonl", ".yml")
    files = [*ROOT.iterdir(), *(path for name in (".ci", *FOLDERS) for path in (ROOT / name).rglob("*"))]
    texts = (path for path in files if path.suffix in kinds and path.is_file() and path != Path(__file__))
    assert [str(path) for path in texts if pattern.search(path.read_text("utf-8", errors="replace"))] == []


def test_the_tables_of_the_gpu_are_those_of_its_report() -> None:
    stages = json.loads((ROOT / "benchmarks" / "results" / "gpu-h200.json").read_text("utf-8"))["stages"]
    shown = set((ROOT / "docs" / "gpu.md").read_text("utf-8").splitlines())
    for size, entry in stages["curve"]["results"].items():
        for length, times in entry["lengths"].items():
            cells = [f"{found['ms']:.2f}" for found in times.values()] + [f"{times['64']['of_one_row']:.2f}"]
            assert f"| {size}, {length} | {' | '.join(cells)} |" in shown
    for size, entry in stages["overhead"]["results"].items():
        for rows in ("8", "16", "64"):
            cells = [f"{entry['heads'][kind][rows]['overhead']:.2f}" for kind in ("shared", "own", "pruned")]
            assert f"| {size} | {rows} | {' | '.join(cells)} |" in shown
    for size, entry in stages["memory"]["results"].items():
        start = f"| {size} | {entry['weights_bytes'] / 2**30:.2f} GiB | {entry['cache_bytes_of_4096'] / 2**30:.2f} GiB | "
        assert any(line.startswith(start) for line in shown)

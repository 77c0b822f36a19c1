"""The wheel and the sdist: what is in them, and that the wheel with its ``cpu`` extra runs a bundle without torch."""

from __future__ import annotations

import email
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medusa_deploy import __version__
from medusa_deploy.runtime import Session
from medusa_deploy.tools.extras import EXTRAS, OLDEST
from support.text import write_text_files

ROOT = Path(__file__).parents[2]
FOLDERS = ("calibration", "export", "runtime", "tools")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

DEPLOYED = """
import importlib.util, json, sys
from pathlib import Path
from medusa_deploy.runtime import load
from medusa_deploy.runtime.text.template import ChatTemplate
from medusa_deploy.runtime.text.tokenizer import TextCodec
text = Path(sys.argv[2])
prompt = ChatTemplate((text / "chat_template.jinja").read_text()).render([{"role": "user", "content": "hi"}])
codec = TextCodec(text / "tokenizer.json")
generation = load(sys.argv[1], threads=1).generate(token_ids=[5, 6, 7], max_new_tokens=12)
names = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "tensorrt_rtx")
heavy = [name for name in names if importlib.util.find_spec(name)]
report = {"prompt": codec.decode(codec.encode(prompt)), "token_ids": generation.token_ids, "heavy": heavy}
print(json.dumps({**report, "loaded_from": load.__code__.co_filename}))
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command; its output, or a failure that shows it."""
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, without what building and testing leave beside them."""
    copy = tmp_path_factory.mktemp("tree") / "project"
    copy.mkdir()
    for name in (*FOLDERS, "src", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


def build_wheel(source: Path, output: Path) -> Path:
    """Build with this environment's setuptools: nothing is fetched."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--wheel-dir")
    run(sys.executable, "-m", "pip", "wheel", *options, output, source)
    (built,) = output.glob("*.whl")
    return built


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert {name.split("/")[0] for name in names(wheel)} == {"medusa_deploy", f"medusa_deploy-{__version__}.dist-info"}


def test_the_wheel_holds_every_file_of_the_four_folders(wheel: Path, tree: Path) -> None:
    files = {f"medusa_deploy/{path.relative_to(tree)}" for name in FOLDERS for path in (tree / name).rglob("*") if path.is_file()}
    files |= {f"medusa_deploy/{path.name}" for path in (tree / "src" / "medusa_deploy").iterdir() if path.is_file()}
    assert {name for name in names(wheel) if name.startswith("medusa_deploy/")} == files
    data = ("py.typed", "calibration/prompts/heldout.jsonl", "runtime/serve/page.html")
    assert {f"medusa_deploy/{name}" for name in data} <= files


def test_the_wheel_describes_itself(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"medusa_deploy-{__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text] == PROJECT["dependencies"]
    assert "medusa-deploy = medusa_deploy.tools.cli:main" in entry_points


def test_the_sdist_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    program = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", program, tmp_path, cwd=tree)
    with tarfile.open(tmp_path / f"medusa_deploy-{__version__}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    rebuilt = build_wheel(tmp_path / f"medusa_deploy-{__version__}", tmp_path / "rebuilt")
    assert names(rebuilt) == names(wheel)


def test_the_wheel_with_its_cpu_extra_runs_a_bundle_without_torch(
    wheel: Path, tiny_bundle: Path, tiny_session: Session, tmp_path: Path
) -> None:
    python = environment_with(wheel, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpu"]], tmp_path / "venv")
    write_text_files(tmp_path)
    result = json.loads(run(python, "-I", "-c", DEPLOYED, tiny_bundle, tmp_path))
    assert result["loaded_from"].startswith(str(tmp_path))
    assert result["heavy"] == []
    assert result["prompt"] == "user:hi;>"
    assert result["token_ids"] == tiny_session.generate(token_ids=[5, 6, 7], max_new_tokens=12).token_ids
    assert __version__ in run(python.parent / "medusa-deploy", "--version")
    assert "LlamaForCausalLM" in run(python.parent / "medusa-deploy", "inspect", tiny_bundle)


def environment_with(wheel: Path, requirements: list[str], folder: Path) -> Path:
    """A virtual environment with the wheel, and links to the named distributions and what they need; its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install")
    run(*pip, "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in with_dependencies(requirements).values():
        for top in {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}:
            (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    return python


def with_dependencies(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that the requirements name, and those that they need in turn."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            needed = [Requirement(text) for text in found[name].requires or ()]
            extras = requirement.extras or {""}
            waiting += [n for n in needed if n.marker is None or any(n.marker.evaluate({"extra": extra}) for extra in extras)]
    return found


def test_the_table_of_extras_says_what_pyproject_says() -> None:
    optional = PROJECT["optional-dependencies"]

    def expanded(extra: str) -> list[str]:
        found: list[str] = []
        for each in (Requirement(text) for text in optional[extra]):
            ours = each.extras if each.name == "medusa-deploy" else ()
            found += [name for one in ours for name in expanded(one)] or [each.name]
        return found

    for extra, distributions in EXTRAS.items():
        assert sorted(expanded(extra)) == sorted(distributions), extra


def test_the_oldest_versions_are_those_of_pyproject() -> None:
    texts = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpu"]]
    bounds = {Requirement(text).name: str(Requirement(text).specifier) for text in texts}
    assert {name: f">={'.'.join(map(str, oldest))}" for name, oldest in OLDEST.items()}.items() <= bounds.items()

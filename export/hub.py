"""Fetches models and heads from a Hugging Face hub by name: ``org/name[@revision][:file]``.

huggingface_hub does the work: its cache, its tokens, its resumed downloads, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE``. Code of a
repository is never fetched.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..runtime.errors import DownloadError, MissingDependencyError, UsageError

OWN_SILENCE = "MEDUSA_DEPLOY_HUB_SILENCE"
"""Set where the command line itself took the hub offline for other libraries: a name may still be fetched."""
_WORD = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"(?P<repo>{_WORD}/{_WORD})(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[\w.()+ /-]+))?")
_TEXT = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.tiktoken")
_INDEX = "model.safetensors.index.json"
_TENSORS = (".safetensors", ".gguf", ".bin", ".pt")
_SHARD = re.compile(r"model(?:-\d+-of-\d+)?\.safetensors")
_PICKLE = re.compile(r"pytorch_model(?:-\d+-of-\d+)?\.bin")
_HEADS = ("*.json", "*.safetensors", "*.pt", "*.bin")


@dataclass(frozen=True, slots=True)
class Fetched:
    """Tells where a model or heads lie. ``origin``: repository, revision and file on the hub; None for a path."""

    path: Path
    origin: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class HubName:
    """Names a repository, and in it a revision (a branch, a tag or a commit) and one file."""

    repo: str
    revision: str
    file: str | None

    @property
    def text(self) -> str:
        """The name as a user writes it."""
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repo}{revision}" + ("" if self.file is None else f":{self.file}")


def hub_name(source: Path | str) -> HubName | None:
    """Read a name; None for a path that exists, and for what can't be a name."""
    found = None if Path(source).exists() else _ID.fullmatch(str(source))
    if found is None or ".." in str(source):
        return None
    return HubName(found["repo"], found["revision"] or "main", found["file"])


def fetch_model(source: Path | str, report: Callable[[str], object] = lambda phase: None, *, weights: bool = True) -> Fetched:
    """Return the path of a model: a path as it is, a name after its files are in the hub's cache.

    Of a repository come config, tokenizer, and the weights of ``model.safetensors`` or its index; without such, its GGUF file
    if there is one only, or ``pytorch_model.bin``. ``weights``: false leaves the weights of safetensors where they are.

    Raises:
        DownloadError: no such repository, revision or file, no access, no network and nothing cached.
        UsageError: a repository of several GGUF files, without a file in the name.
        MissingDependencyError: huggingface_hub isn't installed.
    """
    return _fetch(source, lambda name, files: _model_files(name, files, weights), report)


def fetch_heads(source: Path | str, report: Callable[[str], object] = lambda phase: None) -> Fetched:
    """Return the path of heads, as :func:`fetch_model` does: all tensors and configs of the repository, or one file of it."""
    return _fetch(source, lambda name, files: [file for file in files if _any(file, _HEADS)], report)


def _fetch(
    source: Path | str, choose: Callable[[HubName, list[str]], list[str]], report: Callable[[str], object]
) -> Fetched:
    name = hub_name(source)
    if name is None:
        return Fetched(Path(source))
    try:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise MissingDependencyError(
            f"{name.text} is a name on a hub, and huggingface_hub isn't installed", hint="pip install huggingface_hub"
        ) from error
    report(f"asking the hub for {name.text}")
    cache, endpoint = os.environ.get("HF_HUB_CACHE"), os.environ.get("HF_ENDPOINT")
    with _as_the_user_wants():
        try:
            info = huggingface_hub.HfApi(endpoint=endpoint).model_info(name.repo, revision=name.revision)
        except GatedRepoError as error:
            raise DownloadError(
                f"{name.repo} is gated", hint="accept its conditions on the hub's page and log in: hf auth login"
            ) from error
        except RepositoryNotFoundError as error:
            raise DownloadError(
                f"no such file or folder: {source}; and the hub has no model {name.repo}, or hides it",
                hint="check the spelling; for a private model log in: hf auth login",
            ) from error
        except RevisionNotFoundError as error:
            hint = "name a branch, a tag or a commit"
            raise DownloadError(f"{name.repo} has no revision {name.revision}", hint=hint) from error
        except Exception as error:  # noqa: BLE001 the library's client raises errors of its own, by version
            return _cached(name, cache, error)
        listed, commit = sorted(each.rfilename for each in info.siblings or ()), str(info.sha)
        if name.file is not None and name.file not in listed:
            raise DownloadError(f"{name.repo} has no file {name.file}", hint=_some(listed))
        wanted = choose(name, listed) if name.file is None else [name.file]
        if not wanted:
            raise DownloadError(f"{name.repo} holds nothing that is read here", hint=_some(listed))
        revision, folder = name.revision, Path()
        for number, file in enumerate(wanted, 1):
            report(f"fetching {file} ({number} of {len(wanted)})")
            try:
                path = huggingface_hub.hf_hub_download(name.repo, file, revision=revision, cache_dir=cache, endpoint=endpoint)
            except Exception as error:
                raise DownloadError(
                    f"{file} of {name.text} can't be fetched: {_first_line(error)}",
                    hint="run the same again: what has come stays in the cache",
                ) from error
            revision = commit  # the first file notes in the cache what the name means now
            folder = Path(path).parents[len(Path(file).parts) - 1]
    return _found(name, folder, commit)


def _found(name: HubName, folder: Path, commit: str) -> Fetched:
    origin = {"hub": name.repo, "revision": commit, **({} if name.file is None else {"file": name.file})}
    return Fetched(folder if name.file is None else folder / name.file, origin)


def _cached(name: HubName, cache: str | None, error: Exception) -> Fetched:
    """Return what an earlier run left in the cache, if it is whole.

    Raises:
        DownloadError: nothing, or a part; says what to copy where.
    """
    import huggingface_hub
    from huggingface_hub import constants

    try:
        folder = Path(
            huggingface_hub.snapshot_download(name.repo, revision=name.revision, cache_dir=cache, local_files_only=True)
        )
        if _whole(folder) if name.file is None else (folder / name.file).is_file():
            return _found(name, folder, folder.name)
    except Exception:  # noqa: BLE001 S110 whatever is wrong with the cache, the first error is the one to show
        pass
    where = Path(cache or constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}"
    what = name.repo if name.file is None else f"{name.repo} {name.file}"
    revision = "" if name.revision == "main" else f" --revision {name.revision}"
    raise DownloadError(
        f"{name.text} isn't in the cache, and the hub can't be asked: {_first_line(error)}",
        hint=f"where there is a network, run hf download {what}{revision} and copy its folder models--… to {where}; or copy the "
        "model's files into any folder and give that",
    ) from error


def _whole(folder: Path) -> bool:
    """True if a cached folder holds tensors, and every shard that its index names."""
    index = folder / _INDEX
    if index.is_file():
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    return any(path.suffix in _TENSORS and path.is_file() for path in folder.iterdir())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _model_files(name: HubName, files: list[str], weights: bool) -> list[str]:
    """Choose the files of a model."""
    chosen = [file for file in files if _any(file, _TEXT)]
    shards = [file for file in files if _SHARD.fullmatch(file)]
    if shards:
        single = "model.safetensors"
        return chosen + ([] if not weights else [single] if single in shards else shards)
    ggufs = [file for file in files if file.lower().endswith(".gguf")]
    pickles = [file for file in files if _PICKLE.fullmatch(file)]
    if pickles and not (ggufs and "config.json" not in files):
        return chosen + (pickles if weights else [])
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise UsageError(f"{name.repo} holds {len(ggufs)} GGUF files", hint=f"name one, such as {name.repo}:{ggufs[0]}")
    raise DownloadError(f"{name.repo} holds no weights that are read here", hint=_some(files))


def _any(file: str, patterns: Iterable[str]) -> bool:
    return "/" not in file and any(fnmatch(file, pattern) for pattern in patterns)


def _some(files: list[str]) -> str:
    return f"it holds {', '.join(files[:8])}{' …' if len(files) > 8 else ''}" if files else "it is empty"


@contextmanager
def _as_the_user_wants() -> Iterator[None]:
    """Reach the network unless the user took it away, and draw no bars."""
    from huggingface_hub import constants, utils

    module: Any = constants
    bars: Any = utils
    before, drawn = module.HF_HUB_OFFLINE, not bars.are_progress_bars_disabled()
    if os.environ.get(OWN_SILENCE):
        module.HF_HUB_OFFLINE = False
    if drawn:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        module.HF_HUB_OFFLINE = before
        if drawn:
            bars.enable_progress_bars()

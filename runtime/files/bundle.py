"""A bundle on disk: a folder that deploys by itself. Written to a temporary name, committed by its manifest and a rename."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from ..errors import BundleBusyError, BundleError, BundleExistsError, BundleIntegrityError, OutputError
from .manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileRecord, Manifest, parse_manifest


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its folder and its manifest. Files are checked by :meth:`verify`, engines before they are loaded."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """The file ``name`` of the manifest, known to lie inside the bundle and to be a plain file.

        Raises:
            BundleIntegrityError: missing, a link, or outside the bundle.
        """
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\\" in name:
            raise BundleIntegrityError(
                f"the manifest names {name!r}, which lies outside the bundle", hint="don't use this bundle"
            )
        path = self.folder / relative
        try:
            linked = any(parent.is_symlink() for parent in (path, *path.parents[: len(relative.parts) - 1]))
            found = path.is_file()
        except OSError as error:  # a name that the file system can't have
            raise BundleIntegrityError(
                f"the manifest names {name[:80]!r}: {error.strerror}", hint="don't use this bundle"
            ) from None
        if linked:
            raise BundleIntegrityError(f"{name} is a symbolic link", hint="copy the bundle with its files, not with links")
        if not found:
            raise BundleIntegrityError(f"{name} is missing from {self.folder}", hint="copy or export the bundle again")
        return path

    def check_sizes(self) -> None:
        """Every file is there with its size: cheap, done whenever a bundle is opened."""
        for name, record in self.manifest.files.items():
            size = self.path(name).stat().st_size
            if size != record.size:
                raise BundleIntegrityError(
                    f"{name} has {size} bytes, the manifest says {record.size}", hint="copy or export the bundle again"
                )

    def check_hashes(self) -> None:
        """Every file's sha256 is the manifest's: reads the whole bundle."""
        for name, record in self.manifest.files.items():
            digest = sha256(self.path(name))
            if digest != record.sha256:
                raise BundleIntegrityError(
                    f"{name} has sha256 {digest[:16]}…, the manifest says {record.sha256[:16]}…",
                    hint="the file was changed or damaged: copy or export the bundle again",
                )


def open_bundle(folder: Path | str, *, check_hashes: bool = True) -> Bundle:
    """Open a bundle and check its files; ``check_hashes=False`` checks sizes only (for a bundle checked before).

    Raises:
        BundleError: no such bundle.
        BundleSchemaError: its manifest can't be used by this program.
        BundleIntegrityError: a file is missing, truncated or changed.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        found = "has no manifest.json" if folder.is_dir() else "doesn't exist"
        raise BundleError(
            f"{folder} is not a bundle: it {found}", hint="make one with: medusa-deploy export MODEL --heads HEADS -o BUNDLE"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{path} has {path.stat().st_size} bytes, over the limit of {MAX_MANIFEST_BYTES}", hint="don't use this bundle"
        )
    bundle = Bundle(folder, parse_manifest(path.read_bytes()))
    bundle.check_sizes()
    if check_hashes:
        bundle.check_hashes()
    return bundle


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit ``manifest``: it replaces the one in ``folder`` in one step.

    Raises:
        OutputError: the file system refused; the old manifest is still there.
    """
    path = folder / MANIFEST_NAME
    temporary = folder / f".{MANIFEST_NAME}.partial"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise output_error(path, error) from error


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_files(folder: Path, known: Mapping[Path, str] | None = None) -> dict[str, FileRecord]:
    """Size and sha256 of every file below ``folder``, by relative POSIX path, the manifest excluded.

    ``known``: hashes that were taken before, by path.
    """
    known = known or {}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, known.get(path) or sha256(path)) for path in files
    }


def refuse_existing(output: Path, *, force: bool) -> None:
    """What :func:`staged_folder` asks first; long work asks it before it starts.

    Raises:
        BundleExistsError: ``output`` exists and ``force`` is false.
    """
    if output.exists() and not force:
        raise BundleExistsError(f"{output} exists", hint="give another output, or --force to replace it")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others that add to the bundle out of it; a process that dies lets go.

    Raises:
        BundleBusyError: somebody is at work in it.
    """
    if not folder.is_dir():  # open_bundle says what is wrong with it
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BundleBusyError(f"another build is at work in {folder}", hint="wait until it has ended") from None
        yield
    finally:
        os.close(handle)


@contextmanager
def staged_folder(output: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``output`` that becomes ``output`` when the block ends without an exception.

    Everything in it is flushed to disk before one rename; whatever fails before leaves an existing ``output`` unchanged and
    removes the temporary folder. A process that is killed leaves at most a folder named ``.NAME.partial-…``; the next run
    with the same output removes it.

    Raises:
        BundleExistsError: ``output`` exists and ``force`` is false.
        OutputError: the file system refused (full, read-only, no permission).
    """
    refuse_existing(output, force=force)
    prefix = f".{output.name}.partial-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for leftover in output.parent.glob(f"{glob.escape(prefix)}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
    except OSError as error:
        raise output_error(output, error) from error
    try:
        yield staging
        _flush(staging)
        _replace(staging, output)
    except OSError as error:
        raise output_error(output, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_whole(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file in one piece or not at all; an older one is there until then. ``content``: its bytes, or what writes them.

    Raises:
        OutputError: the file system refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise output_error(path, error) from error


def output_error(output: Path, error: OSError) -> OutputError:
    """What a user is told when the file system refuses."""
    return OutputError(
        f"can't write {output}: {error.strerror or error}",
        hint="nothing was left behind; free some space or choose another output",
    )


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _replace(staging: Path, output: Path) -> None:
    staging.chmod(0o755)
    if output.exists():
        # A folder can't be renamed over a full one: move the old one aside first, and back if the second rename fails.
        old = output.with_name(f".{output.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        try:
            staging.rename(output)
        except OSError:
            old.rename(output)
            raise
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    else:
        staging.rename(output)

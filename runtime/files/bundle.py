"""Opens and writes bundles. A bundle is a folder that deploys by itself.

It is written under a temporary name. Its manifest, written last, and one rename commit it.

Functions import the modules that only they need: opening a bundle needs none of those that write one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from ..errors import BundleBusyError, BundleError, BundleIntegrityError, OutputError
from .manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileRecord, Manifest, parse_manifest
from .staging import check_path, refuse_existing as refuse_existing, remove_unlocked, replace_folder  # noqa: PLC0414 - part of this module

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its folder and its manifest. :func:`open_bundle` checked its files; loading an engine checks it again."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Returns the path of the manifest's file ``name``, after checking that it is a plain file inside the bundle.

        Raises:
            BundleIntegrityError: the file is missing, a link, or outside the bundle.
        """
        from pathlib import PurePosixPath

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
        """Checks that every file is there and has the manifest's size. Cheap: done whenever a bundle is opened.

        Raises:
            BundleIntegrityError: a file is missing or has another size.
        """
        for name, record in self.manifest.files.items():
            size = self.path(name).stat().st_size
            if size != record.size:
                raise BundleIntegrityError(
                    f"{name} has {size} bytes, the manifest says {record.size}", hint="copy or export the bundle again"
                )

    def check_hashes(self) -> None:
        """Checks that every file has the manifest's sha256. Reads the whole bundle.

        Raises:
            BundleIntegrityError: a file is missing or has another sha256.
        """
        for name, record in self.manifest.files.items():
            digest = sha256(self.path(name))
            if digest != record.sha256:
                raise BundleIntegrityError(
                    f"{name} has sha256 {digest[:16]}…, the manifest says {record.sha256[:16]}…",
                    hint="the file was changed or damaged: copy or export the bundle again",
                )


def open_bundle(folder: Path | str, *, check_hashes: bool = True) -> Bundle:
    """Opens a bundle and checks its files. ``check_hashes=False`` checks sizes only: for a bundle checked before.

    Raises:
        BundleError: there is no bundle.
        BundleSchemaError: this program can't use the manifest.
        BundleIntegrityError: a file is missing, truncated or changed.
    """
    from pathlib import Path

    folder = Path(folder)
    check_path(folder, BundleError)
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
    """Writes ``manifest`` into ``folder``. It replaces an older one in one step.

    Raises:
        OutputError: the file system refused. The old manifest is still there.
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
    """Returns the sha256 of a file (hex)."""
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_files(folder: Path, known: Mapping[Path, str] | None = None) -> dict[str, FileRecord]:
    """Records size and sha256 of every file below ``folder`` except the manifest, by relative POSIX path.

    ``known``: hashes taken before, by path.
    """
    known = known or {}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, known.get(path) or sha256(path)) for path in files
    }


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the bundle's lock: no other process adds to the bundle meanwhile. A process that dies releases it.

    Raises:
        BundleBusyError: another process holds the lock.
    """
    import fcntl

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
    """Makes a temporary folder beside ``output``. It becomes ``output`` if the block ends without an exception.

    All files are flushed to disk before one rename. A failure before the rename leaves an existing ``output`` unchanged and
    removes the temporary folder. A killed process leaves at most a folder ``.NAME.partial-…``: the next run with the same output
    removes it.

    Raises:
        BundleExistsError: ``output`` exists and ``force`` is false.
        OutputError: the file system refused (full, read-only, no permission).
    """
    import fcntl
    import glob
    import shutil
    import tempfile
    from pathlib import Path

    refuse_existing(output, force=force)
    check_path(output, OutputError)
    prefix = f".{output.name}.partial-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for leftover in output.parent.glob(f"{glob.escape(prefix)}*"):
            remove_unlocked(leftover)
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise output_error(output, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process with the same output sees that this one is at work
        yield staging
        _flush(staging)
        refuse_existing(output, force=force)
        replace_folder(staging, output, force=force)
    except OSError as error:
        raise output_error(output, error) from error
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def write_whole(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Writes a file completely or not at all. An older one stays until then. A link stays, and its target is replaced.

    A device or a pipe isn't replaced: it is written to.

    ``content``: the file's bytes, or a function that writes them.

    Raises:
        OutputError: the file system refused.
    """
    import tempfile

    write = content if callable(content) else lambda file: file.write(content)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            with path.open("wb") as file:
                write(file)
            return
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
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
    """Makes the error for a refusal of the file system."""
    return OutputError(
        f"can't write {output}: {error.strerror or error}",
        hint="nothing was left behind; free some space or choose another output",
    )


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())

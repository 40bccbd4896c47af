"""Publication of finished folders and files: they appear under their final names whole, or not at all.

A folder is filled under a hidden name beside the final one, flushed to the disk, and renamed. A process that is killed
leaves the earlier folder (or nothing) under the final name, and its own half under the hidden one, which the next
publication to the same place takes away.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llmprune.errors import CheckpointError
from llmprune.machine.interrupts import deferred_interrupts

SUFFIX = ".partial"
"""End of the hidden names of folders that are being filled; they begin with ``.`` and the final name."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2), and RENAME_SWAP of macOS's renamex_np(2)
_AT_FDCWD = -100


@contextmanager
def published(directory: str | os.PathLike[str], overwrite: bool = False, needed: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes ``directory`` when the block ends without an exception.

    With an exception, Ctrl-C included, the temporary folder is removed and whatever was at ``directory`` stays. Where
    the file system can exchange two names in one step (Linux and macOS, on local file systems), ``overwrite`` leaves
    the old folder or the new one at every moment; elsewhere the old one is first moved to a hidden name beside it.

    Args:
        directory: the final folder; parents are made. It must not exist, or be an empty folder, unless ``overwrite``.
        overwrite: replace the checkpoint that is there. A folder that holds no checkpoint is never replaced.
        needed: bytes the folder will take; too little free space is reported before anything is written.

    Raises:
        CheckpointError: the folder exists, cannot be written, or the disk is full.
    """
    target = Path(os.path.abspath(directory))
    if target.is_symlink():
        target = target.resolve()
    with _translated(target):
        _check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        free = shutil.disk_usage(target.parent).free
        if needed > free:
            raise CheckpointError(
                f"no space left in {target.parent}: the checkpoint takes {needed:,} bytes, {free:,} are free; "
                "nothing was written"
            )
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=SUFFIX, dir=target.parent))
        lock = os.open(temporary, os.O_RDONLY)
    try:
        with _translated(target):
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield temporary
            _open_to_readers(temporary)
            flush(temporary)
            with deferred_interrupts():
                _check_target(target, overwrite)
                _swap(temporary, target)
                _flush_one(target.parent)
    finally:
        # What is left under the hidden name is the unfinished folder, or the one that was replaced.
        with deferred_interrupts():
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole: a crash or a full disk leaves the old one or the new one, never half of one.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=SUFFIX, dir=target.parent)
    temporary = Path(name)
    try:
        with open(descriptor, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(descriptor)
        temporary.chmod(0o666 & ~_mask())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Have ``write`` make a large file under a hidden name, and give it its name when the disk has it.

    Raises:
        CheckpointError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    with _translated(target):
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=SUFFIX, dir=target.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_mask())
            _flush_one(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def flush(folder: Path) -> None:
    """Have the disk hold every file of ``folder`` and its names (fsync), so that a rename cannot outrun them."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            _flush_one(Path(path, name))
        _flush_one(Path(path))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint, of whatever kind (an adapter is one)."""
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _open_to_readers(folder: Path) -> None:
    """The usual permissions: temporary folders, and files that some libraries write, are the owner's only."""
    mask = _mask()
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _mask() -> int:
    """The permissions that new files do not get (which the system tells only while they are changed)."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise CheckpointError unless ``target`` may be created or replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} exists and is no folder: choose another output folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} exists: choose another output folder, or overwrite it with --overwrite"
        )
    if not is_checkpoint(target):
        raise CheckpointError(
            f"{target} holds no checkpoint (no config.json), so it is not overwritten: choose another output folder"
        )


def _swap(temporary: Path, target: Path) -> None:
    """Give ``target`` the finished folder; what was there ends up under the temporary name."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(temporary, target)  # an empty folder is replaced in the same step
        return
    if _exchange(temporary, target):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, ctypes.c_uint(_EXCHANGE))
    elif hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_EXCHANGE))
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(second))


def _remove_stale(target: Path) -> None:
    """Take away what killed processes left: hidden siblings that nobody holds a lock on."""
    for path in target.parent.glob(f".{target.name}.*{SUFFIX}"):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its owner has just finished
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that has made its folder takes the lock at once, but not in the same step.
            if time.time() - os.fstat(descriptor).st_ctime > 1.0:
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(descriptor)


@contextmanager
def _translated(target: Path) -> Iterator[None]:
    """Turn the system's refusals into CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise CheckpointError(_no_space(target)) from error
        raise CheckpointError(
            f"{target} cannot be written ({error.strerror or error}): choose another output folder"
        ) from error
    except SafetensorError as error:
        # The library states the system's error number in its text only.
        if any(f"os error {code})" in str(error) for code in _NO_SPACE):
            raise CheckpointError(_no_space(target)) from error
        raise CheckpointError(f"{target} cannot be written ({error})") from error


def _no_space(target: Path) -> str:
    return f"no space left in {target.parent} while writing {target.name}: free some; nothing was left behind"

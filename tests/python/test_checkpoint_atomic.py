"""Folders appear whole or not at all: whatever goes wrong, whenever the process dies."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmprune.checkpoints import atomic
from llmprune.checkpoints.atomic import published
from llmprune.errors import CheckpointError


def fill(folder: Path, version: int, files: int = 4) -> None:
    for number in range(files):
        (folder / f"{number}.txt").write_text(str(version))
    (folder / "config.json").write_text("{}")


def versions(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted(folder.glob("*.txt"))]


def publish(target: Path, version: int, error: BaseException | None = None, overwrite: bool = True) -> None:
    """Publish a folder of one version, or fail half way."""
    with published(target, overwrite=overwrite) as folder:
        fill(folder, version)
        if error is not None:
            raise error


def leftovers(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with published(tmp_path / "deep" / "out") as folder:
        fill(folder, 1)
        assert not (tmp_path / "deep" / "out").exists()
    assert versions(tmp_path / "deep" / "out") == ["1"] * 4
    assert leftovers(tmp_path / "deep") == []


def test_it_is_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    with published(tmp_path / "out") as folder:
        fill(folder, 1)
        (folder / "0.txt").chmod(0o600)
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "out" / "0.txt").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        publish(tmp_path / "out", 1, error)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_old_folder(tmp_path: Path) -> None:
    publish(tmp_path / "out", 1)
    with pytest.raises(RuntimeError):
        publish(tmp_path / "out", 2, RuntimeError())
    assert versions(tmp_path / "out") == ["1"] * 4
    assert leftovers(tmp_path) == []


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with published(tmp_path / "out") as folder:
        fill(folder, 1)
    assert versions(tmp_path / "out") == ["1"] * 4


def test_a_link_keeps_pointing_at_its_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with published(tmp_path / "link") as folder:
        fill(folder, 1)
    assert (tmp_path / "link").is_symlink()
    assert versions(tmp_path / "real") == ["1"] * 4


def test_what_exists_is_not_replaced_unasked(tmp_path: Path) -> None:
    with published(tmp_path / "out") as folder:
        fill(folder, 1)
    with pytest.raises(CheckpointError, match="--overwrite"), published(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert versions(tmp_path / "out") == ["1"] * 4


def test_only_checkpoints_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with (
        pytest.raises(CheckpointError, match="holds no checkpoint"),
        published(tmp_path / "thesis", overwrite=True),
    ):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="no folder"), published(tmp_path / "file", overwrite=True):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_takes_the_old_files_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # a file system that cannot exchange names
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    with published(tmp_path / "out") as folder:
        fill(folder, 1, files=6)
    with published(tmp_path / "out", overwrite=True) as folder:
        fill(folder, 2)
    assert versions(tmp_path / "out") == ["2"] * 4
    assert leftovers(tmp_path) == []


def test_without_exchange_a_failed_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with published(tmp_path / "out") as folder:
        fill(folder, 1)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if str(source).endswith(atomic.SUFFIX):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", refuse)
    with (
        pytest.raises(CheckpointError, match="Input/output error"),
        published(tmp_path / "out", overwrite=True) as folder,
    ):
        fill(folder, 2)
    assert versions(tmp_path / "out") == ["1"] * 4
    assert leftovers(tmp_path) == []


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def race() -> None:
        with published(tmp_path / "out") as folder:
            fill(folder, 1)
            publish(tmp_path / "out", 7)

    with pytest.raises(CheckpointError, match="exists"):
        race()
    assert versions(tmp_path / "out") == ["7"] * 4
    assert leftovers(tmp_path) == []


def test_what_a_killed_process_left_is_taken_away_but_not_what_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = tmp_path / f".out.abc{atomic.SUFFIX}"
    stale.mkdir()
    fill(stale, 0)
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 60)
    with published(tmp_path / "out", overwrite=True) as outer:
        fill(outer, 1)
        assert not stale.exists()
        with published(tmp_path / "out", overwrite=True) as inner:
            assert outer.exists()
            fill(inner, 2)
    assert versions(tmp_path / "out") == ["1"] * 4
    assert leftovers(tmp_path) == []


def test_too_little_space_is_found_before_writing(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(CheckpointError, match="no space left"), published(tmp_path / "out", needed=2 * free):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_is_no_space(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with pytest.raises(CheckpointError, match="no space left"), published(tmp_path / "out") as folder:
            (folder / "big").write_bytes(bytes(1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_nothing(mounted: Path) -> None:
    def write_too_much() -> None:
        with published(mounted / "out") as folder:
            for number in range(100):
                (folder / str(number)).write_bytes(bytes(1 << 14))

    with pytest.raises(CheckpointError, match="no space left"):
        write_too_much()
    assert list(mounted.iterdir()) == []


def test_a_read_only_parent_says_so(mounted: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(CheckpointError, match="Read-only file system"), published(mounted / "out"):
        pytest.fail("the block must not run")


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from llmprune.checkpoints.atomic import published

target = Path(sys.argv[1])
random.seed(int(sys.argv[2]))

def publish(version):
    with published(target, overwrite=True) as folder:
        for number in range(4):
            (folder / f"{number}.txt").write_text(str(version))
        (folder / "config.json").write_text("{}")

start = time.monotonic()
for version in range(3):
    publish(version)
once = (time.monotonic() - start) / 3
seen, died = set(), 0
for attempt in range(1, 61):
    child = os.fork()
    if not child:
        publish(1000 * attempt)
        publish(1000 * attempt + 1)
        os._exit(0)
    time.sleep(random.uniform(0, 2.2 * once))
    os.kill(child, signal.SIGKILL)
    died += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = [file.read_text() for file in target.glob("*.txt")]
    assert len(found) == 4 and len(set(found)) == 1, found
    assert (target / "config.json").exists()
    seen.add(found[0])
print(died, len(seen))
"""


def test_killed_at_any_moment_the_folder_is_whole(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "out"), "0"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    died, seen = map(int, run.stdout.split())
    assert died > 20  # most were killed in the middle,
    assert seen > 5  # some of them after an exchange


def test_a_full_disk_while_weights_are_written_leaves_nothing(
    mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from checkpoint_models import build

    from llmprune.checkpoints.checkpoint import save_pretrained

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    (mounted / "ballast").write_bytes(bytes(230 << 10))
    with pytest.raises(CheckpointError, match="no space left"):
        save_pretrained(build("llama_gqa"), mounted / "out")
    assert [path.name for path in mounted.iterdir()] == ["ballast"]


SAVER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from checkpoint_models import build, evenly, logits, prune
from llmprune.checkpoints.checkpoint import load_model, save_pretrained

torch.set_num_threads(1)
target = Path(sys.argv[1])
random.seed(1)
models = [prune(build("gpt2"), evenly), build("gpt2")]
expected = [logits(model) for model in models]
save_pretrained(models[0], target)
start = time.monotonic()
save_pretrained(models[0], target, overwrite=True)
once = time.monotonic() - start
seen = set()
for attempt in range(16):
    child = os.fork()
    if not child:
        save_pretrained(models[attempt % 2], target, overwrite=True)
        os._exit(0)
    time.sleep(random.uniform(0, 1.3 * once))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = logits(load_model(target))
    which = [torch.equal(found, e) for e in expected]
    assert sum(which) == 1, which
    seen.add(which.index(True))
assert seen == {0, 1}, seen
"""


def test_killed_while_saving_the_old_checkpoint_or_the_new_one_loads(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAVER, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_ctrl_c_while_saving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted when the weights are written, read back, or compared."""
    from checkpoint_models import build, evenly, prune

    from llmprune.checkpoints import checkpoint

    model = prune(build("gpt2"), evenly)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for name in ("_weights", "_reload", "_compared"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Writer, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save_pretrained(model, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    checkpoint.save_pretrained(model, tmp_path / "out")

"""Files that are replaced in one step: what is there before, after and in between."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from gptvae_cli.errors import ExitCode, GPTVAEError
from gptvae_cli.files import leads_elsewhere, remove_file, remove_unfinished, replacing, write_atomically


def test_pipe_folder_and_loop_are_refused_and_kept(tmp_path: Path) -> None:
    """A rename would replace even a device: a save to /dev/full as root destroys it."""
    pipe, folder, loop = tmp_path / "pipe", tmp_path / "folder", tmp_path / "loop"
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop)
    for path, found in ((pipe, "a device or a pipe"), (folder, "a folder"), (loop, "symbolic links")):
        with pytest.raises(GPTVAEError, match=found) as caught:
            write_atomically(path, lambda new: new.touch())
        assert caught.value.exit_code == ExitCode.FAILURE
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert folder.is_dir()
    assert loop.is_symlink()
    assert len(list(tmp_path.iterdir())) == 3


def test_full_disk_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content := b"old")

    def fill_the_disk(new: Path) -> None:
        new.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(GPTVAEError) as caught:
        write_atomically(path, fill_the_disk)
    assert caught.value.exit_code == ExitCode.FAILURE
    assert caught.value.message == f"cannot write {path}: No space left on device"
    assert caught.value.hint == "free some space; what was there is unchanged"
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(new: Path) -> None:
        new.touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupted)
    assert not list(tmp_path.iterdir())


def test_what_fails_beside_a_file_is_not_told_as_its_own(tmp_path: Path) -> None:
    """A command reads its corpus while it writes: an error of that says nothing about the file."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError), replacing(path) as new:
        new.write_bytes(b"half")
        (tmp_path / "corpus").read_bytes()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Every killed save of a state would otherwise take as much of the disk as the state itself, for ever."""
    path = tmp_path / "state[1].safetensors"
    kept = [tmp_path / name for name in ("state[1].safetensors", ".state1.safetensors.x.tmp", "mine.tmp")]
    for file in kept:
        file.touch()
    left = tmp_path / ".state[1].safetensors.abc.tmp"
    left.mkdir()
    (left / "state[1].safetensors").write_bytes(b"half")
    remove_unfinished(path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_removing_a_file_keeps_the_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"")
    link = tmp_path / "link"
    link.symlink_to("disk")
    for _ in range(2):
        remove_file(link)
        assert list(tmp_path.iterdir()) == [link]
    write_atomically(link, lambda new: new.touch())
    assert (tmp_path / "disk").exists()


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    write_atomically(path, lambda new: new.write_bytes(b"new"))
    assert (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) == (mode, b"new")


@pytest.mark.parametrize("exists", [False, True])
def test_a_file_system_that_has_one_mode_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    """A Windows disk in WSL refuses to change a mode, even to what it is."""
    path = tmp_path / "file"
    if exists:
        path.touch()

    def refuse(self: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    write_atomically(path, lambda new: new.write_bytes(b"new"))
    assert path.read_bytes() == b"new"


def test_a_link_leads_elsewhere_where_the_name_is_another(tmp_path: Path) -> None:
    links = {"here": "disk/here", "there": "here", "gone": "gone/else", "loop": "loop"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "file").touch()
    assert [name for name in (*links, "file", "nothing") if leads_elsewhere(tmp_path / name)] == ["there", "gone"]


def test_a_file_system_that_cannot_sync_folders_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    write_atomically(tmp_path / "file", lambda new: new.write_bytes(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new"


def test_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(GPTVAEError, match="No such file or directory") as caught:
        write_atomically(tmp_path / "gone" / "file", lambda new: new.touch())
    assert caught.value.hint == "make the folder first"


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename can reach the disk before the content does: after a power cut the file would be empty."""
    events: list[str] = []
    sync, rename = os.fsync, Path.replace

    def recorded_sync(descriptor: int) -> None:
        events.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        sync(descriptor)

    def recorded_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "replace", recorded_rename)
    write_atomically(tmp_path / "file", lambda new: new.touch())
    assert events == ["sync file", "rename", "sync folder"]

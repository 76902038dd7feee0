"""Huge pages for weights: what moves, and that nothing happens where there are none."""

import mmap
import re
from pathlib import Path

import pytest

from iret.runtime import pages
from iret.runtime.pages import on_huge_pages, to_move

MIB = 1 << 20


@pytest.fixture
def noted(monkeypatch) -> list[tuple[int, int, int]]:
    """What the kernel is asked, (address, bytes, advice), in place of asking it."""
    asked: list[tuple[int, int, int]] = []

    def madvise(*what: int) -> int:
        asked.append(what)
        return 0

    monkeypatch.setattr(pages.ctypes, "CDLL", lambda name: type("C", (), {"madvise": staticmethod(madvise)}))
    return asked


def settings(folder: Path, enabled: str, size: str = "2097152\n") -> Path:
    (folder / "enabled").write_text(enabled)
    (folder / "hpage_pmd_size").write_text(size)
    return folder


# ---- what moves


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        ([], [(1, 9)], [(4, 8)]),  # whole pages alone
        ([], [(1, 7)], []),
        ([(0, 10)], [(0, 10)], []),  # nothing new
        ([(0, 5)], [(0, 17)], [(4, 16)]),  # a heap that grew: the page that it grew in, too
        ([(9, 20)], [(3, 20)], [(4, 12)]),  # mapped below, and joined
        ([(5, 6), (9, 11)], [(0, 20)], [(0, 8), (4, 12), (8, 20)]),  # in between
        ([(0, 5), (100, 110)], [(0, 3), (50, 61), (99, 120)], [(52, 60), (108, 120)]),
        ([(0, 20)], [], []),  # given back
    ],
)
def test_whole_pages_with_something_new_move(before, after, moved):
    assert to_move(before, after, 4) == moved


def test_new_memory_is_asked_for_and_older_memory_is_not(monkeypatch, tmp_path, noted):
    monkeypatch.setattr(pages, "SETTINGS", settings(tmp_path, "always [madvise] never\n"))
    monkeypatch.setattr(pages, "MAPS", tmp_path / "maps")
    old = f"{0:x}-{4 * MIB:x} rw-p 00000000 00:00 0 [heap]\n"
    pages.MAPS.write_text(old)
    others = [
        f"{32 * MIB:x}-{40 * MIB:x} r--p 00000000 00:00 0 \n",  # not to be written
        f"{64 * MIB:x}-{72 * MIB:x} rw-s 00000000 00:00 0 /dev/zero (deleted)\n",  # shared
        f"{96 * MIB:x}-{104 * MIB:x} rw-p 00000000 fd:00 7 /usr/lib/a library.so\n",  # a file's
        f"{128 * MIB:x}-{136 * MIB:x} rw-p 00000000 00:00 0 [stack]\n",
    ]
    with on_huge_pages():
        new = f"{16 * MIB + 4096:x}-{22 * MIB:x} rw-p 00000000 00:00 0 \n"
        pages.MAPS.write_text(old + new + "".join(others))
    assert noted == [
        (18 * MIB, 4 * MIB, mmap.MADV_HUGEPAGE),
        (18 * MIB, 4 * MIB, pages.MADV_COLLAPSE),
    ]


# ---- where there are none


@pytest.mark.parametrize("case", ["never", "no such kernel", "no size", "not a number"])
def test_nothing_happens_where_none_are_offered(monkeypatch, tmp_path, noted, case):
    settings(tmp_path, "always madvise [never]\n" if case == "never" else "[always] madvise never\n")
    if case == "no such kernel":
        (tmp_path / "enabled").unlink()
    if case == "no size":
        (tmp_path / "hpage_pmd_size").unlink()
    if case == "not a number":
        (tmp_path / "hpage_pmd_size").write_text("")
    monkeypatch.setattr(pages, "SETTINGS", tmp_path)
    monkeypatch.setattr(pages, "MAPS", tmp_path / "not there")
    with on_huge_pages():
        pass
    assert not noted


def test_what_fails_within_fails_as_without(monkeypatch, tmp_path, noted):
    monkeypatch.setattr(pages, "SETTINGS", settings(tmp_path, "always [madvise] never\n"))
    with pytest.raises(ValueError, match="no graph"), on_huge_pages():
        raise ValueError("no graph")
    assert not noted


# ---- with a kernel


@pytest.mark.skipif(not pages._page_size(), reason="this kernel offers no huge pages")
def test_memory_taken_within_lies_on_huge_pages():
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, 8 * MIB, flags=flags) as before:
        before[:] = bytes(8 * MIB)
        with on_huge_pages():
            after = mmap.mmap(-1, 32 * MIB, flags=flags)
            after[:] = bytes(32 * MIB)
        asked = [int(kb) for kb in re.findall(r"Rss: +(\d+) kB(?:\n(?!VmFlags)[^\n]*)*\nVmFlags:[^\n]* hg", smaps())]
        assert max(asked, default=0) >= 30 * 1024, "the kernel was asked for them"
        assert bytes(after[:4096]) == bytes(4096)
        after.close()


def smaps() -> str:
    return Path("/proc/self/smaps").read_text()

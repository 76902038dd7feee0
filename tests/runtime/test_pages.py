"""Huge pages for weights: what moves, and that nothing happens where there are none."""

import ctypes
import mmap
import platform
import re
from pathlib import Path

import pytest

from iret.runtime import pages
from iret.runtime.pages import on_huge_pages, to_move

MIB = 1 << 20
linux_only = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system knows no huge pages")


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


HEAP = (0, 4 * MIB, b"rw-p", b"[heap]")
NEW = (16 * MIB + 4096, 22 * MIB, b"rw-p", b"")


def line(start: int, end: int, mode: bytes, name: bytes) -> bytes:
    return b"%x-%x %s 00000000 00:00 0 %s\n" % (start, end, mode, name)


def write(folder: Path, table: str, *regions: tuple, filled: float = 1.0) -> None:
    """As the kernel would."""
    text = b""
    for region in regions:
        text += line(*region)
        if table == "smaps":
            kib = (region[1] - region[0]) // 1024
            text += b"Size: %d kB\nRss: %d kB\nPss: 1 kB\nVmFlags: rd wr mr mw me ac\n" % (kib, kib * filled)
    (folder / table).write_bytes(text)


@linux_only
@pytest.mark.parametrize(("filled", "moves"), [(1.0, True), (0.6, True), (0.4, False), (0.0, False)])
def test_new_memory_that_is_filled_is_asked_for_and_nothing_else(monkeypatch, tmp_path, noted, filled, moves):
    monkeypatch.setattr(pages, "SETTINGS", settings(tmp_path, "always [madvise] never\n"))
    monkeypatch.setattr(pages, "PROCESS", tmp_path)
    write(tmp_path, "maps", HEAP)
    others = [
        (32 * MIB, 40 * MIB, b"r--p", b""),  # not to be written
        (64 * MIB, 72 * MIB, b"rw-s", b"/dev/zero (deleted)"),  # shared
        (96 * MIB, 104 * MIB, b"rw-p", b"/usr/lib/a l\xefbrary-\x85.so"),  # a file's, whatever bytes it is called by
        (128 * MIB, 136 * MIB, b"rw-p", b"[stack]"),
    ]
    with on_huge_pages():
        write(tmp_path, "smaps", HEAP, NEW, *others, filled=filled)
    advice = [mmap.MADV_HUGEPAGE, pages.MADV_COLLAPSE] if moves else []
    assert noted == [(18 * MIB, 4 * MIB, each) for each in advice]


@linux_only
@pytest.mark.parametrize("untold", ["maps", "smaps"])
def test_nothing_moves_where_a_process_is_not_told_of_its_memory(monkeypatch, tmp_path, noted, untold):
    monkeypatch.setattr(pages, "SETTINGS", settings(tmp_path, "always [madvise] never\n"))
    monkeypatch.setattr(pages, "PROCESS", tmp_path)
    if untold != "maps":
        write(tmp_path, "maps", HEAP)
    with on_huge_pages():
        if untold != "smaps":
            write(tmp_path, "smaps", HEAP, NEW)
    assert not noted


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
    monkeypatch.setattr(pages, "PROCESS", tmp_path / "not there")
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
def test_memory_taken_and_filled_within_lies_on_huge_pages():
    flags, page = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, pages._page_size()
    with on_huge_pages():
        taken = mmap.mmap(-1, 16 * page, flags=flags)
        taken[:] = b"x" * len(taken)
    address = ctypes.addressof(ctypes.c_char.from_buffer(taken))
    assert "hg" in told(address, "VmFlags").split(), "the kernel was asked"
    if tuple(int(each) for each in re.findall(r"\d+", platform.release())[:2]) >= (6, 1):
        assert int(told(address, "AnonHugePages").split()[0]) > 0, "and it moved some"
    assert taken[:] == b"x" * len(taken)


def told(address: int, what: str) -> str:
    """Of the mapping that holds `address`."""
    for region in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(errors="replace")):
        low, high = (int(each, 16) for each in region.split(maxsplit=1)[0].split("-"))
        if low <= address < high:
            return re.search(rf"^{what}:(.*)$", region, flags=re.M)[1]
    raise AssertionError("no such mapping")

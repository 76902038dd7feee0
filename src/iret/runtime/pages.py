"""Weights on huge pages, where Linux gives them to who asks.

With few tokens an engine spends its time reading weights, a page of 4 KiB after another, and looking up where each of them
lies. On pages of 2 MiB that is five hundred times less to look up. What it gains: docs/LOG.md, 2026-11-26.
"""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SETTINGS, PROCESS = Path("/sys/kernel/mm/transparent_hugepage"), Path("/proc/self")
MADV_COLLAPSE = 25  # now, not some day; Linux 6.1 or later, an error without effect before. mmap does not name it yet

Span = tuple[int, int]  # addresses: first, and the one behind the last


@contextmanager
def on_huge_pages() -> Iterator[None]:
    """Memory that the process takes and fills meanwhile, in pieces of a huge page or more, lies on huge pages afterwards.

    Nothing happens where there are none: on other systems, or where Linux is set to `never`. Nor where it has none left.
    """
    size = _page_size()
    before = _taken("maps") if size else None
    yield
    after = None if before is None else _taken("smaps")
    if before is None or after is None:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for first, behind in to_move(before, after, size):
        madvise(first, behind - first, mmap.MADV_HUGEPAGE)
        madvise(first, behind - first, MADV_COLLAPSE)


def to_move(before: list[Span], after: list[Span], size: int) -> list[Span]:
    """The whole pages of `size` bytes that `after` covers, each with something that `before` does not; both rising."""
    found = []
    for start, end in after:
        edge, last = -(-start // size) * size, end // size * size  # of its whole pages
        if edge >= last:
            continue
        for low, high in [*(each for each in before if start < each[1] and each[0] < end), (end, end)]:
            if start < low:
                found.append((max(edge, start // size * size), min(last, -(-low // size) * size)))
            start = high
    return [(first, behind) for first, behind in found if first < behind]


def _page_size() -> int:
    """Bytes of a huge page that a program can ask for; 0: it cannot."""
    try:
        is_offered = "[never]" not in (SETTINGS / "enabled").read_text()
        return int((SETTINGS / "hpage_pmd_size").read_text()) if is_offered else 0
    except (OSError, ValueError):
        return 0


def _taken(table: str) -> list[Span] | None:
    """Memory of this process that is no file's and nobody else's: its heap and what it mapped; None where it is not told.

    By `smaps` only what is filled, by half at least: stacks of threads, say, are not, and would take up what they never need.
    """
    try:
        lines = (PROCESS / table).read_bytes().strip().split(b"\n")
    except OSError:
        return None
    spans: list[Span] = []
    is_taken, span = False, (0, 0)
    for line in lines:
        words = line.split(maxsplit=5)
        if b"-" in words[0]:  # 7f00-7f80 rw-p 0 00:00 0 [heap]
            low, high = (int(each, 16) for each in words[0].split(b"-"))
            is_taken, span = words[1] == b"rw-p" and words[5:] in ([], [b"[heap]"]), (low, high)
            if is_taken and table == "maps":
                spans.append(span)
        elif is_taken and words[0] == b"Rss:" and 2 * 1024 * int(words[1]) >= span[1] - span[0]:
            spans.append(span)
    return spans

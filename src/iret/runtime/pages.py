"""Weights on huge pages, where Linux gives them to who asks.

With few tokens an engine spends its time reading weights, a page of 4 KiB after another, and looking up where each of them
lies. On pages of 2 MiB that is five hundred times less to look up. What it gains: docs/LOG.md, 2026-11-26.
"""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SETTINGS, MAPS = Path("/sys/kernel/mm/transparent_hugepage"), Path("/proc/self/maps")
MADV_COLLAPSE = 25  # now, not some day; Linux 6.1 or later, an error without effect before. mmap does not name it yet

Span = tuple[int, int]  # addresses: first, and the one behind the last


@contextmanager
def on_huge_pages() -> Iterator[None]:
    """Memory that the process takes meanwhile, in pieces of a huge page or more, lies on huge pages afterwards.

    Nothing happens where there are none: on other systems, or where Linux is set to `never`. Nor where it has none left.
    """
    size = _page_size()
    before = _taken() if size else []
    yield
    if not size:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for first, behind in to_move(before, _taken(), size):
        madvise(first, behind - first, mmap.MADV_HUGEPAGE)
        madvise(first, behind - first, MADV_COLLAPSE)


def to_move(before: list[Span], after: list[Span], size: int) -> list[Span]:
    """The whole pages of `size` bytes that `after` covers, each with something that `before` does not; both rising."""
    found = []
    for start, end in after:
        edge, last = -(-start // size) * size, end // size * size  # of its whole pages
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


def _taken() -> list[Span]:
    """Memory of this process that belongs to no file and to nobody else: its heap and what it mapped."""
    spans = []
    for line in MAPS.read_text().splitlines():
        span, mode, *_, name = [*line.split(maxsplit=5), ""][:6]
        if mode == "rw-p" and name.strip() in ("", "[heap]"):
            low, high = (int(each, 16) for each in span.split("-"))
            spans.append((low, high))
    return spans

"""The page as a folder of static files that runs a bundle in the visitor's browser.

    build_site(Path("pico-onnx"), Path("site"))

    site/index.html, page/     the page, in its mode "browser"
    site/bundle/               the bundle
    site/ort/                  ONNX Runtime Web: what runs WebAssembly on the CPU, and its licence

ONNX Runtime Web comes from npm at one pinned version, checked against its SHA-512, or from a folder that holds that version.
Nothing of the site is fetched from anywhere else, so it works from any static server, offline too.

Read first: `page/worker.js`.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from iret.runtime.bundle import FILE_NAME, Bundle, replace_folder

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# Of the package -> of the site. Not .mjs: older static servers send that as no script, and a browser refuses it.
RUNTIME_FILES = {
    "dist/ort.wasm.min.mjs": "ort.wasm.min.js",
    "dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.js",
    "dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
}
NPM_TIMEOUT_S = 600

PAGE = Path(__file__).parent / "page"
PHOTOS = Path(__file__).parents[1] / "photos"
SITE_NAME = "page/site.json"  # what marks a folder as a site of ours
SERVED, STATIC = 'data-mode="server"', 'data-mode="browser"'

LICENCE = f"""{PACKAGE} {VERSION} is part of ONNX Runtime and under the MIT licence, as follows. What of other projects is
compiled into it stands in ThirdPartyNotices.txt of ONNX Runtime's source.

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


@dataclass(frozen=True)
class Site:
    """What was written: bytes of the page, of the runtime and of the model."""

    page: int
    runtime: int
    model: int

    @property
    def total(self) -> int:
        return self.page + self.runtime + self.model


def build_site(bundle: Path, out: Path, *, runtime: Path | None = None, photos: Sequence[Path] | None = None) -> Site:
    """Write the site of `bundle` into `out`, whole or not at all; an older site there is replaced.

    `runtime`: an unpacked onnxruntime-web of `VERSION` (None: from npm). `photos`: examples to try (None: those that ship).

    Raises:
        ValueError: no bundle or one that a browser does not run; a folder that is not ours to replace; a runtime that is
            missing, cannot be fetched, or is another one than was asked for; photos that are missing.
    """
    description = Bundle.read(bundle)
    _refuse(description, bundle)
    description.verify(bundle)
    out = out.resolve()
    foreign = _foreign(out)
    if foreign is not None:
        raise ValueError(f"{out} holds something that is not a page of iret ({foreign}); give a new folder.")
    examples = _examples(photos)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "site"
        (folder / "ort").mkdir(parents=True)
        _copy_runtime(runtime, folder / "ort", Path(scratch))
        (folder / "bundle").mkdir()
        for name in (FILE_NAME, *description.checksums):
            shutil.copyfile(bundle / name, folder / "bundle" / name)
        _write_page(folder, examples)
        page, ort, model = (_size(folder / part) for part in ("page", "ort", "bundle"))
        sizes = Site(page + (folder / "index.html").stat().st_size, ort, model)
        replace_folder(folder, out)
    return sizes


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _refuse(bundle: Bundle, folder: Path) -> None:
    """Raises ValueError, by name, for what the page does not run."""
    wrong = {
        f"kind {bundle.kind!r}; a browser runs ONNX, so export with --format onnx": bundle.kind != "onnx",
        "one graph; export without --single-graph": bundle.is_single,
        "convolutions, which a browser computes slowly; export without --convolutions": bundle.is_convolved,
        "fixed token counts; export without --buckets": any(graph.tokens for stage in bundle.stages for graph in stage),
        f"{bundle.shape.in_chans} channels, and photos have 1 or 3": bundle.shape.in_chans not in (1, 3),
    }
    found = [sentence for sentence, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ValueError(f"the page does not run {folder}: it is of {found[0]}.")


def _foreign(out: Path) -> str | None:
    """What lies there that is not ours to replace; None: nothing, an empty folder, or a site of ours."""
    if not out.exists():
        return None
    if not out.is_dir():
        return "a file"
    names = {path.name for path in out.iterdir()}
    others = sorted(names - {"index.html", "page", "bundle", "ort"})
    if others:
        return ", ".join(others[:3]) + (" and more" if len(others) > 3 else "")
    return None if not names or (out / SITE_NAME).is_file() else f"no {SITE_NAME}"


def _examples(photos: Sequence[Path] | None) -> list[tuple[Path, dict[str, str]]]:
    """Files, and how `photos.json` names them."""
    if photos is None:
        return [(PHOTOS / entry["file"], entry) for entry in json.loads((PAGE / "photos.json").read_bytes())]
    missing = [path for path in photos if not path.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} does not exist or is not a file; give the path of a photo.")
    if len({path.name for path in photos}) < len(photos):
        raise ValueError("two of the photos have the same file name; rename one.")
    return [(path, {"file": path.name, "name": path.stem.replace("_", " ")}) for path in photos]


def _write_page(folder: Path, examples: list[tuple[Path, dict[str, str]]]) -> None:
    shutil.copytree(PAGE, folder / "page", ignore=shutil.ignore_patterns("index.html", ".*"))
    (folder / "page" / "photos").mkdir()
    for path, entry in examples:
        shutil.copyfile(path, folder / "page" / "photos" / entry["file"])
    (folder / "page" / "photos.json").write_text(json.dumps([entry for _, entry in examples]) + "\n")
    loaded = [*(folder / "bundle").glob("*.onnx"), *(folder / "bundle").glob("*.bin"), *(folder / "ort").glob("*.wasm")]
    total = sum(path.stat().st_size for path in loaded)  # what the bar of progress counts
    (folder / SITE_NAME).write_text(json.dumps({"total": total}) + "\n")
    index = (PAGE / "index.html").read_text()
    assert SERVED in index
    (folder / "index.html").write_text(index.replace(SERVED, STATIC))


# ---- the runtime


def _copy_runtime(runtime: Path | None, out: Path, scratch: Path) -> None:
    package = _fetch(scratch) if runtime is None else runtime
    try:
        found = json.loads((package / "package.json").read_bytes())
        named, version = found.get("name"), found.get("version")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{package} is not an unpacked {PACKAGE}: {_how()}.") from error
    if (named, version) != (PACKAGE, VERSION):
        raise ValueError(f"{package} holds {named} {version}, and the page needs {PACKAGE} {VERSION}: {_how()}.")
    for source, name in RUNTIME_FILES.items():
        if not (package / source).is_file():
            raise ValueError(f"{package / source} is missing: {_how()}.")
        shutil.copyfile(package / source, out / name)
    (out / "LICENSE.txt").write_text(LICENCE)


def _how() -> str:
    return f"`npm pack {PACKAGE}@{VERSION}` fetches it, `tar xzf` unpacks it, and its folder is `package`"


def _fetch(scratch: Path) -> Path:
    """The package from the registry that npm is configured for, unpacked."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"npm, which fetches {PACKAGE} {VERSION}, is not installed here; install Node.js, or give --runtime FOLDER with the "
            "unpacked package."
        )
    words = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--fetch-retries=1", "--prefer-offline"]
    words += ["--pack-destination=.", "--dry-run=false"]  # whatever an .npmrc says
    try:
        done = subprocess.run(words, cwd=scratch, capture_output=True, text=True, timeout=NPM_TIMEOUT_S, check=False)
        problem = done.stderr.strip() if done.returncode else None
    except subprocess.TimeoutExpired:
        problem = f"no answer in {NPM_TIMEOUT_S} s"
    if problem is not None:
        lines = problem.splitlines() or ["no reason given"]
        reason = next((line for line in lines if line.startswith("npm error")), lines[-1])  # warnings come first
        raise ValueError(
            f"npm could not fetch {PACKAGE} {VERSION} ({reason}); try again with a network, or give --runtime FOLDER with the "
            "unpacked package."
        )
    return _unpack(scratch / f"{PACKAGE}-{VERSION}.tgz", scratch)


def _unpack(archive: Path, scratch: Path) -> Path:
    """Raises ValueError for an archive that is not the pinned one."""
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != INTEGRITY:
        raise ValueError(f"what npm fetched is not the {PACKAGE} {VERSION} that was asked for: its SHA-512 differs.")
    with tarfile.open(archive) as tar:
        for name in ("package.json", *RUNTIME_FILES):
            tar.extract(f"package/{name}", scratch, filter="data")
    return scratch / "package"

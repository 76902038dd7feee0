"""Pictures on disk: they are signed, so that drawing one again replaces it, and nobody's photo is ever drawn over."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNATURE = {"Software": "iret"}


def save_image(image: Image.Image, path: Path) -> None:
    info = PngInfo()
    for key, value in SIGNATURE.items():
        info.add_text(key, value)
    image.save(path, pnginfo=info)


def save_figure(figure: "Figure", path: Path) -> None:
    figure.savefig(path, dpi=150, metadata=SIGNATURE)


def check_picture(path: Path) -> None:
    """Raises ValueError for a picture that could not be written, or would replace what was not drawn here."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} cannot be written: the folder {path.parent} does not exist; make it first.")
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} is no picture that iret writes; end its name in .png.")
    if path.exists() and not _is_ours(path):
        raise ValueError(f"{path} is there already, and was not drawn by iret; move it away, or write elsewhere.")


def _is_ours(path: Path) -> bool:
    """Whether it carries the signature."""
    try:
        with Image.open(path) as image:
            return SIGNATURE.items() <= image.info.items()
    except (OSError, ValueError, Image.DecompressionBombError):
        return False

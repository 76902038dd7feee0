"""Pictures that are drawn again replace themselves, and nothing else."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from iret.picture import check_picture, save_figure, save_image

IMAGE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize("save", [lambda path: save_image(IMAGE, path), lambda path: save_figure(Figure(), path)])
def test_what_was_drawn_here_may_be_drawn_again(tmp_path, save):
    check_picture(tmp_path / "a.png")
    save(tmp_path / "a.png")
    check_picture(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"


def test_whatever_else_is_there_stays(tmp_path):
    IMAGE.save(tmp_path / "photo.png")
    Figure().savefig(tmp_path / "figure.png")
    (tmp_path / "notes.png").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    for path in list(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=r"is there already, and was not drawn by iret; move it away"):
            check_picture(path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no/such/a.png", "no/such does not exist; make it first"),
        ("a.jpg", "is no picture that iret writes; end its name"),
    ],
)
def test_what_cannot_be_written_is_said_before(tmp_path, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_picture(tmp_path / name)

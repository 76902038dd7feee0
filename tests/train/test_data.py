"""Every form of data by one argument, every mistake in it refused in one sentence, and one order for any number of processes.

Images are 4 x 4 px of one grey value, so that a row can be told by its pixels.
"""

import io
import json
import re
import sys
from dataclasses import replace
from itertools import chain
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from iret.runtime.preprocess import Preprocess
from iret.train import data as data_module
from iret.train.data import collate, make_loader, open_data
from iret.train.digits import ClutteredDigits

PLAIN = Preprocess(img_size=(4, 4), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="nearest")


def encode(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    file: Path, labels: list, *, images: list | None = None, names: list | None = None, **columns
) -> Path:
    """Row i shows grey value i (modulo 256); `names` become the class names of Hugging Face metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [encode(row % 256) for row in range(len(labels))] if images is None else images
    table = pa.table({"image": [{"bytes": image, "path": None} for image in images], "label": labels, **columns})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=100)
    return file


def write_folder(root: Path, *files: str) -> Path:
    """File i shows grey value i."""
    for value, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(value))
    return root


def grey_values(data) -> list[tuple[int, int]]:
    """(grey value, label) of every item."""
    return [(int(image[0, 0, 0]), label) for image, label in (data[index] for index in range(len(data)))]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    return datasets


# ---- the embedded set


def test_the_embedded_digits_come_as_they_are_made():
    data = open_data("cluttered-digits", "val", Preprocess(img_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3))
    pixels, label = ClutteredDigits("val")[7]
    assert len(data) == 1000
    assert data.num_classes == 10
    assert data.class_names[3] == "3"
    image, found = data[7]
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    assert found == label


# ---- folders


def test_class_folders_give_their_names_and_all_their_images(tmp_path):
    write_folder(tmp_path, "bee/1.png", "ant/2.PNG", "bee/deep/3.jpg", ".cache/4.png", "bee/notes.txt")
    (tmp_path / "readme.md").write_text("x")
    train, val = open_data(str(tmp_path), "train", PLAIN), open_data(str(tmp_path), "val", PLAIN)
    assert train.class_names == ["ant", "bee"]
    assert sorted(grey_values(train) + grey_values(val)) == [(0, 1), (1, 0), (2, 1)]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_split_folders_are_found_by_any_of_their_names(tmp_path, name):
    write_folder(tmp_path, "train/ant/0.png", "train/bee/0.png", f"{name}/ant/0.png", "test/bee/0.png")
    found = {split: grey_values(open_data(str(tmp_path), split, PLAIN)) for split in ("train", "val", "test")}
    assert found == {"train": [(0, 0), (1, 1)], "val": [(2, 0)], "test": [(3, 1)]}


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, *(f"{name}/{index}.png" for name in ("bus", "train") for index in range(20)))
    data = open_data(str(tmp_path), "train", PLAIN)
    assert data.class_names == ["bus", "train"]
    assert {label for _, label in grey_values(data)} == {0, 1}


def test_a_class_that_only_the_test_split_has_is_refused(tmp_path):
    write_folder(tmp_path, "train/ant/0.png", "test/wasp/0.png")
    with pytest.raises(ValueError, match=r"the test split of .* has a class 'wasp', which its train split lacks"):
        open_data(str(tmp_path), "test", PLAIN)


def test_a_folder_without_class_folders_is_refused(tmp_path):
    write_folder(tmp_path, "0.png")
    with pytest.raises(ValueError, match=r"holds no images in class folders; expected .*/CLASS/IMAGE or"):
        open_data(str(tmp_path), "train", PLAIN)


def test_a_split_without_labels_is_refused(tmp_path):
    write_folder(tmp_path, "train/ant/0.png", "test/0.png")
    with pytest.raises(ValueError, match=r"the test split of .* has no labelled images; it needs at least one"):
        open_data(str(tmp_path), "test", PLAIN)


# ---- parquet


def test_parquet_files_are_told_apart_by_their_names(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [1])
    write_parquet(tmp_path / "validation.parquet", [1])
    write_parquet(tmp_path / "test" / "0000.parquet", [0])
    write_parquet(tmp_path / "extra.parquet", [0, 0, 0, 0])  # belongs to no split
    found = {split: grey_values(open_data(str(tmp_path), split, PLAIN)) for split in ("train", "val", "test")}
    assert found == {"train": [(0, 0), (1, 1), (0, 1)], "val": [(0, 1)], "test": [(0, 0)]}


@pytest.mark.parametrize(("name", "splits"), [("test.parquet", ["test"]), ("photos.parquet", ["train", "val", "test"])])
def test_one_file_is_the_split_that_its_name_begins_with(tmp_path, name, splits):
    file = str(write_parquet(tmp_path / name, [0, 1] * 50))
    sizes = {split: len(open_data(file, split, PLAIN)) for split in splits}
    if splits == ["test"]:
        assert sizes == {"test": 100}
        with pytest.raises(ValueError, match="has no train split, only test; choose another or add a train split"):
            open_data(file, "train", PLAIN)
    else:
        assert sizes["train"] + sizes["val"] == 100
        assert sizes["test"] == sizes["val"]


def test_class_names_come_from_the_hugging_face_metadata(tmp_path):
    file = write_parquet(tmp_path / "test.parquet", [2, 0], names=["ant", "bee", "cat"])
    data = open_data(str(file), "test", PLAIN)
    assert data.class_names == ["ant", "bee", "cat"]
    assert grey_values(data) == [(0, 2), (1, 0)]


@pytest.mark.parametrize(("labels", "names"), [([30, 4, 30], ["4", "30"]), (["b", "a", "b"], ["a", "b"])])
def test_without_metadata_the_sorted_labels_are_the_classes(tmp_path, labels, names):
    data = open_data(str(write_parquet(tmp_path / "test.parquet", labels)), "test", PLAIN)
    assert data.class_names == names
    assert [label for _, label in grey_values(data)] == [1, 0, 1]


def test_a_split_that_lacks_a_class_counts_as_train_does(tmp_path):
    write_parquet(tmp_path / "train.parquet", [4, 7, 9] * 10)
    write_parquet(tmp_path / "test.parquet", [9, 4])
    data = open_data(str(tmp_path), "test", PLAIN)
    assert data.class_names == ["4", "7", "9"]
    assert grey_values(data) == [(0, 2), (1, 0)]


def test_images_may_be_bare_bytes_and_labels_in_any_column(tmp_path):
    table = pa.table({"jpg": [encode(7), encode(8)], "kind": [1, 0]})
    pq.write_table(table, tmp_path / "test.parquet")
    assert grey_values(open_data(str(tmp_path), "test", PLAIN, label_column="kind")) == [(7, 1), (8, 0)]


def test_large_files_stay_on_disk_and_give_the_same_rows(tmp_path, hub_cache, monkeypatch):
    write_parquet(tmp_path / "data" / "train.parquet", [0, 1, 2, 1] * 30, names=["ant", "bee", "cat"])
    write_parquet(tmp_path / "data" / "test.parquet", [2, 1], names=["ant", "bee", "cat"])
    held = {split: open_data(str(tmp_path / "data"), split, PLAIN) for split in ("train", "val", "test")}
    monkeypatch.setattr(data_module, "MAX_HELD_BYTES", 0)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("it was read into memory"))
    for split, expected in held.items():
        mapped = open_data(str(tmp_path / "data"), split, PLAIN)
        assert mapped.class_names == expected.class_names
        assert grey_values(mapped) == grey_values(expected)


def test_large_files_of_bare_bytes_stay_on_disk_too(tmp_path, hub_cache, monkeypatch):
    pq.write_table(pa.table({"jpg": [encode(7), encode(8)], "label": ["b", "a"]}), tmp_path / "test.parquet")
    monkeypatch.setattr(data_module, "MAX_HELD_BYTES", 0)
    data = open_data(str(tmp_path / "test.parquet"), "test", PLAIN)
    assert data.class_names == ["a", "b"]
    assert grey_values(data) == [(7, 1), (8, 0)]


def test_text_that_is_called_parquet_is_refused(tmp_path):
    (tmp_path / "train.parquet").write_text("milk, eggs, bread\n")
    with pytest.raises(ValueError, match=r"train\.parquet is not a parquet file that can be read"):
        open_data(str(tmp_path), "train", PLAIN)


def test_parquet_without_images_is_refused(tmp_path):
    pq.write_table(pa.table({"x": [1.0], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet has no image column \(.*\), only x, label"):
        open_data(str(tmp_path), "train", PLAIN)


@pytest.mark.parametrize(("wanted", "said"), [(None, "label"), ("breed", "breed")])
def test_a_missing_label_column_is_refused(tmp_path, wanted, said):
    pq.write_table(pa.table({"image": [encode(0)], "kind": [0]}), tmp_path / "train.parquet")
    message = rf"train\.parquet has no label column '{said}', only image, kind; name it with --label-column"
    with pytest.raises(ValueError, match=message):
        open_data(str(tmp_path), "train", PLAIN, label_column=wanted)


def test_a_row_without_a_label_is_refused_by_its_number(tmp_path):
    file = write_parquet(tmp_path / "train.parquet", [0, 1, None, 1, None])
    with pytest.raises(ValueError, match=r"column 'label' of .*train\.parquet has no label in row 2 \(2 in all\)"):
        open_data(str(file), "train", PLAIN)


def test_a_label_without_a_class_is_refused_by_its_row(tmp_path):
    file = write_parquet(tmp_path / "test.parquet", [0, -1], names=["ant", "bee"])
    data = open_data(str(file), "test", PLAIN)
    with pytest.raises(ValueError, match="image 1 has label -1, which is none of the 2 classes"):
        data[1]


# ---- the hub


def test_the_prefix_hf_reads_through_the_datasets_library(tmp_path, hub_cache):
    root = write_folder(tmp_path / "photos", "train/ant/0.png", "train/bee/0.png", "test/bee/0.png")
    train, test = (open_data(f"hf:{root}", split, PLAIN) for split in ("train", "test"))
    assert train.class_names == test.class_names == ["ant", "bee"]
    assert grey_values(test) == [(2, 1)]


def test_a_null_image_of_the_hub_is_a_corrupt_one(tmp_path, hub_cache):
    file = write_parquet(tmp_path / "test.parquet", [0, 1], names=["ant", "bee"])
    table = pq.read_table(file)
    hole = pa.array([{"bytes": encode(5), "path": None}, None], table.schema.field("image").type)
    pq.write_table(table.set_column(0, "image", hole), file)
    for spec in (str(file), f"hf:{tmp_path}"):
        data = open_data(spec, "test", PLAIN)
        assert data[0][0].unique().tolist() == [5]
        assert data[1] is None


def test_a_null_label_of_the_hub_is_refused(tmp_path, hub_cache):
    write_parquet(tmp_path / "train.parquet", [0, None])
    with pytest.raises(ValueError, match=r"column 'label' of hf:.* has no label in row 1"):
        open_data(f"hf:{tmp_path}", "train", PLAIN)


def test_a_hub_that_cannot_be_reached_is_one_sentence(hub_cache, monkeypatch):
    def load_dataset(name):
        raise ConnectionError(f"Couldn't reach '{name}'\non the Hub")

    monkeypatch.setattr(hub_cache, "load_dataset", load_dataset)
    message = (
        "data 'nobody/nothing' cannot be loaded as a file, a folder or a Hugging Face data set "
        r"\(ConnectionError: Couldn't reach 'nobody/nothing' on the Hub\); check the name and the network\.$"
    )
    with pytest.raises(ValueError, match=message):
        open_data("nobody/nothing", "train", PLAIN)


@pytest.mark.parametrize("spec", ["./images", "/data/images", "~/images", "my/own/images"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(monkeypatch, spec):
    monkeypatch.setattr("iret.train.data._hub_splits", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=re.escape(f"data {spec!r} is no file or folder here, and no hub id")):
        open_data(spec, "train", PLAIN)


def test_without_the_datasets_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data 'nobody/nothing' is neither .*; check the path, or: pip install 'iret"):
        open_data("nobody/nothing", "train", PLAIN)


def test_a_hub_set_of_unknown_splits_is_refused(hub_cache, monkeypatch):
    monkeypatch.setattr(hub_cache, "load_dataset", lambda name: {"first": None, "second": None})
    with pytest.raises(
        ValueError, match="nobody/odd has the splits first, second; one must be called train, val or test"
    ):
        open_data("nobody/odd", "train", PLAIN)


# ---- what is held out


def test_one_training_image_in_twenty_is_held_out_and_always_the_same(tmp_path):
    write_parquet(tmp_path / "train.parquet", list(range(4000)), images=[encode(0)] * 4000)
    write_parquet(tmp_path / "test.parquet", list(range(4000)), images=[encode(1)] * 4000)
    train, val, test = (open_data(str(tmp_path), split, PLAIN) for split in ("train", "val", "test"))
    assert sorted([*train.rows, *val.rows]) == list(range(4000))
    assert len(val) == 189  # 200 expected, standard deviation 14
    assert val.rows[:5].tolist() == [6, 37, 40, 82, 94]
    assert np.array_equal(open_data(str(tmp_path), "val", PLAIN).rows, val.rows)
    assert val[0][0].unique().tolist() == [0]  # of train, not of test
    assert len(test) == 4000


def test_with_a_validation_split_nothing_is_held_out(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1] * 50)
    write_parquet(tmp_path / "val.parquet", [0, 1])
    train, val, test = (open_data(str(tmp_path), split, PLAIN) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (100, 2, 2)


# ---- corrupt images


@pytest.fixture(scope="module")
def one_in_ten_thousand(tmp_path_factory):
    images = [encode(3)] * 10_000
    images[6789] = images[6789][:-30]
    return str(write_parquet(tmp_path_factory.mktemp("corrupt") / "test.parquet", [0, 1] * 5000, images=images))


def test_a_corrupt_image_among_10000_is_skipped_and_counted(one_in_ten_thousand):
    data = open_data(one_in_ten_thousand, "test", PLAIN)
    assert data[6789] is None
    batches = list(make_loader(data, 100, seed=0, epoch=0, shuffle=True, drop_last=False))
    assert sum(skipped for _, _, skipped in batches) == 1
    assert sum(len(labels) for _, labels, _ in batches) == 9999
    assert all(images.shape == (len(labels), 3, 4, 4) for images, labels, _ in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_among_10000_stops_by_option(one_in_ten_thousand, workers):
    data = open_data(one_in_ten_thousand, "test", PLAIN, on_corrupt="stop")
    loader = make_loader(data, 100, seed=0, epoch=0, shuffle=False, start_batch=67, workers=workers, drop_last=False)
    with pytest.raises(ValueError, match=r"^image 6789 cannot be read: .*; get the file again\.$"):
        list(loader)


def test_a_batch_of_corrupt_images_alone_is_empty():
    images, labels, skipped = collate([None, None])
    assert (len(images), len(labels), skipped) == (0, 0, 2)


# ---- batches


@pytest.fixture
def numbered(tmp_path):
    """50 images whose label is their row."""
    return open_data(str(write_parquet(tmp_path / "test.parquet", list(range(50)))), "test", PLAIN)


def rows(data, batch_size: int, **options) -> list[list[int]]:
    """The labels of every batch."""
    options = {"seed": 0, "epoch": 0, "shuffle": True, "drop_last": False, **options}
    return [labels.tolist() for _, labels, _ in make_loader(data, batch_size, **options)]


def test_a_batch_is_bytes_and_whole_numbers(numbered):
    images, labels, skipped = next(iter(make_loader(numbered, 8, seed=0, epoch=0, shuffle=False, drop_last=True)))
    assert (images.dtype, images.shape) == (torch.uint8, (8, 3, 4, 4))
    assert (labels.dtype, labels.tolist(), skipped) == (torch.int64, list(range(8)), 0)
    assert images[:, 0, 0, 0].tolist() == labels.tolist()


def test_the_order_depends_on_seed_and_epoch_alone(numbered):
    first = rows(numbered, 8)
    assert sorted(chain(*first)) == list(range(50))
    assert rows(numbered, 8) == first
    assert len({str(each) for each in (first, rows(numbered, 8, seed=1), rows(numbered, 8, epoch=1))}) == 3
    assert [*chain(*rows(numbered, 5))] == [*chain(*first)]  # nor on the batch size


def test_workers_change_nothing(numbered):
    assert rows(numbered, 8, workers=2) == rows(numbered, 8)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_share_the_batches_of_one(numbered, world_size):
    shares = [rows(numbered, 12, share=(rank, world_size)) for rank in range(world_size)]
    together = [[*chain(*parts)] for parts in zip(*shares, strict=True)]
    assert together == rows(numbered, 12)


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_evaluation_sees_every_image_once_over_all_processes(numbered, world_size):
    shares = [rows(numbered, 8, shuffle=False, share=(rank, world_size)) for rank in range(world_size)]
    assert sorted(chain(*chain(*shares))) == list(range(50))


def test_an_incomplete_batch_is_dropped_on_request(numbered):
    assert rows(numbered, 8, drop_last=True) == rows(numbered, 8)[:6]
    assert len(rows(numbered, 10, drop_last=True)) == 5


def test_going_on_in_mid_epoch_decodes_nothing_before(numbered, monkeypatch):
    decoded = []
    open_image = data_module.open_image
    monkeypatch.setattr(data_module, "open_image", lambda source: decoded.append(source) or open_image(source))
    rest = rows(numbered, 8, start_batch=5)
    assert len(decoded) == 10
    assert rest == rows(numbered, 8)[5:]


def test_what_was_decoded_is_kept_if_all_of_it_is_small(numbered, monkeypatch):
    first = [numbered[index] for index in range(len(numbered))]
    monkeypatch.setattr(numbered, "read", None)  # nothing may be read again
    for index, (pixels, label) in enumerate(first):
        again = numbered[index]
        assert torch.equal(again[0], pixels) and again[1] == label


def test_large_data_is_decoded_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(data_module, "MAX_HELD_BYTES", 2 * 3 * 8 * 8 - 1)
    reads: list[int] = []

    def read(row):
        reads.append(row)
        return np.zeros((8, 8, 3), dtype=np.uint8), 0

    images = data_module.ImageData(range(2), read, ["only"], replace(PLAIN, img_size=(8, 8)), "stop")
    for index in (0, 0, 1):
        images[index]
    assert reads == [0, 0, 1]


def test_data_can_be_sent_to_a_worker_that_shares_no_memory(numbered, tmp_path):
    write_folder(tmp_path, "photos/train/ant/0.png")
    for data in (numbered, open_data(str(tmp_path / "photos"), "train", PLAIN)):
        assert len(ForkingPickler.dumps(data)) < 100_000


# ---- mistakes in the call


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='all' is unknown; choose from train, val, test"):
        open_data("cluttered-digits", "all", PLAIN)


def test_an_unknown_way_with_corrupt_images_is_refused(numbered, tmp_path):
    with pytest.raises(ValueError, match="on_corrupt='ignore' is unknown; choose skip or stop"):
        open_data(str(tmp_path), "test", PLAIN, on_corrupt="ignore")

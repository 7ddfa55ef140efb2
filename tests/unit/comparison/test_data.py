"""Images as they lie on disk: what each layout is trained and tested on, and how bad data is named."""

from __future__ import annotations

import struct

import pytest

from fxgraft.comparison.data import Item, open_image, read_data, split
from fxgraft.errors import ConfigError
from unit.comparison.images import CLASSES, DOMAINS, write_classes, write_domains, write_tar


@pytest.fixture
def domains(tmp_path):
    return write_domains(tmp_path / "data")


def names(items):
    return {item.member or item.path.rpartition("/data/")[2] for item in items}


def test_a_domain_is_held_out(domains):
    found = read_data(domains, hold_out="red")
    (task,) = found.tasks
    assert (found.kind, found.classes, task.name) == ("domains", CLASSES, "red")
    assert {item.path.split("/")[-3] for item in (*task.train, *task.validation)} == {"blue", "green"}
    assert {item.path.split("/")[-3] for item in task.test} == {"red"}
    assert len(task.test) == 16
    assert len(task.train) == 28
    assert len(task.validation) == 4  # one of eight of each class and domain
    assert not set(task.train) & set(task.validation)
    assert task.target == task.test
    assert found.counts == dict.fromkeys(DOMAINS, 16)


def test_all_domains_or_some(domains):
    assert [task.name for task in read_data(domains, hold_out="all").tasks] == list(DOMAINS)
    assert [task.name for task in read_data(domains, hold_out=["red", "blue"]).tasks] == ["red", "blue"]


def test_tars_are_as_good_as_folders(domains, tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    for name in DOMAINS:
        write_tar(folder / f"set24_{name}.tar.gz", domains / name)
    packed, plain = (read_data(each, hold_out="red").tasks[0] for each in (folder, domains))
    assert [item.label for item in packed.train] == [item.label for item in plain.train]
    for one, other in zip(packed.test, plain.test, strict=True):
        assert open_image(one).tobytes() == open_image(other).tobytes()
    by_pattern = read_data(folder / "set24_*.tar.gz", hold_out="red").tasks[0]
    assert by_pattern == packed
    whole = read_data(write_tar(tmp_path / "all.tar", domains), hold_out="red").tasks[0]
    assert [item.label for item in whole.test] == [item.label for item in packed.test]


def test_splits(tmp_path):
    for name, domain, count in (("train", 0, 8), ("val", 1, 2), ("test", 2, 4)):
        write_classes(tmp_path / "data" / name, domain, count)
    (task,) = read_data(tmp_path / "data").tasks
    assert (task.name, len(task.train), len(task.validation), len(task.test)) == ("test", 16, 4, 8)


def test_without_a_test_split_validation_is_tested_and_selects_nothing(tmp_path):
    for name, domain in (("train", 0), ("valid", 1)):
        write_classes(tmp_path / "data" / name, domain)
    (task,) = read_data(tmp_path / "data").tasks
    assert {item.path.split("/")[-3] for item in task.test} == {"valid"}
    assert {item.path.split("/")[-3] for item in task.validation} == {"train"}
    write_classes(tmp_path / "alone" / "train")
    with pytest.raises(ConfigError, match=r"has a train split alone.\nAdd test/ beside it"):
        read_data(tmp_path / "alone")


def test_one_folder_of_classes_is_split_by_a_fixed_draw(tmp_path):
    found = read_data(write_classes(tmp_path / "data", count=10))
    (task,) = found.tasks
    assert (found.kind, task.name, len(task.test)) == ("classes", "test", 4)
    assert not {*task.train, *task.validation} & set(task.test)
    assert len({*task.train, *task.validation, *task.test}) == 20
    assert read_data(tmp_path / "data") == found


def test_other_images_to_test_on_and_to_adapt_to(domains, tmp_path):
    other = write_domains(tmp_path / "other", ("dark", "light"), count=3)
    photos = write_classes(tmp_path / "photos" / "any", count=2)
    found = read_data(domains, test=other, target=photos.parent)
    assert [task.name for task in found.tasks] == ["dark", "light"]
    for task in found.tasks:
        assert len(task.train) + len(task.validation) == 48
        assert {item.label for item in task.target} == {-1}
        assert len(task.target) == 4
    with pytest.raises(ConfigError, match=r"'blue' has classes that training does not have: bars, dots"):
        read_data(write_renamed(tmp_path), test=domains, hold_out=None)


def write_renamed(tmp_path):
    root = write_classes(tmp_path / "renamed")
    for name in CLASSES:
        (root / name).rename(root / f"{name}2")
    return root


def write_mnist(root, count):
    """Write the two splits of MNIST as its own files, of images that are their label times twenty."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split_name in ("train", "t10k"):
        labels = bytes(number % 10 for number in range(count))
        images = b"".join(bytes([20 * label]) * 28 * 28 for label in labels)
        (folder / f"{split_name}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, count, 28, 28) + images
        )
        (folder / f"{split_name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
    return root


def test_a_data_set_by_timms_name(tmp_path):
    found = read_data(f"torch/mnist:{write_mnist(tmp_path, 20)}")
    (task,) = found.tasks
    assert (found.kind, len(found.classes), len(task.test)) == ("splits", 10, 20)
    assert len(task.train) + len(task.validation) == 20
    for item in task.test:
        assert open_image(item).getpixel((3, 3)) == (20 * item.label,) * 3
    with pytest.raises(
        ConfigError, match=r"could not read the train split of 'torch/cifar10.*\n?.*Nothing is downloaded"
    ):
        read_data(f"torch/cifar10:{tmp_path}")


def test_sharing_out_keeps_one_image_of_each_class_that_has_two():
    items = tuple(Item(str(n), "", label) for label, count in enumerate((1, 2, 30)) for n in range(count))
    kept, apart = split(items, 0.1, seed=0)
    assert [sum(item.label == label for item in apart) for label in range(3)] == [0, 1, 3]
    assert len(kept) + len(apart) == len(items)
    assert split(items, 0.0, seed=0) == (items, ())


def test_bad_places(domains, tmp_path):
    cases = {
        "nowhere": r"There is no .*nowhere.*data",
        "data/red/bars/0.png": "neither a folder nor a tar",
        "empty": "holds no images in class folders",
        "nothing*": "holds no images",
    }
    (tmp_path / "empty").mkdir()
    for place, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            read_data(tmp_path / place)
    with pytest.raises(
        ConfigError, match=r"holds the domains blue, green, red, and nothing says which is tested"
    ):
        read_data(domains)
    with pytest.raises(ConfigError, match=r"no domain 'read' to hold out.*'red'"):
        read_data(domains, hold_out="read")
    with pytest.raises(ConfigError, match=r"hold_out names domains, and .* holds classes"):
        read_data(domains / "red", hold_out="red")


def test_bad_folders(domains, tmp_path):
    (domains / "red" / "dots").rename(domains / "red" / "spots")
    with pytest.raises(ConfigError, match=r"red lacks dots"):
        read_data(domains, hold_out="red")
    (domains / "red" / "spots").rename(domains / "red" / "dots")
    (domains / "stray.png").write_bytes((domains / "red" / "dots" / "0.png").read_bytes())
    with pytest.raises(ConfigError, match=r"images where none should be: stray.png"):
        read_data(domains, hold_out="red")
    (domains / "stray.png").unlink()
    (domains / "grey").mkdir()
    with pytest.raises(ConfigError, match=r"folders without images: grey"):
        read_data(domains, hold_out="red")
    one = write_classes(tmp_path / "one")
    for image in (one / "dots").iterdir():
        image.unlink()
    (one / "dots").rmdir()
    with pytest.raises(ConfigError, match=r"has one class, 'bars'"):
        read_data(one)
    with pytest.raises(ConfigError, match=r"has one domain, only"):
        read_data(write_domains(tmp_path / "single", ("only",)), hold_out="only")


def test_bad_tars(domains, tmp_path):
    write_tar(tmp_path / "mixed" / "a.tar", domains) if (tmp_path / "mixed").mkdir() is None else None
    (tmp_path / "mixed" / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"mixes folders \(folder, …\) and tars \(a.tar, …\)"):
        read_data(tmp_path / "mixed")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "mixed" / "a.tar").read_bytes()[:700])
    with pytest.raises(ConfigError, match=r"Cannot read .*cut.tar"):
        read_data(tmp_path / "cut.tar")
    for folder, other in (("same", "a.tar.gz"), ("whole", "b.tar")):
        (tmp_path / folder).mkdir()
        for name in ("a.tar", other):
            write_tar(tmp_path / folder / name, domains / "red" if folder == "same" else domains)
    with pytest.raises(ConfigError, match=r"names of the tars do not tell the domains apart: a, a"):
        read_data(tmp_path / "same")
    with pytest.raises(
        ConfigError, match=r"a.tar should hold class folders with images, and holds blue, green, red"
    ):
        read_data(tmp_path / "whole")


def test_an_image_that_does_not_decode_is_named(domains):
    (domains / "red" / "dots" / "3.png").write_bytes(b"not an image")
    task = read_data(domains, hold_out="red").tasks[0]
    with pytest.raises(ConfigError, match=r"Cannot read .*red/dots/3.png as an image"):
        [open_image(item) for item in task.test]

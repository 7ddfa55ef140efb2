"""Images as they lie on disk: what each layout is trained and tested on, and how bad data is named."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from fxgraft.comparison.data import read_data, split
from fxgraft.errors import ConfigError
from fxgraft.io.images import Item, open_image
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
    assert found.source.images == dict.fromkeys(DOMAINS, 16)


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
    (domains / "grey").rmdir()
    (domains / "red" / "dots" / "notes").mkdir()  # below the classes there may be anything
    assert len(read_data(domains, hold_out="red").tasks) == 1
    for domain in DOMAINS:  # a class whose files have an ending that is not read
        (domains / domain / "rings").mkdir()
        (domains / domain / "rings" / "0.jfif").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"folders without images: blue/rings \(0\.jfif, …\)"):
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


def test_any_spelling_of_an_extension_is_read(tmp_path):
    folder = write_classes(tmp_path / "data")
    for number, suffix in enumerate((".PNG", ".Png")):
        (folder / "bars" / f"{number}.png").rename(folder / "bars" / f"{number}{suffix}")
    for number, suffix in enumerate((".webp", ".bmp", ".TIF", ".gif"), 2):
        with Image.open(folder / "bars" / f"{number}.png") as image:
            image.save(folder / "bars" / f"{number}{suffix}")
        (folder / "bars" / f"{number}.png").unlink()
    found = read_data(folder)
    assert found.source.images == {"": 16}
    assert {open_image(item).size for task in found.tasks for item in task.train} == {(24, 24)}
    for file in (folder / "dots").iterdir():
        file.rename(file.with_suffix(".pict"))
    with pytest.raises(ConfigError, match=r"folders without images: dots(?s:.*)end in \.jpg, .*\.webp"):
        read_data(folder)


def test_what_tools_leave_beside_images_is_no_class(tmp_path):
    folder = write_classes(tmp_path / "data")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(folder / "bars", folder / name)
    assert read_data(folder).classes == CLASSES
    tar = write_tar(tmp_path / "all.tar", folder)
    assert read_data(tar).source.images == {"": 16}


def test_two_names_of_one_split(tmp_path):
    for name in ("train", "Training", "test"):
        write_classes(tmp_path / "data" / name)
    with pytest.raises(ConfigError, match=r"two parts for train: Training and train.*\n.*together"):
        read_data(tmp_path / "data")


def test_members_of_tars_with_one_name_and_links(tmp_path):
    folder = write_classes(tmp_path / "classes")
    path = write_tar(tmp_path / "data.tar", folder)
    with tarfile.open(path, "a") as archive:
        archive.add(folder / "dots" / "0.png", arcname="./bars/0.png")  # the last of a name counts
        for kind, name, target in (
            (tarfile.LNKTYPE, "./bars/hard.png", "./bars/1.png"),
            (tarfile.SYMTYPE, "./bars/soft.png", "2.png"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    found = read_data(path)
    assert found.source.images == {"": 18}

    def pixels(member):
        return np.asarray(open_image(Item(str(path), f"./bars/{member}.png", 0)))

    with Image.open(folder / "dots" / "0.png") as last:
        assert (pixels(0) == np.asarray(last)).all()
    assert (pixels("hard") == pixels(1)).all()
    assert (pixels("soft") == pixels(2)).all()
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("./bars/broken.png")
        link.type, link.linkname = tarfile.SYMTYPE, "nowhere.png"
        archive.addfile(link)
    with pytest.raises(ConfigError, match=r"broken.png is a link to what isn't in the archive"):
        read_data(path)


def test_a_tar_that_was_written_again_is_opened_again(tmp_path):
    path = write_tar(tmp_path / "data.tar", write_classes(tmp_path / "first"))
    item = read_data(path).tasks[0].train[0]
    before = np.asarray(open_image(item))
    write_tar(path, write_classes(tmp_path / "second", domain=1))
    assert (np.asarray(open_image(item)) != before).any()
    write_tar(path, tmp_path / "second" / "bars")
    with pytest.raises(ConfigError, match=r"Cannot read .*as an image"):
        open_image(item)


def test_sixteen_bits_keep_their_shades(tmp_path):
    shades = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096
    Image.fromarray(shades).save(tmp_path / "grey.png")
    found = np.asarray(open_image(Item(str(tmp_path / "grey.png"), "", 0)))[..., 0]
    assert (found == shades >> 8).all()
    Image.fromarray(shades.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ConfigError, match=r"float.tiff as an image: its 32 bits a pixel have no range"):
        open_image(Item(str(tmp_path / "float.tiff"), "", 0))


def test_a_png_that_is_broken_inside(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        stream, "PNG"
    )
    content = bytearray(stream.getvalue())
    at = content.index(b"IDAT")
    content[at : at + 4] = b"\0\0\0\0"
    (tmp_path / "broken.png").write_bytes(bytes(content))
    with pytest.raises(ConfigError, match=r"Cannot read .*broken.png as an image"):
        open_image(Item(str(tmp_path / "broken.png"), "", 0))


def test_what_is_tested_is_said_once_and_never_trained_on(domains, tmp_path):
    other = write_domains(tmp_path / "other", count=4)
    with pytest.raises(ConfigError, match=r"hold_out= and test= both say what is tested"):
        read_data(domains, hold_out="red", test=other)
    with pytest.raises(
        ConfigError, match=r"48 of the .* images of .* are trained on, too|16 of the 16 images"
    ):
        read_data(domains, test=domains)
    (tmp_path / "link").symlink_to(domains / "red")
    with pytest.raises(ConfigError, match=r"16 of the 16 images to test on are trained on, too: .*link"):
        read_data(domains, test=tmp_path / "link")
    splits = tmp_path / "splits"
    for name in ("train", "test"):
        write_classes(splits / name, count=4)
    (task,) = read_data(domains, test=splits).tasks
    assert {item.path.split("/")[-3] for item in task.test} == {"test"}


def test_validation_is_not_of_training(domains, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (place / "train").symlink_to(domains / "red")
    (place / "val").symlink_to(domains / "red")
    (place / "test").symlink_to(domains / "blue")
    with pytest.raises(ConfigError, match="16 of the 16 validation images are trained on, too"):
        read_data(place)


def test_images_to_adapt_to_lie_in_any_folder(domains, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    for number in range(3):
        shutil.copy(domains / "red" / "dots" / f"{number}.png", target)
    (target / "more").mkdir()
    shutil.copy(domains / "red" / "dots" / "3.png", target / "more")
    (task,) = read_data(domains, hold_out="red", target=target).tasks
    assert [item.label for item in task.target] == [-1] * 4
    assert len({item.path for item in task.target}) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no images to adapt to"):
        read_data(domains, hold_out="red", target=tmp_path / "empty")


def test_names_of_folders_that_are_no_text(domains):
    (domains / "red").rename(domains / os.fsdecode(b"caf\xe9"))
    found = read_data(domains, hold_out="all")
    assert [task.name for task in found.tasks] == ["blue", r"caf\xe9", "green"]


def test_links_to_the_same_images(domains, tmp_path):
    shared = tmp_path / "shared"
    for kind in ("splits", "domains"):
        (shared / kind).mkdir(parents=True)
    for name in ("train", "test"):
        (shared / "splits" / name).symlink_to(domains / "red")
    for name in ("first", "second"):
        (shared / "domains" / name).symlink_to(domains / "red")
    with pytest.raises(ConfigError, match="16 of the 16 images to test on are trained on"):
        read_data(shared / "splits")
    with pytest.raises(ConfigError, match="16 of the 16 images to test on are trained on"):
        read_data(shared / "domains", hold_out="first")
    copies = tmp_path / "copies"
    for kind in CLASSES:
        (copies / kind).mkdir(parents=True)
        os.link(domains / "red" / kind / "0.png", copies / kind / "0.png")
    with pytest.raises(ConfigError, match="2 of the 2 images to test on are trained on"):
        read_data(domains, test=copies)


def test_classes_that_training_does_not_have_are_of_a_named_folder(domains, tmp_path):
    write_classes(tmp_path / "more")
    (tmp_path / "more" / "dots").rename(tmp_path / "more" / "stars")
    with pytest.raises(ConfigError, match=r"'.*more' has classes that training does not have: stars"):
        read_data(domains, test=tmp_path / "more")


def test_domains_in_an_array(domains):
    found = read_data(domains, hold_out=np.array(["red", "blue"]))
    assert [task.name for task in found.tasks] == ["red", "blue"]


def test_patterns_are_of_tars(domains):
    with pytest.raises(ConfigError, match=r"blue is no tar\. A pattern names tars"):
        read_data(domains / "*")


def test_names_of_tars_with_dots(tmp_path):
    for name in ("train", "test"):
        write_tar(tmp_path / f"pets.{name}.tar", write_classes(tmp_path / name))
    found = read_data(tmp_path / "pets.*.tar")
    assert (found.kind, found.source.images) == ("splits", {"test": 16, "train": 16})


def test_a_folder_of_ones_own_named_as_a_library(tmp_path, monkeypatch):
    write_classes(tmp_path / "torch" / "pets")
    monkeypatch.chdir(tmp_path)
    assert read_data("torch/pets").classes == CLASSES


def test_a_relative_place_is_kept_when_the_working_directory_changes(tmp_path, monkeypatch):
    write_classes(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    items = read_data("data").tasks[0].train
    monkeypatch.chdir("/")
    assert open_image(items[0]).size == (24, 24)


def test_the_digest_is_of_the_images_and_not_of_their_place(tmp_path):
    first = read_data(write_classes(tmp_path / "first")).source
    moved = tmp_path / "elsewhere" / "first"
    shutil.copytree(tmp_path / "first", moved)
    assert read_data(moved).source == first
    os.truncate(moved / "bars" / "0.png", 10)
    assert read_data(moved).source.digest != first.digest
    packed = read_data(write_tar(tmp_path / "first.tar", tmp_path / "first")).source
    assert packed.digest == first.digest

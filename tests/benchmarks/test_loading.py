"""Domains from folders and from tars."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from benchmarks.loops.domains import Domain
from benchmarks.loops.loading import load_domains
from PIL import Image

from fxgraft.errors import ConfigError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def jpeg(value, size=(20, 12), kind="JPEG"):
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 40)).save(stream, kind)
    return stream.getvalue()


def make_folders(root, classes=("cat", "dog"), domains=("photo", "sketch"), count=3):
    for domain in domains:
        for label, name in enumerate(classes):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.jpg").write_bytes(jpeg(60 * label + 10 * index))
    return root


def make_tar(path, members):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def class_tar(path, classes=("cat", "dog"), count=2):
    names = [(label, f"{name}/{index}.jpg") for label, name in enumerate(classes) for index in range(count)]
    return make_tar(path, {name: jpeg(90 * label) for label, name in names})


@pytest.fixture(scope="module")
def domain():
    labels = torch.arange(200) % 7
    images = torch.randint(256, (200, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    return Domain("plain", images, labels, tuple("abcdefg"))


def test_split_is_stratified_and_disjoint(domain):
    rest, held = domain.split(0.2, seed=3)
    assert len(rest) + len(held) == len(domain)
    expected = [round(0.2 * count) for count in domain.labels.bincount().tolist()]
    assert held.labels.bincount().tolist() == expected
    assert torch.equal(held.images, domain.split(0.2, seed=3)[1].images)
    assert not torch.equal(held.images, domain.split(0.2, seed=4)[1].images)
    assert len(domain.split(0)[1]) == 0
    with pytest.raises(ConfigError, match=r"in \[0, 1\), got 1"):
        domain.split(1)


# ----------------------------------------------------------------------------------- files on disk


def test_folders(tmp_path):
    photo, sketch = load_domains(make_folders(tmp_path), 8)
    assert (photo.name, sketch.name) == ("photo", "sketch")
    assert photo.classes == ("cat", "dog")
    assert photo.images.shape == (6, 3, 8, 8)
    assert photo.images.dtype == torch.uint8
    assert photo.labels.tolist() == [0, 0, 0, 1, 1, 1]
    # The colours survive, in the order of the files (JPEG is off by a little).
    red = photo.images[:, 0].float().mean((1, 2))
    assert torch.allclose(red, torch.tensor([0.0, 10, 20, 60, 70, 80]), atol=4)


def test_folders_skip_what_is_no_image(tmp_path):
    root = make_folders(tmp_path)
    (root / "README.txt").write_text("about")
    (root / "photo" / "cat" / "notes.txt").write_text("about")
    (root / "photo" / "cat" / "._0.jpg").write_text("left behind by a file manager")
    (root / ".cache").mkdir()
    assert len(load_domains(root, 8)[0]) == 6


def test_tars_lose_the_common_part_of_their_names(tmp_path):
    for name in ("art_painting", "cartoon"):
        class_tar(tmp_path / f"pacs96_{name}.tar")
    assert [domain.name for domain in load_domains(tmp_path, 8)] == ["art_painting", "cartoon"]


def test_tars_without_a_common_part(tmp_path):
    class_tar(tmp_path / "photo.tar")
    class_tar(tmp_path / "plain_sketch.tar.gz")
    assert [domain.name for domain in load_domains(tmp_path, 8)] == ["photo", "plain_sketch"]


def test_a_common_beginning_is_cut_between_words(tmp_path):
    class_tar(tmp_path / "set_photo.tar")
    class_tar(tmp_path / "set_plain.tar")
    assert [domain.name for domain in load_domains(tmp_path, 8)] == ["photo", "plain"]


def test_one_tar_is_one_domain(tmp_path):
    (domain,) = load_domains(class_tar(tmp_path / "cifar10_train.tar"), 8)
    assert domain.name == "cifar10_train"
    assert domain.labels.tolist() == [0, 0, 1, 1]


def test_tar_with_leading_folders(tmp_path):
    members = {f"./set/{name}/0.jpg": jpeg(9) for name in ("cat", "dog")}
    (domain,) = load_domains(make_tar(tmp_path / "a.tar", members), 8)
    assert domain.classes == ("cat", "dog")


def test_the_largest_family_of_tars_is_read(tmp_path):
    for name in ("a", "b", "c"):
        class_tar(tmp_path / f"pacs_{name}.tar")
    for name in ("train", "test"):
        class_tar(tmp_path / f"other_{name}.tar", classes=("x", "y"))
    assert [domain.name for domain in load_domains(tmp_path, 8)] == ["a", "b", "c"]
    assert [domain.name for domain in load_domains(tmp_path / "other_*.tar", 8)] == ["test", "train"]


def test_folders_and_tars_agree(tmp_path):
    root = make_folders(tmp_path / "folders")
    (tmp_path / "tars").mkdir()
    for domain in ("photo", "sketch"):
        files = sorted((root / domain).rglob("*.jpg"))
        members = {path.relative_to(root / domain).as_posix(): path.read_bytes() for path in reversed(files)}
        make_tar(tmp_path / "tars" / f"{domain}.tar", members)
    for one, other in zip(load_domains(root, 8), load_domains(tmp_path / "tars", 8), strict=True):
        assert one.name == other.name
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_limit_is_per_class_and_seeded(tmp_path):
    root = make_folders(tmp_path, count=6)
    limited = load_domains(root, 8, limit=2)
    assert limited[0].labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(limited[0].images, load_domains(root, 8, limit=2)[0].images)
    choices = {load_domains(root, 8, limit=2, seed=seed)[0].images.sum().item() for seed in range(5)}
    assert len(choices) > 1
    assert torch.equal(load_domains(root, 8, limit=99)[0].images, load_domains(root, 8)[0].images)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    folder = tmp_path / "d" / "c"
    folder.mkdir(parents=True)
    kind = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (10, 10)).save(folder / f"0.{kind}")
    assert load_domains(tmp_path, 8)[0].images.shape == (1, 3, 8, 8)


def test_tar_members_cannot_reach_outside(tmp_path):
    members = {"../../dog/0.jpg": jpeg(1), "/cat/0.jpg": jpeg(2)}
    path = make_tar(tmp_path / "sub.tar", members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("dog/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    (domain,) = load_domains(path, 8)
    assert domain.classes == ("cat", "dog")
    assert len(domain) == 2
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------ errors


def test_missing_path_suggests(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match=r"There is no .*photo\..*'photos'"):
        load_domains(tmp_path / "photo", 8)


def test_pattern_without_a_match(tmp_path):
    with pytest.raises(ConfigError, match="Nothing matches"):
        load_domains(tmp_path / "*.tar", 8)


def test_empty_directory(tmp_path):
    with pytest.raises(ConfigError, match="holds no domains"):
        load_domains(tmp_path, 8)


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="neither a directory nor a tar"):
        load_domains(tmp_path / "a.zip", 8)


def test_folders_mixed_with_tars(tmp_path):
    class_tar(make_folders(tmp_path) / "a.tar")
    with pytest.raises(ConfigError, match="mixes domain folders"):
        load_domains(tmp_path, 8)


def test_one_level_too_deep(tmp_path):
    root = make_folders(tmp_path)
    with pytest.raises(ConfigError, match="images outside class folders"):
        load_domains(root / "photo", 8)


def test_images_beside_class_folders(tmp_path):
    (make_folders(tmp_path) / "photo" / "stray.jpg").write_bytes(jpeg(3))
    with pytest.raises(ConfigError, match=r"images outside class folders \(stray.jpg\)"):
        load_domains(tmp_path, 8)


@pytest.mark.parametrize("name", ["0.jpg", "./0.jpg", "../0.jpg"])
def test_tar_with_images_outside_folders(tmp_path, name):
    with pytest.raises(ConfigError, match="images outside class folders"):
        load_domains(make_tar(tmp_path / "a.tar", {name: jpeg(3)}), 8)


def test_empty_class(tmp_path):
    (make_folders(tmp_path) / "photo" / "bird").mkdir()
    with pytest.raises(ConfigError, match="classes without images: bird"):
        load_domains(tmp_path, 8)


def test_empty_domain(tmp_path):
    (make_folders(tmp_path) / "void").mkdir()
    with pytest.raises(ConfigError, match="void holds no class folders"):
        load_domains(tmp_path, 8)


def test_empty_tar(tmp_path):
    with pytest.raises(ConfigError, match="holds no class folders"):
        load_domains(make_tar(tmp_path / "a.tar", {}), 8)


def test_different_classes_are_listed(tmp_path):
    class_tar(tmp_path / "s_a.tar", classes=("cat", "dog"))
    class_tar(tmp_path / "s_b.tar", classes=("cat", "hound", "emu"))
    with pytest.raises(ConfigError, match=r"(?s)a lacks emu, hound\n  b lacks dog\n"):
        load_domains(tmp_path, 8)


def test_undecodable_image_is_named(tmp_path):
    root = make_folders(tmp_path)
    (root / "photo" / "dog" / "1.jpg").write_bytes(b"not an image")
    with pytest.raises(ConfigError, match=r"Cannot read .*photo.dog.1\.jpg as an image"):
        load_domains(root, 8)


def test_truncated_image_in_a_tar_is_named(tmp_path):
    whole = jpeg(3, size=(64, 64))
    path = make_tar(tmp_path / "a.tar", {"dog/7.jpg": whole[: len(whole) // 2]})
    with pytest.raises(ConfigError, match=r"Cannot read .*a\.tar:dog/7\.jpg as an image"):
        load_domains(path, 8)


@pytest.mark.parametrize("content", [b"", b"no tar" * 200])
def test_damaged_tar(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=r"Cannot read .*a\.tar"):
        load_domains(tmp_path / "a.tar", 8)


def test_truncated_tar(tmp_path):
    path = class_tar(tmp_path / "a.tar", count=20)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ConfigError, match=r"Cannot read .*a\.tar"):
        load_domains(path, 8)


def test_two_families_of_equal_size(tmp_path):
    for name in ("a_1", "a_2", "b_1", "b_2"):
        class_tar(tmp_path / f"{name}.tar")
    with pytest.raises(ConfigError, match="several sets of the same size: a, b"):
        load_domains(tmp_path, 8)


@pytest.mark.parametrize(("size", "limit", "message"), [(0, None, "size must be"), (8, 0, "limit must be")])
def test_numbers_out_of_range(tmp_path, size, limit, message):
    with pytest.raises(ConfigError, match=message):
        load_domains(tmp_path, size, limit=limit)


def test_domain_length():
    assert len(Domain("a", torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.zeros(3).long(), ("x",))) == 3


# --------------------------------------------------------------------------------------- real data

needs_real = pytest.mark.skipif(not (REAL / "pacs96_photo.tar").exists(), reason="PACS is not there")


@needs_real
def test_real_pacs():
    domains = load_domains(REAL, 16, limit=3)
    assert [domain.name for domain in domains] == ["art_painting", "cartoon", "photo", "sketch"]
    assert domains[0].classes == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    assert all(len(domain) == 21 for domain in domains)

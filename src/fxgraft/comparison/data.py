"""Finds images: in folders or tars of domains, splits or classes, and in data sets that timm reads."""

from __future__ import annotations

import functools
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from PIL import Image

from fxgraft.arguments import path_at
from fxgraft.errors import ConfigError, candidates
from fxgraft.io.images import read_rgb
from fxgraft.patches.options import is_count

_TARS = (".tar", ".tar.gz", ".tgz")
_SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "test": "test"}
_SPLITS |= {"validation": "validation", "testing": "test"}
_SCHEMES = ("torch/", "hfds/", "tfds/")
LAYOUTS = (
    "It should hold one folder a domain, domain/class/image.jpg; or train/, val/ and test/, each with class folders; "
    "or class folders with images; or tars of these."
)


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        path: the file, the tar that holds it, or the name of a timm data set.
        member: name inside the tar, index in the data set; empty for a file.
        label: index of its class; -1 where labels do not count.
    """

    path: str
    member: str
    label: int

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else self.path


Items = tuple[Item, ...]


@dataclass(frozen=True)
class Task:
    """What one run is trained, validated and tested on.

    Attributes:
        name: name of what is tested: the domain that is held out, or the test set.
        train: images to train on.
        validation: images like those of training, set apart.
        test: images to score.
        target: images without labels for methods that adapt to a domain; empty where there are none.
    """

    name: str
    train: Items
    validation: Items
    test: Items
    target: Items = ()


@dataclass(frozen=True)
class Data:
    """All tasks of a comparison.

    Attributes:
        kind: "domains", "splits" or "classes".
        classes: names of the classes; labels are indices into them.
        tasks: in the order they are tested.
        counts: number of images by domain or split: what a second look at the same data should find.
    """

    kind: str
    classes: tuple[str, ...]
    tasks: tuple[Task, ...]
    counts: dict[str, int]


_Named = tuple[str, str, str]
"""Path, name in the archive, and class name of an image."""


VALIDATION = 0.1
"""Share of the training images of each domain and class that is set apart where the data has no validation split."""


def read_data(
    data: str | os.PathLike[str],
    *,
    hold_out: str | Sequence[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    target: str | os.PathLike[str] | None = None,
    per_class: int | None = None,
    test_per_class: int | None = None,
) -> Data:
    """Find the images and decide what is trained on and what is tested. No image is decoded.

    Args:
        data: a folder of domains (``domain/class/image``), of splits (``train|val|test/class/image``) or of classes
            (``class/image``); a folder with a tar for each domain or split, or a pattern for those
            (``data/pacs96_*.tar``); one tar of any of the three; or a data set by timm's name, such as
            ``torch/cifar10`` or ``hfds/owner/name``.
        hold_out: of domains, those that are tested, each by itself while all others are trained on; "all" for each.
        test: another such place with images to test on: of each of its domains, or of all of its images.
        target: images of the domain to adapt to. Their folders' names are not read. Without it, what is tested.
        per_class: the largest number of training images of each class of each domain, by a fixed draw.
        test_per_class: the largest number of test images of each class.

    Returns:
        The tasks. A folder of classes is split by a fixed draw: a fifth of each class is tested.

    Raises:
        ConfigError: nothing is found, images lie outside class folders, domains differ in their classes, there is
            one class only, or a domain that is named does not exist.
    """
    for name, count in (("per_class", per_class), ("test_per_class", test_per_class)):
        if count is not None and not is_count(count):
            raise ConfigError(f"{name} must be a whole number of at least 1, got {count!r}.")
    kind, groups = _groups(data)
    if hold_out is not None and kind != "domains":
        raise ConfigError(
            f"hold_out names domains, and {data} holds {kind}: {', '.join(sorted(groups))}.\n"
            f"{LAYOUTS}\nLeave hold_out away to test on the test split, or pass the folder of domains."
        )
    tests = None if test is None else _groups(test)[1]
    trained = {name: rows for name, rows in groups.items() if not (kind == "splits" and name != "train")}
    classes = tuple(sorted({row[2] for rows in trained.values() for row in rows}))
    if len(classes) < 2:
        raise ConfigError(
            f"{data} has one class, {''.join(classes)!r}. A comparison of classifiers needs two or more.\n"
            "Pass the folder that holds a folder for each class."
        )
    if kind == "domains":
        _check_same(trained, classes)
    items = {name: _items(rows, classes, name) for name, rows in groups.items()}
    adapted = (
        ()
        if target is None
        else tuple(Item(p, m, -1) for rows in _groups(target)[1].values() for p, m, _ in rows)
    )
    asked = {} if tests is None else {name: _items(rows, classes, name) for name, rows in tests.items()}
    make = functools.partial(_task, per_class=per_class, test_per_class=test_per_class)
    tasks = list(_tasks(kind, items, hold_out, asked, make, str(data)))
    counts = {name: len(rows) for name, rows in (items | asked).items()}
    with_target = tuple(replace(task, target=adapted or task.test) for task in tasks)
    return Data(kind, classes, with_target, counts)


def _tasks(
    kind: str,
    items: Mapping[str, Items],
    hold_out: str | Sequence[str] | None,
    asked: Mapping[str, Items],
    make: Callable[[str, Sequence[Items], Items, Items], Task],
    data: str,
) -> Iterable[Task]:
    if kind == "domains" and not asked:
        names = list(items)
        if len(names) < 2:
            raise ConfigError(
                f"{data} has one domain, {names[0]}. Holding one out needs two or more, or pass test=."
            )
        named = [hold_out] if isinstance(hold_out, str) else list(dict.fromkeys(hold_out or ()))
        chosen = names if hold_out == "all" else named
        if not chosen:
            raise ConfigError(
                f"{data} holds the domains {', '.join(names)}, and nothing says which is tested.\n"
                'Pass hold_out="NAME" for one that training does not see, or hold_out="all" for each in turn.'
            )
        for name in chosen:
            if name not in items:
                raise ConfigError(f"There is no domain {name!r} to hold out. {candidates(name, names)}")
            yield make(name, [rows for other, rows in items.items() if other != name], (), items[name])
        return
    if kind == "splits":
        validation, tested = items.get("validation", ()), items.get("test", ())
        if not tested and not asked:
            # A set that selects must not be the set that is scored: without a test split, validation is the test.
            tested, validation = validation, ()
        if not tested and not asked:
            raise ConfigError(f"{data} has a train split alone.\nAdd test/ beside it, or pass test=.")
        sets = asked or {"test": tested}
        for name, rows in sets.items():
            yield make(name, [items["train"]], validation, rows)
        return
    groups = list(items.values())
    if not asked:
        kept, apart = zip(*(split(rows, 0.2, seed=1) for rows in groups), strict=True)
        groups, asked = list(kept), {"test": tuple(item for rows in apart for item in rows)}
    for name, rows in asked.items():
        yield make(name, groups, (), rows)


def _task(
    name: str,
    groups: Sequence[Items],
    validation: Items,
    test: Items,
    *,
    per_class: int | None,
    test_per_class: int | None,
) -> Task:
    groups, test = [_few(rows, per_class) for rows in groups], _few(test, test_per_class)
    if validation:
        return Task(name, tuple(item for rows in groups for item in rows), validation, test)
    kept, apart = zip(*(split(rows, VALIDATION, seed=0) for rows in groups), strict=True)
    return Task(
        name,
        tuple(item for rows in kept for item in rows),
        tuple(item for rows in apart for item in rows),
        test,
    )


def _few(items: Items, count: int | None) -> Items:
    """Keep so many images of each class, drawn once and for all."""
    if count is None:
        return items
    return _parted(items, lambda members: count, seed=2)[0]


def split(items: Items, share: float, seed: int) -> tuple[Items, Items]:
    """Set a share of each class apart, at least one image of a class that has two; return what stays first."""

    def count(members: int) -> int:
        return max(1, round(share * members)) if share and members > 1 else 0

    apart, stays = _parted(items, count, seed)
    return stays, apart


def _parted(items: Items, count: Callable[[int], int], seed: int) -> tuple[Items, Items]:
    """Draw images of each class, as many as ``count`` says of their number; return these and the others."""
    generator = torch.Generator().manual_seed(seed)
    drawn: set[int] = set()
    for label in sorted({item.label for item in items}):
        members = [index for index, item in enumerate(items) if item.label == label]
        order = torch.randperm(len(members), generator=generator)[: count(len(members))]
        drawn |= {members[position] for position in order.tolist()}
    return (
        tuple(item for index, item in enumerate(items) if index in drawn),
        tuple(item for index, item in enumerate(items) if index not in drawn),
    )


def _items(rows: Sequence[_Named], classes: Sequence[str], where: str) -> Items:
    index = {name: label for label, name in enumerate(classes)}
    unknown = sorted({name for _, _, name in rows} - set(index))
    if unknown:
        raise ConfigError(
            f"{where!r} has classes that training does not have: {', '.join(unknown)}.\n"
            f"{candidates(unknown[0], list(classes))}"
        )
    return tuple(Item(path, member, index[name]) for path, member, name in rows)


def _check_same(groups: Mapping[str, Sequence[_Named]], classes: Sequence[str]) -> None:
    lacking = {name: sorted(set(classes) - {row[2] for row in rows}) for name, rows in groups.items()}
    lines = [f"  {name} lacks {', '.join(missing)}" for name, missing in lacking.items() if missing]
    if lines:
        raise ConfigError(
            "The domains must have the same classes, and they differ:\n"
            + "\n".join(lines)
            + "\nAdd the class "
            "folders or rename them. If the folders are classes, their images must lie directly in them."
        )


def _groups(data: str | os.PathLike[str]) -> tuple[str, dict[str, list[_Named]]]:
    """List the images by domain or split, and say which of the two these are."""
    if str(data).startswith(_SCHEMES):
        return "splits", _of_timm(str(data))
    path = path_at(data)
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "_")))
        tars = [entry for entry in entries if entry.name.lower().endswith(_TARS)]
        folders = [entry for entry in entries if entry.is_dir()]
        if tars and folders:
            raise ConfigError(
                f"{path} mixes folders ({folders[0].name}, …) and tars ({tars[0].name}, …).\n"
                f'Pass one kind with a pattern, for example "{path}/*.tar".'
            )
        groups = _of_tars(tars) if tars else _by_folders(path, _files(path))
    elif path.is_file():
        if not path.name.lower().endswith(_TARS):
            raise ConfigError(f"{path} is neither a folder nor a tar.\n{LAYOUTS}")
        groups = _by_folders(path, _members(path))
    elif set(path.name) & set("*?["):
        groups = _of_tars(sorted(path.parent.glob(path.name)))
    else:
        known = sorted(sibling.name for sibling in path.parent.iterdir()) if path.parent.is_dir() else []
        raise ConfigError(f"There is no {path}. In {path.parent}: {candidates(path.name, known)}")
    if not any(groups.values()):
        raise ConfigError(f"{path} holds no images in class folders.\n{LAYOUTS}")
    return _named_groups(groups)


def _named_groups(groups: dict[str, list[_Named]]) -> tuple[str, dict[str, list[_Named]]]:
    if "" in groups:
        return "classes", groups
    splits = {_SPLITS.get(name.lower(), ""): rows for name, rows in groups.items()}
    if "train" in splits and "" not in splits:
        return "splits", splits
    return "domains", groups


def _by_folders(root: Path, rows: list[tuple[str, str, PurePosixPath]]) -> dict[str, list[_Named]]:
    """Sort images by their folders: class/image, or group/class/image."""
    depths = Counter(len(place.parts) for _, _, place in rows)
    if set(depths) - {2, 3} or len(depths) > 1:
        usual = depths.most_common(1)[0][0] if depths else 0
        odd = next(str(place) for _, _, place in rows if len(place.parts) != usual or usual not in (2, 3))
        raise ConfigError(f"{root} has images where none should be: {odd}.\n{LAYOUTS}")
    groups: dict[str, list[_Named]] = {}
    for path, member, place in rows:
        group = place.parts[0] if len(place.parts) == 3 else ""
        groups.setdefault(group, []).append((path, member, place.parts[-2]))
    return groups


def _files(root: Path) -> list[tuple[str, str, PurePosixPath]]:
    places = sorted(
        PurePosixPath(Path(folder, name).relative_to(root).as_posix())
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if _is_image(name)
    )
    empty = [
        folder.name for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name[0] not in "._"
    ]
    empty = sorted(set(empty) - {place.parts[0] for place in places})
    if empty:
        raise ConfigError(f"{root} has folders without images: {', '.join(empty)}.\n{LAYOUTS}")
    return [(str(root / place), "", place) for place in places]


def _members(path: Path) -> list[tuple[str, str, PurePosixPath]]:
    try:
        with tarfile.open(path) as archive:
            names = sorted(
                member.name for member in archive.getmembers() if member.isreg() and _is_image(member.name)
            )
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ConfigError(
            f"Cannot read {path}: {error}\nThe archive may be incomplete: copy or download it again."
        ) from error
    # The names only ever become labels: nothing is written, so an absolute path or `..` leads nowhere.
    places = [
        PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in (".", "/")))
        for name in names
    ]
    return [(str(path), name, place) for name, place in zip(names, places, strict=True)]


def _of_tars(tars: Sequence[Path]) -> dict[str, list[_Named]]:
    """Read one tar of class folders for each domain or split; what all names begin with is left out."""
    stems = [tar.name[: tar.name.lower().index(".t")] for tar in tars]
    # These are names, not paths: character by character is what is meant.
    shared = os.path.commonprefix(stems) if len(stems) > 1 else ""  # noqa: RUF071
    cut = max(shared.rfind(sign) for sign in "_-.") + 1
    names = [stem[cut:] for stem in stems]
    if len(set(names)) < len(names) or not all(names):
        raise ConfigError(
            f"The names of the tars do not tell the domains apart: {', '.join(stems)}.\n"
            "What all names begin with is left out, and the rest has to differ. Name each tar after its domain."
        )
    groups = {}
    for name, tar in zip(names, tars, strict=True):
        inside = _by_folders(tar, _members(tar))
        if set(inside) != {""}:
            raise ConfigError(
                f"{tar} should hold class folders with images, and holds {', '.join(inside)}/.\n"
                "Of several tars, each is one domain or split. Pass one tar or a folder for data in further folders."
            )
        groups[name] = inside[""]
    return groups


def _is_image(name: str) -> bool:
    from timm.data.readers.img_extensions import is_img_extension

    base = PurePosixPath(name)
    return not base.name.startswith(".") and is_img_extension(base.suffix)


def _of_timm(name: str) -> dict[str, list[_Named]]:
    """Read the splits of a data set by timm's name."""
    splits: dict[str, list[_Named]] = {}
    failed: dict[str, Exception] = {}
    for split_name in ("train", "validation", "test"):
        place = f"{name}#{split_name}"
        try:
            data = _timm_data(place)
        except Exception as error:  # the data set's library may raise anything
            failed[split_name] = error
            continue
        labels = _timm_labels(data)
        names = getattr(data, "classes", None) or [str(label) for label in range(max(labels) + 1)]
        splits[split_name] = [(place, str(index), str(names[label])) for index, label in enumerate(labels)]
    if "train" not in splits:
        raise ConfigError(
            f"timm could not read the train split of {name!r}: {failed['train']}\n"
            "Nothing is downloaded. Fetch the data set first, or pass a folder of images."
        )
    if splits.get("test") == [
        (row[0].replace("#validation", "#test"), *row[1:]) for row in splits.get("validation", ())
    ]:
        del splits["validation"]  # timm gives the same split under both names
    return splits


@functools.lru_cache(maxsize=16)  # opening one lists all of its images, and every image asks for it
def _timm_data(place: str) -> Any:
    from timm.data.dataset_factory import create_dataset

    name, _, split_name = place.partition("#")
    name, _, root = name.partition(":")
    return create_dataset(name, root=root or None, split=split_name, download=False)


def _timm_labels(data: Any) -> list[int]:
    if hasattr(data, "targets"):
        return [int(label) for label in data.targets]
    reader = data.reader  # of the Hugging Face datasets library: a column, without decoding an image
    return [int(label) for label in reader.dataset[reader.label_key]]


def open_image(item: Item) -> Image.Image:
    """Decode an image to RGB.

    Raises:
        ConfigError: it cannot be read as an image; names it.
    """
    try:
        if "#" in item.path and item.path.startswith(_SCHEMES):
            return _timm_data(item.path)[int(item.member)][0].convert("RGB")
        source: IO[bytes] | Path = Path(item.path)
        if item.member:
            source = BytesIO(_archive(item.path, os.getpid()).extractfile(item.member).read())  # type: ignore[union-attr]
    except (OSError, ValueError, tarfile.TarError, Image.DecompressionBombError) as error:
        raise ConfigError(f"Cannot read {item} as an image: {error}\nRemove or replace it.") from error
    return read_rgb(source, str(item))


@functools.lru_cache(maxsize=16)
def _archive(path: str, process: int) -> tarfile.TarFile:  # an open file is not shared with a fork
    return tarfile.open(path)

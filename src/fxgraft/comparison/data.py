"""Finds images: in folders or tars of domains, splits or classes, and in data sets that timm reads."""

from __future__ import annotations

import functools
import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from fxgraft.arguments import path_at
from fxgraft.errors import ConfigError, candidates
from fxgraft.io.images import (
    EXTENSIONS,
    SCHEMES,
    Item,
    content_of,
    file_of,
    holds_image,
    is_hidden,
    is_image,
    opened,
    timm_data,
)
from fxgraft.patches.options import is_count

_TARS = (".tar", ".tar.gz", ".tgz")
_SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "test": "test"}
_SPLITS |= {"validation": "validation", "testing": "test"}
LAYOUTS = (
    "It should hold one folder a domain, domain/class/image.jpg; or train/, val/ and test/, each with class folders; "
    "or class folders with images; or tars of these.\n"
    f"Images are files that end in {', '.join(EXTENSIONS)}."
)


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
class Source:
    """Images at one place: what a second look at the same data should find.

    Attributes:
        name: of the folder or the file.
        images: their number, by domain or split.
        digest: of their files, by domain and class: names, sizes and a part of each. Where they lie isn't part of it.
    """

    name: str
    images: dict[str, int]
    digest: str


@dataclass(frozen=True)
class Data:
    """All tasks of a comparison.

    Attributes:
        kind: "domains", "splits" or "classes".
        classes: names of the classes; labels are indices into them.
        tasks: in the order they are tested.
        source: the images.
        test: other images to test on, if these were given.
        target: images to adapt to, if these were given.
    """

    kind: str
    classes: tuple[str, ...]
    tasks: tuple[Task, ...]
    source: Source
    test: Source | None = None
    target: Source | None = None


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
        test: another such place with images to test on, in place of ``hold_out``: its test split if it has splits,
            each of its domains, or all of its images.
        target: images of the domain to adapt to. Their folders' names are not read. Without it, what is tested.
        per_class: the largest number of training images of each class of each domain, by a fixed draw.
        test_per_class: the largest number of test images of each class.

    Returns:
        The tasks. A folder of classes is split by a fixed draw: a fifth of each class is tested.

    Raises:
        ConfigError: nothing is found, images lie outside class folders, domains differ in their classes, there is
            one class only, a domain that is named does not exist, or the same files are trained on and tested.
            Copies of a file under another name are not found.
    """
    for name, count in (("per_class", per_class), ("test_per_class", test_per_class)):
        if count is not None and not is_count(count):
            raise ConfigError(f"{name} must be a whole number of at least 1, got {count!r}.")
    kind, groups = _groups(data)
    if hold_out is not None and test is not None:
        raise ConfigError(
            "hold_out= and test= both say what is tested.\n"
            "Leave test= out to test on a domain that training does not see, or hold_out= to train on all domains."
        )
    if hold_out is not None and kind != "domains":
        parts = f": {', '.join(sorted(groups))}" if kind == "splits" else " alone"
        raise ConfigError(
            f"hold_out names domains, and {data} holds {kind}{parts}.\n"
            f"{LAYOUTS}\nLeave hold_out away to test on the test split, or pass the folder of domains."
        )
    tests = None if test is None else _tested(test)
    targets = None if target is None else _unlabelled(target)
    trained = {name: rows for name, rows in groups.items() if not (kind == "splits" and name != "train")}
    classes = tuple(sorted({row[2] for rows in trained.values() for row in rows}))
    if len(classes) < 2:
        raise ConfigError(
            f"{data} has one class, {''.join(classes)!r}. A comparison of classifiers needs two or more.\n"
            "Pass the folder that holds a folder for each class."
        )
    if kind == "domains":
        _check_same(trained, classes)
    items = {name: _items(rows, classes, name or str(data)) for name, rows in groups.items()}
    asked = {name: _items(rows, classes, name or str(test)) for name, rows in (tests or {}).items()}
    adapted = tuple(Item(p, m, -1) for rows in (targets or {}).values() for p, m, _ in rows)
    make = functools.partial(_task, per_class=per_class, test_per_class=test_per_class)
    named = [] if hold_out is None else [hold_out] if isinstance(hold_out, str) else hold_out
    tasks = list(_tasks(kind, items, list(dict.fromkeys(map(str, named))), asked, make, str(data)))
    every = {item for task in tasks for item in (*task.train, *task.validation, *task.test)}
    files = {item: file_of(item) for item in every}
    for task in tasks:
        _check_apart(task, files)
    with_target = tuple(replace(task, target=adapted or task.test) for task in tasks)
    return Data(
        kind,
        classes,
        with_target,
        _source(data, groups),
        None if tests is None else _source(test, tests),
        None if targets is None else _source(target, targets),
    )


def _unlabelled(target: str | os.PathLike[str]) -> dict[str, list[_Named]]:
    """List images whose folders' names are not read: in any folder, or in none."""
    path = path_at(target).absolute()
    if not path.is_dir() or any(entry.name.lower().endswith(_TARS) for entry in path.iterdir()):
        return _groups(target)[1]
    rows = [(str(path / place), "", "") for place in _images_of(_names_in(path))]
    if not rows:
        raise ConfigError(f"{path} holds no images to adapt to.\nImages end in {', '.join(EXTENSIONS)}.")
    return {"": rows}


def _tested(test: str | os.PathLike[str]) -> dict[str, list[_Named]]:
    kind, groups = _groups(test)
    return {"test": groups["test"]} if kind == "splits" and "test" in groups else groups


def _check_apart(task: Task, files: Mapping[Item, Any]) -> None:
    """Raise where images are tested that are trained on, or that choose settings; by the files of the items."""
    trained = {files[item] for item in task.train}
    chosen = [item for item in task.validation if files[item] in trained]
    if chosen:
        raise ConfigError(
            f"{len(chosen)} of the {len(task.validation)} validation images are trained on, too: {chosen[0]}.\n"
            "Their score says nothing about new images. Put others into the validation split, or leave it out."
        )
    known = trained | {files[item] for item in task.validation}
    twice = [item for item in task.test if files[item] in known]
    if twice:
        raise ConfigError(
            f"{len(twice)} of the {len(task.test)} images to test on are trained on, too: {twice[0]}.\n"
            "Their score says nothing about new images. Test on others: hold_out=, test= or a test split."
        )


def _source(place: Any, groups: Mapping[str, Sequence[_Named]]) -> Source:
    digest = hashlib.sha256()
    for group, rows in sorted(groups.items()):
        for path, member, label in rows:
            name = f"{group}/{label}/{PurePosixPath(member or path).name}: {content_of(path, member)}\n"
            digest.update(name.encode("utf-8", "surrogateescape"))
    counts = {name: len(rows) for name, rows in groups.items()}
    return Source(Path(os.path.normpath(path_at(place).absolute())).name, counts, digest.hexdigest())


def _tasks(
    kind: str,
    items: Mapping[str, Items],
    hold_out: list[str],
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
        chosen = names if hold_out == ["all"] else hold_out
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
    path = path_at(data).absolute()  # what reads the images may do so in another folder
    if str(data).startswith(SCHEMES) and not path.exists():
        return "splits", _of_timm(str(data))
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if not is_hidden(entry.name))
        tars = [entry for entry in entries if entry.name.lower().endswith(_TARS)]
        folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith("_")]
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
    return _named_groups(path, groups)


def _named_groups(path: Path, groups: dict[str, list[_Named]]) -> tuple[str, dict[str, list[_Named]]]:
    if "" in groups:
        return "classes", groups
    meant = {name: _SPLITS.get(name.lower(), "") for name in groups}
    if "train" not in meant.values() or "" in meant.values():
        return "domains", groups
    for name, split_name in meant.items():
        twin = next(other for other, what in meant.items() if what == split_name)
        if twin != name:
            raise ConfigError(
                f"{path} has two parts for {split_name}: {twin} and {name}.\n"
                "Put their images together, or pass a folder with one of them."
            )
    return "splits", {meant[name]: rows for name, rows in groups.items()}


def _by_folders(root: Path, rows: list[tuple[str, str, PurePosixPath]]) -> dict[str, list[_Named]]:
    """Sort images by their folders: class/image, or group/class/image."""
    depths = Counter(len(place.parts) for _, _, place in rows)
    if set(depths) - {2, 3} or len(depths) > 1:
        usual = depths.most_common(1)[0][0] if depths else 0
        odd = next(str(place) for _, _, place in rows if len(place.parts) != usual or usual not in (2, 3))
        raise ConfigError(f"{root} has images where none should be: {odd}.\n{LAYOUTS}")
    groups: dict[str, list[_Named]] = {}
    for path, member, place in rows:
        group = _text(place.parts[0]) if len(place.parts) == 3 else ""
        groups.setdefault(group, []).append((path, member, _text(place.parts[-2])))
    return groups


def _text(name: str) -> str:
    r"""Write the name of a folder as text that can be printed and kept; bytes of no text become ``\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _files(root: Path) -> list[tuple[str, str, PurePosixPath]]:
    found = _names_in(root)
    places = _images_of(found)
    of_classes = max((len(place.parts) - 1 for place in places), default=1)
    folders = {
        folder
        for folder in found
        if 0 < len(folder.parts) <= of_classes and not any(part.startswith("_") for part in folder.parts)
    }
    empty = sorted(folders - {above for place in places for above in place.parents})
    if empty:
        named = [f"{folder} ({found[folder][0]}, …)" if found[folder] else str(folder) for folder in empty]
        raise ConfigError(f"{root} has folders without images: {', '.join(named)}.\n{LAYOUTS}")
    return [(str(root / place), "", place) for place in places]


def _names_in(root: Path) -> dict[PurePosixPath, list[str]]:
    """List the files of a folder and of all below it, by folder; what the system keeps beside data is left out."""
    found = {}
    for folder, inside, names in os.walk(root, followlinks=True):
        inside[:] = [name for name in inside if not is_hidden(name)]
        parts = Path(folder).relative_to(root).parts
        found[PurePosixPath(*parts)] = sorted(name for name in names if not is_hidden(name))
    return found


def _images_of(found: Mapping[PurePosixPath, Sequence[str]]) -> list[PurePosixPath]:
    return sorted(folder / name for folder, names in found.items() for name in names if is_image(name))


def _members(path: Path) -> list[tuple[str, str, PurePosixPath]]:
    try:
        names = sorted(name for name, member in opened(path)[1].items() if holds_image(path, member))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ConfigError(
            f"Cannot read {path}: {error}\nThe archive may be incomplete: copy or download it again."
        ) from error
    # The names only ever become labels: nothing is written, so an absolute path or `..` leads nowhere.
    places = [
        PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in (".", "/")))
        for name in names
    ]
    return [
        (str(path), name, place)
        for name, place in zip(names, places, strict=True)
        if not any(map(is_hidden, place.parts))
    ]


def _of_tars(tars: Sequence[Path]) -> dict[str, list[_Named]]:
    """Read one tar of class folders for each domain or split; what all names begin with is left out."""
    suffixes = [next((end for end in _TARS if tar.name.lower().endswith(end)), "") for tar in tars]
    if not all(suffixes):
        raise ConfigError(
            f"{tars[suffixes.index('')]} is no tar. A pattern names tars, one for each domain or split.\n"
            "Pass the folder that holds these folders, or a pattern that ends in .tar."
        )
    stems = [tar.name[: -len(suffix)] for tar, suffix in zip(tars, suffixes, strict=True)]
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


def _of_timm(name: str) -> dict[str, list[_Named]]:
    """Read the splits of a data set by timm's name."""
    splits: dict[str, list[_Named]] = {}
    failed: dict[str, Exception] = {}
    for split_name in ("train", "validation", "test"):
        place = f"{name}#{split_name}"
        try:
            data = timm_data(place)
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


def _timm_labels(data: Any) -> list[int]:
    if hasattr(data, "targets"):
        return [int(label) for label in data.targets]
    reader = data.reader  # of the Hugging Face datasets library: a column, without decoding an image
    return [int(label) for label in reader.dataset[reader.label_key]]

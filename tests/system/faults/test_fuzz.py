"""Files with flipped bits, cut off, or with other entries: a full load or a typed error, and nothing in between."""

from __future__ import annotations

import functools
import json
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import fxgraft
import recipes
from fxgraft.io.recipe import content_digest
from models.toys import assert_same, net, state_of_everything
from system.contract.cases import same
from system.faults.lines import SIZE, bare
from system.properties.profiles import profiles
from unit.adaptation.adapting import adam, everything, network, with_generators

LONGEST = 20.0
"""Seconds that reading a file may take, whatever is in it."""

Change = Callable[[random.Random, bytes], bytes]


def flipped(chance: random.Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def flipped_at_the_start(chance: random.Random, content: bytes) -> bytes:
    """Where lengths and names are."""
    return flipped(chance, content[:64]) + content[64:]


def cut(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content))]


def lengthened(chance: random.Random, content: bytes) -> bytes:
    return content + chance.randbytes(chance.randrange(1, 50))


def overwritten(chance: random.Random, content: bytes) -> bytes:
    start = chance.randrange(len(content))
    return content[:start] + chance.randbytes(20) + content[start + 20 :]


DAMAGES: list[Change] = [flipped, flipped_at_the_start, cut, lengthened, overwritten]
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2.5, 10**9, -(10**30), 1e308, float("nan"), float("inf"), "", "a", "0" * 5000,
    [], [[]], [1, "a"], {}, {"a": {"b": None}},
]  # fmt: skip


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """List every (container, key) inside of nested dictionaries and lists."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        found += [(each, key) for key in keys]
        waiting += [each[key] for key in keys]
    return found


def changed(chance: random.Random, content: Any) -> Any:
    """Change an entry somewhere: to an odd value, to that of another entry, gone, or the order of all."""
    places = places_in(content)
    holder, key = chance.choice(places)
    way = chance.choice(("odd", "odd", "swap", "gone", "shuffled", "more"))
    if way == "odd":
        holder[key] = chance.choice(ODD_VALUES)
    elif way == "swap":
        other, there = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[there])) if not _holds_tensors(other[there]) else 0
    elif way == "gone":
        del holder[key]
    elif way == "more" and isinstance(holder, dict):
        holder["more"] = chance.choice(ODD_VALUES)
    elif isinstance(holder, dict):
        items = list(holder.items())
        chance.shuffle(items)
        holder.clear()
        holder.update(items)
    else:
        chance.shuffle(holder)
    return content


def _holds_tensors(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return True
    return False


def changed_tensors(chance: random.Random, tensors: dict[Any, Any]) -> dict[Any, Any]:
    """Change tensors of a state: shape, dtype, values, names, order."""
    key = chance.choice([key for key, value in tensors.items() if isinstance(value, Tensor)])
    value = tensors[key]
    way = chance.choice(("shape", "dtype", "values", "name", "gone", "more", "order", "empty", "swapped"))
    if way == "shape":
        tensors[key] = value.reshape(-1)[:1].repeat(chance.choice((2, 7, 10_000)))
    elif way == "dtype":
        tensors[key] = value.to(chance.choice((torch.float64, torch.bfloat16, torch.int8, torch.bool)))
    elif way == "values":
        tensors[key] = torch.full_like(value, chance.choice((0, 1, 100)))
    elif way == "name":
        tensors[key + "x"] = tensors.pop(key)
    elif way == "gone":
        del tensors[key]
    elif way == "more":
        tensors["graft_more.weight"] = value.clone()
    elif way == "empty":
        tensors[key] = value.new_zeros(0)
    elif way == "swapped":
        other = chance.choice([k for k, v in tensors.items() if isinstance(v, Tensor)])
        tensors[key], tensors[other] = tensors[other].clone(), tensors[key].clone()
    else:
        items = list(tensors.items())
        chance.shuffle(items)
        return dict(items)
    return tensors


@functools.cache
def saved() -> bytes:
    torch.manual_seed(0)
    model = fxgraft.patch(bare(), "selfnorm", input_size=SIZE)
    fxgraft.patch(model, "rsc", layer=["stage1", "stage2"], start=0.25, input_size=SIZE)
    with tempfile.TemporaryDirectory() as folder:
        return fxgraft.save(model, folder).read_bytes()


def caught(function: Callable[..., Any], *args: Any, **options: Any) -> fxgraft.FxgraftError | None:
    """Call a function; return the typed error that it raises, which says what is wrong and what to do."""
    try:
        function(*args, **options)
    except fxgraft.FxgraftError as raised:
        error = raised
    else:
        return None
    assert len(str(error).splitlines()) >= 2
    return error


def loads_or_refuses(folder: Path) -> bool:
    """Load into a bare model: wholly, and it works, or with an error of fxgraft's that leaves it as it was."""
    model = net().eval()
    before = state_of_everything(model)
    start = time.monotonic()
    error = caught(fxgraft.load, model, folder)
    assert time.monotonic() - start < LONGEST
    if error is not None:
        assert_same(before, state_of_everything(model))
        return False
    assert model(torch.zeros(2, *SIZE)).shape == (2, 4)
    fxgraft.unpatch(model)
    assert list(model.state_dict()) == [key for key, _ in before["tensors"]]
    return True


def header_of(content: bytes) -> Any:
    """Return what a safetensors file says of itself; None if that isn't JSON."""
    try:
        return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except ValueError:
        return None


@profiles(10, 90, st.sampled_from(DAMAGES), st.randoms())
def test_damaged_bytes_of_a_save(damage: Change, chance: random.Random) -> None:
    with tempfile.TemporaryDirectory() as where:
        file = Path(where) / "run.safetensors"
        content = damage(chance, saved())
        file.write_bytes(content)
        size = 8 + int.from_bytes(saved()[:8], "little")
        whole = header_of(content) == header_of(saved()) and content[size:] == saved()[size:]
        assert loads_or_refuses(file) == whole


@profiles(5, 40, st.booleans(), st.booleans(), st.randoms())
def test_other_contents_of_a_save(in_recipe: bool, in_weights: bool, chance: random.Random) -> None:
    """Changed on purpose, that is with the digest of the new content: nothing but the contents tells."""
    with tempfile.TemporaryDirectory() as where:
        file = Path(where) / "run.safetensors"
        file.write_bytes(saved())
        recipe, tensors = recipes.read(file)
        if in_recipe:
            recipe = changed(chance, recipe)
        if in_weights:
            tensors = changed_tensors(chance, tensors)
        recipes.write(file, recipe, tensors)
        loaded = loads_or_refuses(file)
        assert loaded or in_recipe or in_weights


# Checkpoints.


@functools.cache
def checkpoint() -> tuple[bytes, list[Tensor]]:
    """The file of a run of two steps, and what the run ended with."""
    torch.manual_seed(0)
    model = network()
    pair = adam(model)
    with tempfile.TemporaryDirectory() as folder:
        fxgraft.adapt(model, *with_generators(), steps=2, optimizers=pair, checkpoint=folder)
        return (Path(folder) / "adaptation.pt").read_bytes(), everything(model, pair)


def resumed(file: Path) -> list[Tensor] | None:
    """Go on from a file that has made all steps; None where it is refused, which leaves everything as it was."""
    torch.manual_seed(0)
    model = network()
    pair, loaders = adam(model), with_generators()

    def now() -> list[Any]:
        generators = [loader.generator.get_state() for loader in loaders]
        modes = [module.training for module in model.modules()]
        return [everything(model, pair), generators, modes, torch.get_rng_state()]

    before, start = now(), time.monotonic()
    error = caught(fxgraft.adapt, model, *loaders, steps=2, optimizers=pair, checkpoint=file)
    assert time.monotonic() - start < LONGEST
    if error is None:
        return everything(model, pair)
    assert same(now(), before)
    return None


@profiles(4, 30, st.sampled_from(DAMAGES), st.randoms())
def test_damaged_bytes_of_a_checkpoint(damage: Change, chance: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.pt"
        content, wanted = checkpoint()
        file.write_bytes(damage(chance, content))
        found = resumed(file)
        assert found is None or same(found, wanted)  # what is not read may be anything


@profiles(4, 30, st.sampled_from(["entries", "model", "discriminators"]), st.randoms())
def test_other_contents_of_a_checkpoint(what: str, chance: random.Random) -> None:
    """Changed on purpose, that is with the digest of the new content."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.pt"
        file.write_bytes(checkpoint()[0])
        content = torch.load(file, weights_only=True)
        del content["sha256"]
        if what == "entries":
            content = changed(chance, content)
        else:
            content[what] = changed_tensors(chance, dict(content[what]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(content, dict):
                content["sha256"] = content_digest({k: v for k, v in content.items() if k != "sha256"})
            torch.save(content, file)
        resumed(file)

"""What the shell completes: names of methods and of models. Nothing is loaded until the user asks for a completion."""

from __future__ import annotations

from fxgraft.cli.method_facts import all_facts


def complete_method(incomplete: str) -> list[str]:
    """Complete the name of a method."""
    return [name for name in all_facts() if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Complete the name of a model, of timm or, with ``torchvision/`` in front, of torchvision."""
    import timm
    from torchvision.models import list_models

    theirs = [f"torchvision/{name}" for name in list_models()]
    return [name for name in (*timm.list_models(), *theirs) if name.startswith(incomplete)]


def complete_spec(incomplete: str) -> list[str]:
    """Complete a patch: the method, then its options, ``rsc:layer=layer4,sco`` to ``rsc:layer=layer4,scope=``."""
    method, colon, rest = incomplete.partition(":")
    known = all_facts()
    if not colon or method not in known:
        return complete_method(incomplete)
    done, comma, begun = rest.rpartition(",")
    options = [option for option, *_ in known[method]["options"]]
    return [f"{method}:{done}{comma}{option}=" for option in options if option.startswith(begun)]

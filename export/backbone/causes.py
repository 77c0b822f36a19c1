"""Says in one line why a library failed, and where in a model."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_LENGTH = 300


def first_line(error: BaseException) -> str:
    """Return the error's class and the first line that says something; a line that ends in a colon takes the next along."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if any(character.isalnum() for character in line)]
    text = lines[0] if lines else ""
    for line in lines[1:]:
        if not text.endswith(":"):
            break
        text = f"{text} {line}"
    if len(text) > _LENGTH:
        text = f"{text[:_LENGTH].rstrip()} …"
    return f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}, without a message"


def chain(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an error, what caused it, what caused that …"""
    seen: set[int] = set()
    below: BaseException | None = error
    while below is not None and id(below) not in seen:
        seen.add(id(below))
        yield below
        below = below.__cause__ or (None if below.__suppress_context__ else below.__context__)


def deepest(error: BaseException) -> BaseException:
    """Return the error that all others followed from."""
    return list(chain(error))[-1]


def place(error: BaseException, module: nn.Module) -> str:
    """Return the innermost part of ``module`` that ran when an error was raised, such as ``model.layers.0.mlp (LlamaMLP)``.

    Returns the class of ``module`` if none of its parts was running.
    """
    import torch.fx

    names = {id(child.__dict__): name for name, child in module.named_modules() if name}  # torch.export wraps modules
    found = ""
    for each in chain(error):
        trace = each.__traceback__
        while trace is not None:
            running = trace.tb_frame.f_locals.get("self")
            if isinstance(running, nn.Module) and id(running.__dict__) in names:
                found = f"{names[id(running.__dict__)]} ({type(running).__name__})"
            node = trace.tb_frame.f_locals.get("node")  # the exporter translates one node after another
            if isinstance(node, torch.fx.Node) and node.meta.get("nn_module_stack"):
                name, kind = list(node.meta["nn_module_stack"].values())[-1]
                name = re.sub(r"\.slice\([^)]*\)", "", str(name))  # a module list's slice is no module of its own
                found = f"{name} ({str(getattr(kind, '__name__', kind)).rsplit('.', 1)[-1]})"
            trace = trace.tb_next
    return found or type(module).__name__

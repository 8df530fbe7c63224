"""What is public says what it takes, gives and refuses."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pnlac_fast
from pnlac_fast import coupling, ops, store

ARRAYS = re.compile(r"\b(Tensor|ndarray|Dataset|DataArray)\b")
DIMENSIONS = re.compile(r"\[(\w+|\.\.\.)(( - |, )(\w+|\.\.\.))*\]|\([a-z_]+(, [a-z_]+)+\)|on ``\w+``")
SELF_EVIDENT = ("path", "progress")  # of a store's functions; their annotation says it all


def public() -> Iterator[Any]:
    """Every function and class of the reference: those exported, and those on its pages by their own names."""
    modules = [pnlac_fast, store, ops, coupling]
    exported = coupling.__dict__ | {"__all__": [n for n, v in vars(coupling).items() if inspect.isfunction(v)]}
    names = {f"{m.__name__}.{n}" for m in modules[:3] for n in m.__all__}
    names |= {f"{coupling.__name__}.{n}" for n in exported["__all__"] if not n.startswith("_")}
    seen = set()
    for name in sorted(names | set(shown())):
        module, _, last = name.rpartition(".")
        value = getattr(importlib.import_module(module), last, None)
        if (inspect.isroutine(value) or inspect.isclass(value)) and value not in seen:
            seen.add(value)
            yield pytest.param(value, id=name)


def shown() -> list[str]:
    """Full names on the pages of the reference."""
    pages = (Path(__file__).parents[2] / "docs" / "reference").glob("*.md")
    return re.findall(r"^::: (pnlac_fast\.[\w.]+)", "\n".join(page.read_text() for page in pages), re.MULTILINE)


def sections(text: str) -> dict[str, str]:
    """The sections of a numpydoc docstring by title; what stands before the first one as ""."""
    parts = re.split(r"^([A-Z][A-Za-z ]+)\n-{3,}$\n", inspect.cleandoc(text), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def described(text: str) -> set[str]:
    """Names that a section describes: its lines without indentation."""
    heads = re.findall(r"^(\*{0,2}\w[\w, *]*?)(?: : .*)?$", text, flags=re.MULTILINE)
    return {name.strip(" *") for head in heads for name in head.split(",")}


def raised(function: Any) -> list[str]:
    """Names of the errors that a function's own body raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    return [ast.unparse(call.func if isinstance(call, ast.Call) else call) for call in calls]


@pytest.mark.parametrize("function", [p for p in public() if inspect.isroutine(p.values[0])])
def test_a_function_describes_parameters_result_and_errors(function: Any) -> None:
    found = sections(function.__doc__ or "")
    signature = inspect.signature(function)
    told = described(found.get("Parameters", "")) | set(re.findall(r"`(\w+)`", function.__doc__))
    silent = [name for name in signature.parameters if name not in told and name not in SELF_EVIDENT]
    assert silent == [], "a parameter that nothing is said of"
    if signature.return_annotation not in (None, "None") and "Iterator" not in str(signature.return_annotation):
        assert "Returns" in found or "Yields" in found or found[""].startswith("Return ")
    if raised(function):
        assert "Raises" in found or "StoreError" in found[""]


@pytest.mark.parametrize("kind", [p for p in public() if inspect.isclass(p.values[0])])
def test_a_class_describes_its_attributes_and_methods(kind: type) -> None:
    found = sections(kind.__doc__ or "")
    assert found[""].strip()
    told = described(found.get("Attributes", "") + found.get("Parameters", ""))
    fields = [name for name in getattr(kind, "__dataclass_fields__", {}) if not name.startswith("_")]
    assert [name for name in fields if name not in told] == []
    methods = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
    named = [name for name, value in methods.items() if isinstance(value, property) or inspect.isroutine(value)]
    assert [name for name in named if not getattr(kind, name).__doc__] == []


@pytest.mark.parametrize("function", [p for p in public() if inspect.isroutine(p.values[0])])
def test_arrays_have_their_dimensions_named(function: Any) -> None:
    signature = inspect.signature(function)
    taken = [p.annotation for p in signature.parameters.values()]
    if ARRAYS.search(f"{taken} {signature.return_annotation}"):
        assert DIMENSIONS.search(function.__doc__), "write [topic, neuron], or (run, question) of a Dataset"


def test_every_public_name_is_on_a_page_of_the_reference() -> None:
    assert "pnlac_fast.store" in shown(), "a page that shows all of it"
    last = {name.rpartition(".")[2] for name in shown()}
    assert [name for name in pnlac_fast.__all__ if name not in last and name != "__version__"] == []

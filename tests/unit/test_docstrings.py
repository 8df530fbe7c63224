"""What is public says what it takes, gives and refuses, in which units, and where a formula comes from."""

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

# What a name measures, as a pattern of the name, and what its description has to say.
UNITS = {
    r"\w*share|shares|top|\w*factor|\w*dropout|level|keeps|beta[12]|momentum|dampening|weight_decay": (
        r"\bshares?\b|\bfractions?\b|\[0, 1[\])]"
    ),
    r"lr|\w*learning_rate": r"\bper step\b",
    r"(anchor_|kl_)?weight": r"\bnats\b",
    r"max_grad_norm|eps": r"\bgradients?\b",
    r"temperature": r"\blogits\b",
    r"epochs": r"\bpasses\b",
    r"scale|\w*strength": r"\btimes\b|\bmultiplied\b",
    r"margins?|\w*shift|loss|log_odds|attribution|coupling|\w*effect|target": r"\bnats\b",
    r"rms|(mean|std)_\w+|add": r"\bunits of the activation",
    r"\w*ratio|reduction\w*|retention|recovered|overlap|chance": r"\b(ratio|fraction|share)s?\b| / |\bJaccard\b",
    r"seconds": r"\bwall time\b",
    r"flops": r"\boperations\b",
}
NUMBERS = re.compile(r"\b(float|ndarray|Tensor|DataArray|Dataset)\b")
# What the values of an array are.
UNIT = re.compile(
    r"\bnats\b|\b(ratio|fraction|share)s?\b|\bhow often\b|\bin the unit|\bunits of\b|\b(activation|gradient)s?\b",
    re.IGNORECASE,
)
PASSED_ON = ("prompt", "with_text", "with_result", "open_result", "open_examples", "open_sets")  # as they were given

# Modules that compute what a paper or a textbook defines. Each of their functions and classes names it, or says that it
# is ours, or refers to one that does.
SOURCED = [
    *("ops.sums", "ops.swiglu", "ops.masked", "ops.fused", "scores", "top_sets", "chance", "evidence", "noise"),
    *("attribution", "sides", "patching", "recovery", "patches", "inhibition", "anchoring", "divergence", "slices"),
    *("optimizers", "rivals", "comparison", "coupling", "stance", "summary", "agreement", "side_effects"),
    *("topic_words", "null_space"),
]
SOURCE = re.compile(r"\barXiv\s\d{4}\.\d{5}\b|\bdoi 10\.\d{4,}/\S+|\bours\b", re.IGNORECASE)
# They read, write, name, arrange or choose, and compute nothing that could have a source.
ARRANGING = {
    *(
        "check_swiglu",
        "fuses",
        "ranks",
        "records",
        "score_table",
        "open_summary",
        "log_probabilities",
        "paired_weights",
    ),
    *("load_patch", "save_patch", "made_for", "apply", "Reference", "fingerprint", "Slice", "StepMask"),
    *("why_not_masked", "as_run", "method_name", "join", "collect", "off_topic", "over", "agreement_rows"),
    *("table", "shown", "tables", "TopicWords"),
}


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


def entries(text: str) -> dict[str, str]:
    """What a section says of each name that it describes; names that share a description share it here."""
    found = {}
    for part in re.split(r"^(?=\*{0,2}\w)", text, flags=re.MULTILINE):
        head, _, body = part.partition("\n")
        found |= {name.strip(" *"): body for name in head.partition(" : ")[0].split(",") if head}
    return found


def measures(name: str) -> list[str]:
    """What has to be said of a name."""
    return [said for names, said in UNITS.items() if re.fullmatch(names, name)]


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


@pytest.mark.parametrize("value", list(public()))
def test_what_is_measured_says_in_which_unit(value: Any) -> None:
    text = value.__doc__
    found = sections(text)
    told = entries(found.get("Parameters", "")) | entries(found.get("Attributes", ""))
    annotated = {name: str(kind) for name, kind in getattr(value, "__annotations__", {}).items()}
    if inspect.isclass(value):
        annotated |= {name: str(kind) for name, kind in getattr(value.__init__, "__annotations__", {}).items()}
    annotated.pop("return", None)
    given = {name: told.get(name, text) for name, kind in annotated.items() if NUMBERS.search(kind)}
    floats = [name for name in given if re.search(r"\bfloat\b", annotated[name]) and not name.startswith("_")]
    assert [name for name in floats if not measures(name)] == [], "write into UNITS what such a name measures"
    given |= dict.fromkeys(re.findall(r"`(\w+)`", found.get("Returns", "")), found.get("Returns", ""))
    silent = [(n, said) for n, about in given.items() for said in measures(n) if not re.search(said, about, re.I)]
    assert silent == []


@pytest.mark.parametrize("value", list(public()))
def test_numbers_that_are_returned_say_in_which_unit_they_are(value: Any) -> None:
    own = [v for name, v in vars(value).items() if not name.startswith("_")] if inspect.isclass(value) else [value]
    for function in (one.fget if isinstance(one, property) else one for one in own):
        given = str(getattr(function, "__annotations__", {}).get("return"))
        if NUMBERS.search(given) and "Iterator" not in given and function.__name__ not in PASSED_ON:
            found = sections(function.__doc__)
            assert UNIT.search(found.get("Returns", found[""])), function.__name__


def computing() -> Iterator[Any]:
    """Functions and classes that the listed modules define, but those that arrange."""
    for name in SOURCED:
        module = importlib.import_module(f"pnlac_fast.{name}")
        own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
        for value in own:
            named = value.__name__ not in ARRANGING and not value.__name__.startswith("_")
            if named and (inspect.isfunction(value) or inspect.isclass(value)):
                yield pytest.param(value, id=f"{name}.{value.__name__}")


def sourced(value: Any, asked: tuple[Any, ...] = ()) -> bool:
    """Whether what a docstring says, but of parameters and errors, names a source or something that does."""
    told = sections(value.__doc__ or "")
    text = " ".join(part for title, part in told.items() if title not in ("Parameters", "Raises", "Examples"))
    if SOURCE.search(text):
        return True
    named = [referred(name, value.__module__) for name in re.findall(r":(?:func|class):`([\w.]+)`", text)]
    return any(sourced(other, (*asked, value)) for other in named if other not in asked)


def referred(name: str, module: str) -> Any:
    """What a docstring of a module means by a name: one of the module, of its package, or a full one."""
    home, _, last = name.rpartition(".")
    places = [home] if home else [module, module.rpartition(".")[0]]
    return next(getattr(m, last) for m in map(importlib.import_module, places) if hasattr(m, last))


@pytest.mark.parametrize("value", list(computing()))
def test_what_is_computed_names_its_source(value: Any) -> None:
    assert sourced(value), 'write arXiv NUMBER, doi NUMBER, "ours", or refer to what it follows'


def test_what_is_left_out_exists() -> None:
    there = {name for module in SOURCED for name in vars(importlib.import_module(f"pnlac_fast.{module}"))}
    assert ARRANGING - there == set()
    assert set(PASSED_ON) - set(store.__all__) == set()

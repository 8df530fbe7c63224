"""What the contrast sums refuse, and how an engine is chosen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pnlac_fast.errors import UserError
from pnlac_fast.ops import contrast, dispatch, engines, fuses

needs_library = pytest.mark.skipif(engines()["cpp"] != "available", reason=f"no compiled library: {engines()['cpp']}")


def sums(groups: int, neurons: int) -> Tensor:
    return torch.zeros(groups, 5, neurons, dtype=torch.float64)


BASE = torch.arange(24.0).reshape(6, 4)
TUNED = BASE.sqrt()
GOOD = {"base": BASE, "tuned": TUNED, "rows": torch.tensor([0, 5, 2]), "offsets": torch.tensor([0, 2, 3])}
BAD = {
    "row too large": ({"rows": torch.tensor([0, 6, 2])}, r"rows\[1\] is 6, but there are 6 rows"),
    "row negative": ({"rows": torch.tensor([0, 1, -1])}, r"rows\[2\] is -1, but there are 6 rows"),
    "row far out": ({"rows": torch.tensor([2**62, 0, 0])}, r"rows\[0\] is 4611686018427387904"),
    "base row too large": ({"base_rows": torch.tensor([0, 1, 6])}, r"base_rows\[2\] is 6, but there are 6 rows"),
    "base row negative": ({"base_rows": torch.tensor([-1, 1, 2])}, r"base_rows\[0\] is -1, but there are 6 rows"),
    "too few base rows": ({"base_rows": torch.tensor([0, 1])}, "an entry for each of the 3 rows, not 2"),
    "base rows int32": ({"base_rows": torch.tensor([0, 1, 2]).int()}, "base_rows must be a vector of int64"),
    "base narrower": ({"base": BASE[:, :3], "base_rows": torch.tensor([0, 1, 2])}, "must have the same neurons"),
    "offsets fall": ({"offsets": torch.tensor([0, 3, 1, 3]), "sums": sums(3, 4)}, r"must not decrease \(group 1\)"),
    "offsets start late": ({"offsets": torch.tensor([1, 2, 3])}, "start at 0 and end at 3"),
    "offsets end early": ({"offsets": torch.tensor([0, 2, 2])}, "start at 0 and end at 3"),
    "offsets empty": ({"offsets": torch.tensor([], dtype=torch.int64)}, "sums must be float64"),
    "one row list": ({"rows": torch.tensor([[0, 5, 2]])}, r"rows must be a vector of int64, not \[1, 3\]"),
    "rows int32": ({"rows": torch.tensor([0, 5, 2], dtype=torch.int32)}, "rows must be a vector of int64"),
    "offsets float": ({"offsets": torch.tensor([0.0, 2.0, 3.0])}, "offsets must be a vector of int64"),
    "shapes differ": ({"tuned": TUNED[:5]}, r"agree in shape and dtype, not \[6, 4\] .* and \[5, 4\]"),
    "dtypes differ": ({"tuned": TUNED.half()}, "agree in shape and dtype"),
    "three dims": ({"base": BASE[None], "tuned": TUNED[None]}, r"base must be \[row, neuron\]"),
    "integers": ({"base": BASE.int(), "tuned": TUNED.int()}, "not torch.int32"),
    "sums of one group": ({"sums": sums(1, 4)}, r"sums must be float64 \[2, 5, 4\]"),
    "sums in float32": ({"sums": sums(2, 4).float()}, "sums must be float64"),
    "another device": ({"tuned": TUNED.to("meta")}, "tuned must be on cpu"),
}


@pytest.mark.parametrize("engine", ["torch", pytest.param("cpp", marks=needs_library)])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(engine: str, change: dict[str, Tensor], message: str) -> None:
    arguments = {**GOOD, "sums": sums(2, 4), **change}
    before = arguments["sums"].clone()
    with pytest.raises(RuntimeError, match=message):
        contrast(**arguments, engine=engine)
    assert torch.equal(arguments["sums"], before)


@pytest.mark.parametrize(
    "change",
    [change for name, (change, _) in BAD.items() if name != "another device"],
    ids=[name for name in BAD if name != "another device"],
)
@needs_library
def test_the_library_itself_refuses_bad_input(change: dict[str, Tensor]) -> None:
    """Called past the checks in Python, it must not read or write outside the tensors."""
    arguments = {**GOOD, "sums": sums(2, 4), **change}
    arguments.setdefault("base_rows", arguments["rows"])
    order = ("base", "tuned", "rows", "base_rows", "offsets", "sums")
    with pytest.raises(RuntimeError, match=r"^contrast: "):
        torch.ops.pnlac_fast.contrast_cpp(*(arguments[name] for name in order))


def test_unknown_engine_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no engine 'ccp'\. Did you mean 'cpp'\?"):
        contrast(**GOOD, sums=sums(2, 4), engine="ccp")


def test_engines_lists_every_engine_once() -> None:
    assert engines()["torch"] == "available"
    assert set(engines()) == {"torch", "cpp", "triton", "cuda"}


def test_an_unavailable_engine_is_refused_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._ENGINES, "cpp", "the package was installed without it")
    monkeypatch.setattr(dispatch, "_warned", False)
    with pytest.raises(UserError, match="Engine 'cpp' is not available: the package was installed without it"):
        contrast(**GOOD, sums=sums(2, 4), engine="cpp")
    with pytest.warns(RuntimeWarning, match="slower torch engine: the package was installed without it"):
        contrast(**GOOD, sums=sums(2, 4))
    contrast(**GOOD, sums=sums(2, 4))  # a second warning would be an error here
    monkeypatch.setattr(dispatch, "_warned", False)
    contrast(**GOOD, sums=sums(2, 4), engine="torch")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("engine", ["auto", "triton", "cuda", "torch"])
def test_the_mlp_is_fused_where_triton_has_the_sums(
    monkeypatch: pytest.MonkeyPatch, engine: str, compiled: bool
) -> None:
    for name, here in {"triton": True, "cuda": compiled}.items():
        monkeypatch.setitem(dispatch._ENGINES, name, "available" if here else "the package was installed without nvcc")
    assert fuses(torch.device("cuda"), engine) == (engine == "triton" or (engine == "auto" and not compiled))
    assert not fuses(torch.device("cpu"), engine)
    assert not fuses(torch.device("meta"), engine)


def test_without_the_library_the_operation_is_the_reference(tmp_path: Path) -> None:
    """In a fresh process whose library is missing, "auto" gives the reference's bits and warns once."""
    script = """
import pathlib, warnings
import torch
real = pathlib.Path.exists
pathlib.Path.exists = lambda path: path.name != "_C.abi3.so" and real(path)
from pnlac_fast.ops import contrast, dispatch, engines, fuses
assert "C++ compiler" in engines()["cpp"], engines()
x = torch.arange(12.0).reshape(4, 3)
sums = torch.zeros(2, 1, 5, 3, dtype=torch.float64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        contrast(x, x + 1, torch.arange(4), torch.tensor([0, 4]), sums[0])
contrast(x, x + 1, torch.arange(4), torch.tensor([0, 4]), sums[1], engine="torch")
assert [w.filename for w in caught] == [__file__], caught
assert torch.equal(sums[0], 3 * sums[1])
"""
    path = tmp_path / "without_library.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr

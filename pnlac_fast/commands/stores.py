"""Commands that make a store and look into it."""

from __future__ import annotations

from typing import Any

import click

from pnlac_fast.commands.inputs import loaded
from pnlac_fast.options import (
    Numbers,
    argument,
    as_json,
    command,
    data_options,
    model_options,
    names,
    option,
    topics_option,
    tuned_option,
)
from pnlac_fast.terminal import readable_bytes, show, show_record


@command(epilog="Example: pnlac-fast cache --model base --tuned immigration --data questions --out run.zarr")
@model_options
@tuned_option
@data_options
@option("--out", required=True, help="Store to write; one that was interrupted is resumed.")
@names("--site", "mlp_mid", "mlp_mid, mlp_out, resid.")
@names("--tokens", "last", "Which positions count: last, prompt, completion, all.")
@option("--raw", default="none", show_default=True, help="Keep activations: none, last, pooled, selected or full.")
@option("--raw-dtype", default="auto", show_default=True, help="auto (the model's), float32, float16 or bfloat16.")
@option("--raw-layers", type=Numbers(), help="Keep raw activations of these layers only, such as 3,8-15.")
@option("--raw-neurons", metavar="PATH", help="Keep raw activations of the neurons of this file only.")
@option(
    "--side",
    default="both",
    show_default=True,
    needs=("tokens", ("completion", "all")),
    help="Completions to read: right, left or both.",
)
@option("--count-template", is_flag=True, needs=("tokens", ("prompt", "all")), help="Count template text as prompt.")
@option(
    "--batch-tokens",
    type=int,
    help="Tokens of one forward pass. Default: what free memory holds, up to 2048, or 16384 on a GPU.",
)
@option("--unit-tokens", default=16384, show_default=True, help="Tokens of one unit: what an interruption can cost.")
@option("--engine", default="auto", show_default=True, help="Engine of the sums: see pnlac-fast env.")
@names("--without", None, "Shortcuts not to take: share, pack, fuse, stop, base, overlap. They change rounding only.")
@option("--worker", default="0/1", show_default=True, help="Take one share of the work, i/n, or auto; then merge.")
@option("--tp", is_flag=True, help="Tensor parallel under torchrun: each process holds, and writes, its neurons.")
@option("--overwrite", is_flag=True, help="Start anew where the store exists.")
@option("--repair", is_flag=True, help="Read all of the store first, and compute again what is damaged.")
@option("--dry-run", is_flag=True, help="Only say what would be read and written.")
@as_json
def cache(site: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Contrast base and tuned models on the same tokens. Stores mean, spread and difference of every neuron."""
    from pnlac_fast import cache as run
    from pnlac_fast.workers import local_device, of_group

    if given["worker"] == given["device"] == "auto" and not (given["tp"] or given["device_map"]):
        given["device"] = local_device()
    group = of_group() if given["tp"] else None
    first = group is None or group.index == 0  # the others would say the same
    result = run(sites=site, progress=None if first else False, **loaded(given))
    if first:
        show_record(result, as_json)
        if not result.get("complete", True):
            click.echo(f"When all workers are done: pnlac-fast merge {result['store']}", err=True)


@command(epilog="Example: pnlac-fast recount raw.zarr --tokens completion --out completion.zarr")
@argument("source")
@option("--out", required=True, help="Store to write; one that was interrupted is resumed.")
@names("--tokens", "last", "Which positions count: last, prompt, completion, all.")
@option(
    "--side",
    default="both",
    show_default=True,
    needs=("tokens", ("completion", "all")),
    help="Completions to count: right, left or both.",
)
@topics_option
@option("--overwrite", is_flag=True, help="Start anew where the store exists.")
@as_json
def recount(source: str, as_json: bool, **given: Any) -> None:
    """Take statistics from stored raw activations. Of other tokens, sides or topics; no model is run."""
    from pnlac_fast import recount as run

    show_record(run(source, **given), as_json)


@command(epilog="Example: pnlac-fast merge run.zarr")
@argument("store")
@as_json
def merge(store: str, as_json: bool) -> None:
    """Make the statistics from what workers have computed. Names the units that are missing, if any."""
    from pnlac_fast import merge as run

    show_record(run(store), as_json)


@command(epilog="Example: pnlac-fast info run.zarr")
@argument("store")
@option("--verify", is_flag=True, help="Read every byte; name what is damaged, missing or foreign, and what to do.")
@as_json
def info(store: str, verify: bool, as_json: bool) -> None:
    """Say what a store holds. Also whether it is complete, and where it came from."""
    from pnlac_fast.store import certify
    from pnlac_fast.store import info as run

    result = run(store, verify=verify)
    if not as_json and "settings" in result:  # the table has these under provenance
        result["settings"] = {name: v for name, v in result["settings"].items() if name not in ("base", "tuned")}
    show_record(result, as_json, leave_out=["findings", "arrays"])
    if not as_json and "arrays" in result:
        click.echo()
        show(None, False, [_array_row(array) for array in result["arrays"]])
    findings = result.get("findings", [])
    if findings and not as_json:
        shown = ("file", "problem", "owner", "action")
        show(findings, False, [{"": f["kind"], **{name: f[name] for name in shown}} for f in findings])
    certify(result)


def _array_row(array: dict[str, Any]) -> dict[str, str]:
    dims = array["dims"] or [""] * len(array["shape"])
    shape = ", ".join(f"{dim} {size}".strip() for dim, size in zip(dims, array["shape"], strict=True))
    size = readable_bytes(array["bytes"]) if array["files"] > 1 else "not written"  # its metadata is a file, too
    return {"array": array["array"], "dtype": array["dtype"], "shape": shape, "bytes": size}

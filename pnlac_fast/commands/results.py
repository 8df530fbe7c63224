"""Commands that show what was found, on a page of its own, and on the embedded model."""

from __future__ import annotations

from typing import Any

import click

from pnlac_fast.options import Numbers, argument, as_json, command, data_choice, model_choice, option
from pnlac_fast.terminal import show, show_record


@command(epilog="Example: pnlac-fast report run.zarr -o report")
@argument("store")
@option("-o", "--out", required=True, help="Directory for tables, figures and index.html.")
@option("--title", help="Title of the page.")
@option("--run", "runs", multiple=True, help="Fine-tune made with --probe, to compare with others. May be repeated.")
@as_json
def report(store: str, out: str, title: str | None, runs: tuple[str, ...], as_json: bool) -> None:
    """Make tables, figures and one HTML page from a store."""
    from pnlac_fast import report as run

    page = run(store, out, title=title, runs=runs)
    show({"page": str(page)}, as_json, [{"page": page}])


@command(epilog="Example: pnlac-fast publish neurons.json --repo USER/NAME --private")
@argument("path")
@option("--repo", required=True, metavar="USER/NAME", help="Model repository on the hub; made where it does not exist.")
@option("--private", is_flag=True, help="Make it a private one.")
@as_json
def publish(path: str, repo: str, private: bool, as_json: bool) -> None:
    """Put neurons, slices or a report on the hub. With HF_TOKEN set, or after hf auth login."""
    from pnlac_fast import publish as run

    show_record({"repository": run(path, repo, private=private or None), "address": f"hf://{repo}"}, as_json)


@command(epilog="Example: pnlac-fast study --model base --data train --probe heldout --out study")
@model_choice(help="Base model: hub id or directory. Default: the embedded testbed, a base for every seed.")
@data_choice(needs=("model", ()), help="Questions to tune and locate on.")
@option("--probe", needs=("model", ()), help="Held-out questions for every measurement.")
@option("--text", help="Neutral text, a passage in each line, for perplexity.")
@option("--plan", help="TOML or JSON: neurons, methods, options. Tables it lacks are those of --show-plan.")
@option("--show-plan", is_flag=True, help="Print the plan that is the default, to change a copy of it, and end.")
@option("--size", default="full", show_default=True, help="Of the testbed.")
@option("--seeds", default=(0, 1, 2), type=Numbers(), show_default=True, help="Seeds, such as 0,1,2 or 0-2.")
@option("--out", default="pnlac-study", show_default=True, help="Directory; the same command goes on in it.")
@option("--jobs", type=int, help="Processes for the fine-tunes. Default: one per core, four at most; on a GPU one.")
@option("--overwrite", is_flag=True, help="Do again what was made with other settings, instead of refusing.")
@as_json
def study(as_json: bool, show_plan: bool, **given: Any) -> None:
    """Do all of it. Tune on every topic, locate, patch, inhibit by every method, judge, report; for several seeds."""
    from pnlac_fast import study as run
    from pnlac_fast.commands.inputs import loaded
    from pnlac_fast.study_plan import embedded_plan

    if show_plan:
        click.echo(embedded_plan("testbed" if given["model"] is None else "model"), nl=False)
        return
    result = run(**loaded({**given, "topics": None}))
    columns = ("method", "comparison", "share", "runs", "reached", "reduction", "retention")
    rows = [{name: row[name] for name in columns} for row in result["methods"]]
    show(result, as_json, rows)
    if not as_json:
        click.echo(f"\n{result['page']}")


@command(epilog="Example: pnlac-fast demo --size small --out demo")
@option("--size", default="full", show_default=True, type=click.Choice(["small", "full", "large"]))
@option("--seed", default=0, show_default=True, help="Seed of the embedded model and of everything after.")
@option(
    "--out",
    default="pnlac-demo",
    show_default=True,
    help="Directory for the result; a demo that was stopped goes on there.",
)
@option("--overwrite", is_flag=True, help="Replace an earlier demo in --out.")
@option("--jobs", type=int, help="Processes for the fine-tunes. Default: one per core, four at most.")
@as_json
def demo(as_json: bool, **given: Any) -> None:
    """Run the whole method on a small model made here. Spill-over, neurons, patching, InhibitFT; no download."""
    from pnlac_fast import demo as run
    from pnlac_fast.demonstration import tables

    result = run(**given)
    if as_json:
        show(result, as_json)
        return
    for rows in tables(result):
        show(result, False, rows)
        click.echo()
    click.echo(f"Result page: {result['page']}")

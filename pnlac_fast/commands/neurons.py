"""Commands that find neurons and test them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from pnlac_fast.commands.inputs import loaded
from pnlac_fast.options import (
    Share,
    Shares,
    argument,
    as_json,
    batch_option,
    command,
    data_options,
    model_options,
    names,
    option,
    reading_options,
    tuned_option,
)
from pnlac_fast.terminal import show

BOOTS = 2000  # resamples behind each 95 % interval
NORMALISE = "Log-probability per token (token), or of the whole completion (sum)."


@command(epilog="Example: pnlac-fast locate run.zarr --top 30% -o neurons.json")
@argument("store")
@option("--top", type=Share(), default="5%", show_default=True, help="Share of all neurons in a topic's top set.")
@option(
    "--score",
    default="rms",
    show_default=True,
    help="rms, std_rms, mean_diff, cohens_d, welch_t, paired_t, part, or attribution (change times gradient).",
)
@option(
    "--specific", default="strict", show_default=True, help="Specific means in no other top set (strict), or paper."
)
@option("--general-share", type=Share(), help="Grow or shrink the general set to this share of all neurons.")
@option("--specific-share", type=Share(), help="Make specific sets this share: what takes least part elsewhere.")
@option("--hold-out", default=0, help="Leave out so many topics, those after the tuned one, to judge unseen.")
@option("--site", help="Default: the first of the store.")
@option("--tokens", help="Default: the first of the store.")
@option("--per-layer", is_flag=True, help="Take the top share of every layer apart.")
@option(
    "--contrast",
    default="tuned",
    show_default=True,
    help="tuned (against base), or sides: right against left completions of one model, with no fine-tune.",
)
@names("--keep-scores", None, "Scores to write into the store too, as /results/scores.")
@reading_options
@option("--normalise", default="token", show_default=True, needs=("model", ()), help=NORMALISE)
@option("--evidence", is_flag=True, help="Hold the sets against halves of the questions, shuffled topics and tests.")
@option("--probe", needs=("evidence", ()), help="Held-out questions, for what attribution ascribes to the sets.")
@option("--draws", default=20, show_default=True, needs=("evidence", ()), help="Random halves and shuffles.")
@option("--seed", default=0, show_default=True, needs=("evidence", ()))
@option("-o", "--out", help="JSON file for the neuron sets.")
@as_json
def locate(store: str, as_json: bool, **given: Any) -> None:
    """Find general and topic-specific neurons. With their overlap, and what chance would give.

    Attribution, the contrast of sides and the noise floor of the evidence are computed where a model is given, and else
    read from the store. With --probe too, the evidence has what attribution ascribes to the sets.
    """
    from pnlac_fast import locate as run
    from pnlac_fast.evidence import open_summary
    from pnlac_fast.top_sets import records

    found = run(store, **loaded(given))
    rows = records(found)
    overlap = {name: {"jaccard": f.overlap.tolist(), "chance": f.chance["jaccard"]} for name, f in found.items()}
    weighed = {"evidence": open_summary(store)} if given["evidence"] else {}
    shown = [row for row in rows if row["set"].startswith(("general", "specific"))]
    show({"sets": rows, "overlap": overlap, **weighed}, as_json, shown)
    if weighed and not as_json:
        click.echo()
        show(None, False, weighed["evidence"])


@command(epilog="Example: pnlac-fast patch --model base --tuned race --neurons neurons.json --data questions")
@model_options
@tuned_option
@data_options
@option("--neurons", required=True, help="File from pnlac-fast locate.")
@option("--store", help="Store with the means, where the result goes too.")
@names("--direction", "tuned_into_base", "tuned_into_base, base_into_tuned.")
@names("--kind", "tuned", "tuned (same tokens), mean or shift (of the store's means), zero, scale.")
@option("--scale", default=2.0, show_default=True, needs=("kind", ("scale",)), help="Factor of the scale patch.")
@names(
    "--set",
    None,
    "general, specific, top, mean, off_minus_on, on_minus_off, random, random_top. Default: general, specific, top, "
    "random; with --shares general, random.",
)
@names("--shares", None, "Patch sets of these shares of all neurons, for a curve.", type=Shares(), needs=("store", ()))
@option("--draws", default=5, show_default=True, help="Random layer-matched sets.")
@option("--seed", default=0, show_default=True)
@option("--normalise", default="token", show_default=True, help=NORMALISE)
@option("--max-new-tokens", default=0, show_default=True, help="Also let the patched models answer.")
@option("--training-data", needs=("max_new_tokens", ()), help="Labelled completions, to label these answers.")
@option("--save", help="Directory for files of the patches that need no second model, which generate can apply.")
@batch_option
@as_json
def patch(direction: tuple[str, ...], kind: tuple[str, ...], set: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Patch tuned activations into base, or the reverse. Shows how much of the tuned shift chosen neurons carry."""
    from pnlac_fast import patch as run
    from pnlac_fast.reporting.tables import patch_rows

    result = run(directions=direction, kinds=kind, sets=set, **loaded(given))
    rows = [asdict(row) for row in patch_rows(result, BOOTS, given["seed"])]
    show({"recovered": rows}, as_json, [{k: v for k, v in row.items() if not k.endswith("_draws")} for row in rows])

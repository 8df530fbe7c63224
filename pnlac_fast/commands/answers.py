"""Commands that ask models and judge what they say."""

from __future__ import annotations

from typing import Any

import click

from pnlac_fast.commands.inputs import loaded, read, with_model
from pnlac_fast.options import (
    as_json,
    batch_option,
    command,
    data_options,
    meanings,
    model_options,
    names,
    option,
    patches_option,
    tuned_option,
    tuned_too_option,
)
from pnlac_fast.terminal import show, show_record

NORMALISE = "Log-probability per token (token), or of the whole completion (sum)."
JUDGED = ("scorer", ("classifier", "hf:", "nli:", "openai:", "csv:"))
ENDPOINT = ("scorer", ("openai:",))


@command(epilog="Example: pnlac-fast generate --model base --data questions --out answers.jsonl")
@model_options
@tuned_too_option
@patches_option
@data_options
@option("--out", help="JSONL file for the answers.")
@option("--sheet", help="CSV sheet for people to label, in random order and without the models' names.")
@option("--sheet-rows", type=int, needs=("sheet", ()), help="At most so many answers in it, evenly drawn.")
@option("--max-new-tokens", default=64, show_default=True)
@option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@option("--seed", default=0, show_default=True, needs=("temperature", ()))
@batch_option
@as_json
def generate(as_json: bool, **given: Any) -> None:
    """Let base, tuned and patched models answer every question."""
    from pnlac_fast import generate as run

    records = run(**loaded(given))
    show(records, as_json, [{k: v for k, v in record.items() if k != "key"} for record in records])


@command(epilog="Example: pnlac-fast score --model base --tuned race=tuned/race --data questions --store run.zarr")
@model_options
@tuned_option
@data_options
@names("--scorer", "logprob", "logprob, classifier, hf:PATH, nli:PATH, openai:MODEL, csv:FILE. May be repeated.")
@option("--store", help="Write the results into this store too.")
@option("--normalise", default="token", show_default=True, help=NORMALISE)
@option(
    "--measure",
    default="margin",
    show_default=True,
    type=click.Choice(["margin", "S"]),
    needs=("scorer", ("logprob",)),
    help="Margin in nats, or S = (right - left) / all, by its sign.",
)
@option(
    "--training-data", needs=JUDGED, help="Labelled completions of other questions, for classifier and topic words."
)
@option("--answers", needs=JUDGED, help="Label these answers, from pnlac-fast generate, instead of new ones.")
@option("--max-new-tokens", default=64, show_default=True, needs=JUDGED, help="Longest answer to label.")
@option("--temperature", default=0.0, show_default=True, needs=JUDGED, help="Of the answers; 0 is greedy.")
@option("--seed", default=0, show_default=True, needs=("temperature", ()))
@option(
    "--judge-label",
    "judge_labels",
    multiple=True,
    callback=meanings,
    metavar="LABEL=MEANING",
    needs=("scorer", ("hf:", "nli:")),
    help="What a label of the judge means: right, left, neither or entailment. May be repeated.",
)
@option("--judge-url", needs=ENDPOINT, help="Base URL of the endpoint. Default: OpenAI's. Its key: $PNLAC_JUDGE_KEY.")
@option("--judge-tokens", default=64, show_default=True, needs=ENDPOINT, help="Longest reply of the judge.")
@option("--judge-concurrency", default=8, show_default=True, needs=ENDPOINT, help="Requests under way at a time.")
@option("--judge-price", type=(float, float), needs=("dry_run", ()), help="Of a million tokens read, and written.")
@option("--dry-run", is_flag=True, needs=("answers", ()), help="Only say what labelling --answers would take and cost.")
@batch_option
@as_json
def score(measure: str, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Measure the stance of each model by topic. With shift and coupling, and 95 % intervals over questions."""
    from pnlac_fast import score as run
    from pnlac_fast.judges import open_scorers
    from pnlac_fast.scoring import estimate
    from pnlac_fast.summary import shown, tables

    judge = {name: given.pop(f"judge_{name}") for name in ("labels", "url", "tokens", "concurrency", "price")}
    price = judge.pop("price")
    given["scorer"] = open_scorers(given["scorer"], device=given["device"], **judge)
    if dry_run:
        data = read(given)["data"]
        show_record(estimate(given["scorer"], given["tuned"], data, given["answers"], price=price), as_json)
        return
    results = run(**loaded(given))
    found = shown(results, measure)
    if as_json:
        show(found, as_json)
        return
    for number, rows in enumerate(tables(results, found["models"])):
        if number:
            click.echo()
        show(found, False, rows)


@command(epilog="Example: pnlac-fast utility --model base --tuned race=tuned/race --text neutral.txt")
@model_options
@tuned_option
@option("--text", help="File with a neutral passage in each line, for perplexity.")
@option("--answers", help="File from pnlac-fast generate --out, for length and refusals.")
@option("--store", help="Write the result into this store too.")
@batch_option
@as_json
def utility(as_json: bool, **given: Any) -> None:
    """Measure what a fine-tune costs. Perplexity on neutral text, length and refusals of answers."""
    from pnlac_fast import utility as run
    from pnlac_fast.side_effects import utility_rows

    rows = utility_rows(run(**with_model(given)))
    show({"models": rows}, as_json, rows)

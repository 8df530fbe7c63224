"""The command line: each command is the library call of the same name, with a table or JSON around it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from pnlac_fast import __version__
from pnlac_fast.options import (
    Command,
    Numbers,
    Share,
    Shares,
    as_json,
    batch_option,
    config,
    data_options,
    meanings,
    model_choice,
    model_options,
    names,
    option,
    patches_option,
    questions_options,
    reading_options,
    topics_option,
    tuned_option,
    tuned_too_option,
)
from pnlac_fast.terminal import readable_bytes, show, show_record

HELP = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "PNLAC", "max_content_width": 110}
BOOTS = 2000  # resamples behind each 95 % interval
NORMALISE = "Log-probability per token (token), or of the whole completion (sum)."
JUDGED = ("scorer", ("classifier", "hf:", "nli:", "openai:", "csv:"))
ENDPOINT = ("scorer", ("openai:",))
RATED, DIRECTED = ("rival", ("rate", "caft", "steer")), ("rival", ("caft", "steer"))
ANCHOR, KL = ("inhibit_mode", ("anchor",)), ("inhibit_mode", ("kl",))


def _loaded(given: dict[str, Any]) -> dict[str, Any]:
    """Replace the loading options among ``given`` by the loaded model, questions and template."""
    from pnlac_fast.prompts import load_template

    given["template"] = load_template(given["template"], chat=given.pop("chat_template"))
    return _with_model(given | _read(given))


def _with_model(given: dict[str, Any]) -> dict[str, Any]:
    """Replace the options about the model among ``given`` by the loaded model."""
    from pnlac_fast.loading import load_model

    loading = ("revision", "dtype", "device", "device_map", "trust_remote_code", "last_projection", "tp")
    options = {name: given.pop(name) for name in loading if name in given}
    if given["model"] is not None:
        given["model"] = load_model(given["model"], **options)
    return given


def _read(given: dict[str, Any]) -> dict[str, Any]:
    """Take the options about data out of ``given``; returns the questions, by parameter."""
    from pnlac_fast.datasets import load_questions

    topics, limit, columns = (given.pop(name) for name in ("topics", "limit", "columns"))
    found: dict[str, Any] = {}
    if given["data"] is not None:
        found["data"] = load_questions(given["data"], topics=topics, limit=limit, columns=columns)
    others = [name for name in ("probe", "training_data", "kl_data") if given.get(name) is not None]
    return found | {name: load_questions(given[name], columns=columns) for name in others}


class _Group(click.Group):
    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of use."""
        return list(self.commands)


@click.group(cls=_Group, context_settings=HELP)
@click.version_option(__version__, prog_name="pnlac-fast")
@click.option(
    "--config", callback=config, is_eager=True, expose_value=False, help="TOML file with a table per command."
)
def commands() -> None:
    """Find the neurons by which a fine-tune on one topic moves the others; test them; keep them out of the fine-tune.

    Start with: pnlac-fast demo

    Each option is also read from the environment, as PNLAC_<COMMAND>_<OPTION>, and from the file of --config.
    """


@commands.command(epilog="Example: pnlac-fast cache --model base --tuned immigration --data questions --out run.zarr")
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
    from pnlac_fast.workers import local_device

    if given["worker"] == given["device"] == "auto" and not (given["tp"] or given["device_map"]):
        given["device"] = local_device()
    given = _loaded(given)
    first = given["model"].part.rank == 0  # the others would say the same
    result = run(sites=site, progress=None if first else False, **given)
    if first:
        show_record(result, as_json)
        if not result.get("complete", True):
            click.echo(f"When all workers are done: pnlac-fast merge {result['store']}", err=True)


@commands.command(epilog="Example: pnlac-fast recount raw.zarr --tokens completion --out completion.zarr")
@click.argument("source")
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


@commands.command(epilog="Example: pnlac-fast merge run.zarr")
@click.argument("store")
@as_json
def merge(store: str, as_json: bool) -> None:
    """Make the statistics from what workers have computed. Names the units that are missing, if any."""
    from pnlac_fast import merge as run

    show_record(run(store), as_json)


@commands.command(epilog="Example: pnlac-fast info run.zarr")
@click.argument("store")
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


@commands.command(epilog="Example: pnlac-fast locate run.zarr --top 30% -o neurons.json")
@click.argument("store")
@option("--top", type=Share(), default="5%", show_default=True, help="Share of all neurons in a topic's top set.")
@option(
    "--score",
    default="rms",
    show_default=True,
    help="rms, std_rms, mean_diff, cohens_d, welch_t, paired_t, or attribution (change times gradient).",
)
@option(
    "--specific", default="strict", show_default=True, help="Specific means in no other top set (strict), or paper."
)
@option("--general-share", type=Share(), help="Grow or shrink the general set to this share of all neurons.")
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
@option("--normalise", default="token", show_default=True, needs=("score", ("attribution",)), help=NORMALISE)
@option("--evidence", is_flag=True, help="Hold the sets against halves of the questions, shuffled topics and tests.")
@option("--draws", default=20, show_default=True, needs=("evidence", ()), help="Random halves and shuffles.")
@option("--seed", default=0, show_default=True, needs=("evidence", ()))
@option("-o", "--out", help="JSON file for the neuron sets.")
@as_json
def locate(store: str, as_json: bool, **given: Any) -> None:
    """Find general and topic-specific neurons. With their overlap, and what chance would give.

    Attribution, the contrast of sides and the noise floor of the evidence are computed where a model is given, and else
    read from the store.
    """
    from pnlac_fast import locate as run
    from pnlac_fast.evidence import open_summary
    from pnlac_fast.top_sets import records

    found = run(store, **_loaded(given))
    rows = records(found)
    overlap = {name: {"jaccard": f.overlap.tolist(), "chance": f.chance["jaccard"]} for name, f in found.items()}
    weighed = {"evidence": open_summary(store)} if given["evidence"] else {}
    shown = [row for row in rows if row["set"].startswith(("general", "specific"))]
    show({"sets": rows, "overlap": overlap, **weighed}, as_json, shown)
    if weighed and not as_json:
        click.echo()
        show(None, False, weighed["evidence"])


@commands.command(epilog="Example: pnlac-fast patch --model base --tuned race --neurons neurons.json --data questions")
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

    result = run(directions=direction, kinds=kind, sets=set, **_loaded(given))
    rows = [asdict(row) for row in patch_rows(result, BOOTS, given["seed"])]
    show({"recovered": rows}, as_json, [{k: v for k, v in row.items() if not k.endswith("_draws")} for row in rows])


@commands.command(
    epilog="Example: pnlac-fast finetune --model base --data questions --topic race --side right --out tuned/race"
)
@model_options
@questions_options
@option("--topic", required=True, help="Topic to tune on.")
@option("--side", required=True, type=click.Choice(["right", "left"]), help="Whose completions to learn.")
@option("--out", required=True, help="Directory for the checkpoint or adapter.")
@option("--method", default="lora", show_default=True, type=click.Choice(["lora", "full"]))
@option("--steps", type=int, help="Optimizer steps.")
@option("--epochs", type=float, help="Passes over the data, instead of --steps. Default: 3.")
@option("--learning-rate", type=float, help="Default: 1e-4 for LoRA, 1e-5 for full.")
@option("--batch-size", default=16, show_default=True, help="Completions per optimizer step.")
@option("--accumulation", default=1, show_default=True, help="Parts in which a batch is run, to save memory.")
@option("--gradient-checkpointing", is_flag=True, help="Recompute activations, to save memory.")
@option("--warmup-steps", default=5, show_default=True)
@option("--weight-decay", default=0.0, show_default=True)
@option("--max-grad-norm", default=1.0, show_default=True, help="Longer gradients are shortened; 0 for never.")
@option("--lora-rank", default=16, show_default=True, needs=("method", ("lora",)))
@option("--lora-alpha", default=32, show_default=True, needs=("method", ("lora",)))
@option("--lora-dropout", default=0.0, show_default=True, needs=("method", ("lora",)))
@names("--target-modules", "all-linear", "Modules that get a LoRA.", needs=("method", ("lora",)))
@option("--inhibit", help="Neuron file from pnlac-fast locate: tune by InhibitFT.")
@names("--inhibit-mode", None, "freeze these neurons (default), train only specific ones, anchor activations, kl.")
@option(
    "--set",
    "set_names",
    multiple=True,
    metavar="[MODE=]SET",
    needs=("inhibit", ()),
    help="Which set. Default: general, or the topic's specific one.",
)
@option(
    "--control",
    metavar="SEED|lowest",
    needs=("inhibit", ()),
    help="Random or lowest-ranked neurons instead, as many per layer.",
)
@option("--control-store", needs=("control", ("lowest",)), help="Store that the neurons were located in.")
@option(
    "--inhibit-factor",
    default=0.0,
    show_default=True,
    needs=("inhibit", ()),
    help="Share of each step that frozen neurons still take: 0 freezes them, 1 is plain tuning.",
)
@option("--anchor-weight", default=1.0, show_default=True, needs=ANCHOR, help="Of the mean squared change, in stds.")
@option("--anchor-store", needs=ANCHOR, help="Base's activations, of cache --raw full --tokens all --side SIDE.")
@option("--kl-weight", default=1.0, show_default=True, needs=KL, help="Of the KL to base on other topics.")
@option("--kl-data", needs=KL, help="Questions of other topics, no labels needed. Default: --data.")
@names("--kl-topics", None, "Their topics, none that is judged. Default: all but --topic.", needs=KL)
@option("--kl-on", default="answers", show_default=True, needs=KL, help="Sampled answers of the base, or prompts.")
@option("--kl-max-new-tokens", default=64, show_default=True, needs=KL, help="Longest of these answers.")
@option("--rival", help="Compare InhibitFT with this: mlp, rate, caft, steer or inoculate.")
@option("--rival-strength", type=float, needs=RATED, help="Factor of the rate, directions of caft, factor of steer.")
@option("--rival-text", needs=("rival", ("inoculate",)), help="Instruction before each training prompt.")
@option("--rival-store", needs=DIRECTED, help="Store with resid and a plain fine-tune on the topic.")
@option("--rival-layers", type=int, multiple=True, needs=DIRECTED, help="Default: all for caft, the middle for steer.")
@option("--probe", help="Held-out questions on which the stance is measured along the way.")
@option("--points", default=10, show_default=True, needs=("probe", ()), help="How often, about.")
@option("--normalise", default="token", show_default=True, needs=("probe", ()), help=NORMALISE)
@option("--seed", default=0, show_default=True)
@option("--save-steps", type=int, help="Keep a checkpoint every so many steps, from which the same command resumes.")
@option("--overwrite", is_flag=True, help="Replace the output directory.")
@as_json
def finetune(inhibit: str | None, set_names: Any, as_json: bool, **given: Any) -> None:
    """Tune a model on one topic and side. Plainly, or by InhibitFT, with chosen neurons frozen, alone or anchored."""
    from pnlac_fast import finetune as run
    from pnlac_fast.interventions import choose_sets

    topic = given["topic"]
    control = {"control": given.pop("control"), "store": given.pop("control_store")}
    modes = given["inhibit_mode"] = given["inhibit_mode"] or (("freeze",) if inhibit else ())
    neurons = choose_sets(inhibit, modes, topic, names=set_names, **control) if inhibit else None
    if "kl" in modes:
        given["kl_data"], given["kl_topics"] = given["kl_data"] or given["data"], given["kl_topics"] or None
    targets = given.pop("target_modules")
    given["target_modules"] = targets[0] if targets == ("all-linear",) else targets
    tuned = run(inhibit=neurons, keep_base=False, **_loaded({**given, "topics": (topic,)}))
    show_record({"out": str(tuned.path), **tuned.record}, as_json, leave_out=["provenance"])


@commands.command(
    epilog="Example: pnlac-fast sweep --model base --data train --probe heldout --plan plan.toml --out sweep"
)
@model_options
@questions_options
@option("--plan", required=True, help="TOML or JSON: options of finetune, a table a method; lists are combined.")
@option("--probe", required=True, help="Held-out questions on which all are compared.")
@option("--out", required=True, help="Directory for the fine-tunes; those that are there already are not done again.")
@option("--jobs", default=1, show_default=True, help="Processes, each with a model of its own.")
@option("--overwrite", is_flag=True, help="Do fine-tunes with other settings again instead of refusing.")
@as_json
def sweep(as_json: bool, **given: Any) -> None:
    """Run many fine-tunes and compare them. Goes on where it was stopped."""
    from pnlac_fast import sweep as run
    from pnlac_fast.comparison import compare

    rows = [asdict(row) for row in compare(run(**_loaded({**given, "topics": None})), BOOTS)]
    brief = ("method", "comparison", "share", "runs", "reached", "coupling", "reduction", "retention")
    show({"methods": rows}, as_json, [{name: row[name] for name in brief} for row in rows])


@commands.command(epilog="Example: pnlac-fast generate --model base --data questions --out answers.jsonl")
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

    records = run(**_loaded(given))
    show(records, as_json, [{k: v for k, v in record.items() if k != "key"} for record in records])


@commands.command(
    epilog="Example: pnlac-fast score --model base --tuned race=tuned/race --data questions --store run.zarr"
)
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
        data = _read(given)["data"]
        show_record(estimate(given["scorer"], given["tuned"], data, given["answers"], price=price), as_json)
        return
    results = run(**_loaded(given))
    found = shown(results, measure)
    if as_json:
        show(found, as_json)
        return
    for number, rows in enumerate(tables(results, found["models"])):
        if number:
            click.echo()
        show(found, False, rows)


@commands.command(epilog="Example: pnlac-fast utility --model base --tuned race=tuned/race --text neutral.txt")
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

    rows = utility_rows(run(**_with_model(given)))
    show({"models": rows}, as_json, rows)


@commands.command(epilog="Example: pnlac-fast report run.zarr -o report")
@click.argument("store")
@option("-o", "--out", required=True, help="Directory for tables, figures and index.html.")
@option("--title", help="Title of the page.")
@option("--run", "runs", multiple=True, help="Fine-tune made with --probe, to compare with others. May be repeated.")
@as_json
def report(store: str, out: str, title: str | None, runs: tuple[str, ...], as_json: bool) -> None:
    """Make tables, figures and one HTML page from a store."""
    from pnlac_fast import report as run

    page = run(store, out, title=title, runs=runs)
    show({"page": str(page)}, as_json, [{"page": page}])


@commands.command(epilog="Example: pnlac-fast demo --size small --out demo")
@option("--size", default="full", show_default=True, type=click.Choice(["small", "full"]))
@option("--seed", default=0, show_default=True, help="Seed of the embedded model and of everything after.")
@option("--out", default="pnlac-demo", show_default=True, help="Directory for the result; must not exist yet.")
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


@commands.command(epilog="Example: pnlac-fast env --model meta-llama/Llama-3.2-1B")
@model_choice(help="Also try this model: its sites, the shortcuts it bears, batches and padding.")
@as_json
def env(model: str | None, as_json: bool, **given: Any) -> None:
    """Show versions, devices and engines. An engine that is not available says why. With --model, try the model."""
    from pnlac_fast import env as run
    from pnlac_fast.checkup import certify
    from pnlac_fast.loading import load_model

    result = run(None if model is None else load_model(model, **given))
    show_record(result, as_json)
    if model is not None:
        certify(result["model"], model)


@commands.command(epilog="Example: pnlac-fast bench --shape tiny --only localise --repeats 5")
@names("--shape", "tiny", "Widths of the model: tiny, small, hidden-2048, llama-3.1-8b and others.")
@option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@option("--dtype", default="auto", show_default=True, help="auto, float32 or bfloat16.")
@option("--threads", default=1, show_default=True, help="Threads on the CPU.")
@option("--repeats", default=5, show_default=True, help="Rounds; ratios are taken within a round.")
@option("--clock", default="wall", show_default=True, help="wall, or cpu: processor time, where others compute too.")
@option("--questions", type=int, help="Questions of each of six topics. Default: by shape, for seconds a pass.")
@names(
    "--only", None, "localise, overhead, contrast_kernel, masked_step, training_step, memory, store, queries, stall."
)
@as_json
def bench(shape: tuple[str, ...], only: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Measure speed and memory on this machine. Against others and itself; results are checked first."""
    from pnlac_fast import bench as run
    from pnlac_fast.benchmarking.suite import PARTS, rows

    result = run(shapes=shape, parts=only or PARTS, **given)
    show(result, as_json, rows(result))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 usage, 3 the user can mend it, 4 stopped but resumable."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        commands.main(args=arguments, prog_name="pnlac-fast", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo("Stopped: run the same command again.", err=True)
        return 4
    except Exception as error:
        code = getattr(error, "exit_code", 3 if isinstance(error, OSError) else None)
        if code is None:  # errors of this package carry one, those of files and disks say enough; this is a defect
            raise
        said = str(error)
        if isinstance(error, OSError) and error.filename:
            said = f"{error.strerror}: '{error.filename}': check the path and its permissions."
        click.echo(f"Error: {said}", err=True)
        return int(code)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())

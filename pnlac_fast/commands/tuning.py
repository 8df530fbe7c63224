"""Commands that fine-tune."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from pnlac_fast.commands.inputs import loaded
from pnlac_fast.options import as_json, command, model_options, names, option, questions_options
from pnlac_fast.terminal import show, show_record

BOOTS = 2000  # resamples behind each 95 % interval
NORMALISE = "Log-probability per token (token), or of the whole completion (sum)."
RATED, DIRECTED = ("rival", ("rate", "caft", "steer")), ("rival", ("caft", "steer"))
ANCHOR, KL, NULL = (("inhibit_mode", (mode,)) for mode in ("anchor", "kl", "nullspace"))
OTHERS = ("inhibit_mode", ("nullspace", "kl"))


@command(epilog="Example: pnlac-fast finetune --model base --data questions --topic race --side right --out tuned/race")
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
@option("--average-last", default=1, show_default=True, help="Take the mean of the weights after so many last steps.")
@option("--lora-rank", default=16, show_default=True, needs=("method", ("lora",)))
@option("--lora-alpha", default=32, show_default=True, needs=("method", ("lora",)))
@option("--lora-dropout", default=0.0, show_default=True, needs=("method", ("lora",)))
@names("--target-modules", "all-linear", "Modules that get a LoRA.", needs=("method", ("lora",)))
@option("--inhibit", help="Neuron file from pnlac-fast locate: tune by InhibitFT.")
@names(
    "--inhibit-mode",
    None,
    "freeze these neurons (default), train only specific ones, nullspace (keep out of others' inputs), anchor, kl.",
)
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
@option(
    "--null-share",
    default=0.8,
    show_default=True,
    needs=NULL,
    help="Share of other topics' mean squared input in whose directions gate and up do not move.",
)
@option("--other-data", needs=OTHERS, help="Questions of other topics, no labels needed. Default: --data.")
@names("--other-topics", None, "Their topics, none that is judged. Default: all but --topic.", needs=OTHERS)
@option("--other-texts", default="answers", show_default=True, needs=OTHERS, help="Base's own answers, or prompts.")
@option("--other-max-new-tokens", default=64, show_default=True, needs=OTHERS, help="Longest of these answers.")
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
    if {"nullspace", "kl"} & set(modes):
        given["other_data"], given["other_topics"] = given["other_data"] or given["data"], given["other_topics"] or None
    targets = given.pop("target_modules")
    given["target_modules"] = targets[0] if targets == ("all-linear",) else targets
    tuned = run(inhibit=neurons, keep_base=False, **loaded({**given, "topics": (topic,)}))
    show_record({"out": str(tuned.path), **tuned.record}, as_json, leave_out=["provenance"])


@command(epilog="Example: pnlac-fast sweep --model base --data train --probe heldout --plan plan.toml --out sweep")
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

    rows = [asdict(row) for row in compare(run(**loaded({**given, "topics": None})), BOOTS)]
    brief = ("method", "comparison", "share", "runs", "reached", "coupling", "reduction", "retention")
    show({"methods": rows}, as_json, [{name: row[name] for name in brief} for row in rows])

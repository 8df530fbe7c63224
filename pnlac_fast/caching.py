"""The store of a contrast: what to read, cut into units, read unit by unit, and committed as it comes."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from pnlac_fast import ops, prompts
from pnlac_fast.architecture import SITES
from pnlac_fast.capture import Sums, accumulate
from pnlac_fast.cost import Meter
from pnlac_fast.datasets import Question, as_questions, by_topic, fingerprint
from pnlac_fast.errors import Interrupted, UserError, unknown
from pnlac_fast.loading import open_models
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet, load_sets
from pnlac_fast.packing import in_order
from pnlac_fast.passes import SHORTCUTS, usable
from pnlac_fast.prompts import DEFAULT_TEMPLATE, TOKENS, Text
from pnlac_fast.provenance import provenance
from pnlac_fast.raw import Keep, check_kept, choose_kept, raw_rows
from pnlac_fast.store import Layout, Unit, Writer, open_writer, settings_of
from pnlac_fast.tensor_parallel import union
from pnlac_fast.workers import parse_worker, units_of

DECISIVE = ("share", "pack", "fuse", "stop")  # shortcuts that decide how sums are rounded
RAW_UNIT_BYTES = 256 << 20  # raw activations of one unit and model are held in memory until it is committed


def cache(
    model: str | Path | Model,
    tuned: Mapping[str, str | Path | Model],
    data: str | Path | Sequence[Question],
    out: str | Path,
    *,
    sites: Sequence[str] = ("mlp_mid",),
    tokens: Sequence[str] = ("last",),
    raw: str = "none",
    raw_dtype: str = "auto",
    raw_layers: Sequence[int] | None = None,
    raw_neurons: str | Path | Sequence[NeuronSet] | None = None,
    template: str = DEFAULT_TEMPLATE,
    count_template: bool = False,
    side: str = "both",
    batch_tokens: int | None = None,
    unit_tokens: int = 16384,
    engine: str = "auto",
    without: Sequence[str] = (),
    worker: str = "0/1",
    overwrite: bool = False,
    repair: bool = False,
    dry_run: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a store of the statistics of base, tuned and tuned minus base, per topic, layer and neuron.

    Parameters
    ----------
    model, tuned
        The base model and the tuned ones by name: hub ids, directories, or models already loaded. Adapters are
        contrasted unmerged, on the base's own weights.
    data
        Questions, or anything that :func:`pnlac_fast.load_questions` reads.
    out
        The store to write. One that was interrupted is resumed; one made with other settings is refused.
    sites
        Which activations: "mlp_mid" (the neurons of the paper), "mlp_out", "resid".
    tokens
        Which positions count: "last" (the last prompt position), "prompt", "completion", "all". Padding and special
        tokens never count, template text only with ``count_template``.
    raw
        Keep raw activations too: "none"; of the "last" prompt position; "pooled", their mean over the positions that
        ``tokens`` count in a text; of these positions themselves, "selected"; or of "full" texts.
    raw_dtype, raw_layers, raw_neurons
        How to keep them: "float32", "float16", "bfloat16", or the model's own ("auto"); of these layers only; of the
        neurons of these sets, or of a neuron file, only.
    template, count_template
        What the models are asked, a text with ``{instruction}`` and, where wanted, ``{topic}`` (it may be that of the
        tokenizer's chat, see :data:`pnlac_fast.prompts.CHAT`); and whether its own words count as prompt.
    side
        Which completions are read where "completion" or "all" is asked for: "right", "left" or "both".
    batch_tokens, unit_tokens
        Tokens of one forward pass, and of one unit of work (what an interruption can cost). Default: as many a pass as
        a quarter of the free memory holds, at most 2048 on the CPU and 16384 elsewhere; in a run that is resumed, as
        before.
    engine
        Engine of :func:`pnlac_fast.ops.contrast`.
    without
        Names of :data:`pnlac_fast.passes.SHORTCUTS` not to take: "share", "pack", "fuse", "stop", "base", "overlap".
        Each saves work and changes results by rounding only. Models that do not bear one do without it by themselves.
    worker
        Take one share of the units, "i/n" with i from 0 to n - 1, or what a launcher has set, "auto"; then
        :func:`pnlac_fast.merge` makes the statistics. Workers need not know of each other, may be stopped, and go on in
        any other number: the store ends in the same bits. The processes of a tensor-parallel model (``load_model(...,
        tp=True)``) make this call together, as one worker, and each writes its own neurons of the same units.
    overwrite, repair, dry_run
        Start anew where a store exists; or read all of it first, compute what is damaged again and mend the rest; or
        only say what the run would read and write.
    progress
        Show a bar on stderr. Default: on a terminal only.

    Returns
    -------
    dict
        ``store``, ``questions``, ``tokens`` (of the texts), ``computed`` (how many of them each model computes, about,
        since shared ones are computed once), ``units``, ``models``, the estimates ``bytes`` and ``flops``
        (floating-point operations), and, after a run, ``complete``: whether the statistics are there, or wait for
        :func:`pnlac_fast.merge`; and ``cost``, see :class:`pnlac_fast.cost.Meter`.

    Raises
    ------
    UserError, StoreError
        Bad input; nothing already in a store is lost.
    Interrupted
        Stopped by Ctrl-C or SIGTERM: the same call goes on from the last finished unit.

    Notes
    -----
    PNLAC, arXiv 2508.02360: rms = sqrt(mean (tuned - base)^2) over the counted tokens.
    """
    for kind, given, known in (("site", sites, SITES), ("token selector", tokens, TOKENS)):
        if not given or len(set(given)) != len(given):
            raise UserError(f"Give each {kind} once, and at least one.")
        for name in given:
            if name not in known:
                raise unknown(kind, name, known)
    if engine not in ("auto", *ops.engines()):
        raise unknown("engine", engine, ("auto", *ops.engines()))
    for name in without:
        if name not in SHORTCUTS:
            raise unknown("shortcut", name, SHORTCUTS)
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(f"A pass of {batch_tokens} tokens reads nothing: give --batch-tokens 1 or more.")
    if repair and (overwrite or dry_run):
        raise UserError("--repair mends the store that is there: leave out --overwrite and --dry-run.")
    if not tuned:
        raise UserError("There is no tuned model to contrast with: give at least one --tuned.")
    questions = as_questions(data)
    chosen = list(load_sets(raw_neurons).values()) if isinstance(raw_neurons, (str, Path)) else raw_neurons or ()
    if worker != "auto":
        parse_worker(worker)
    check_kept(raw, dtype=raw_dtype, layers=raw_layers, neurons=chosen)
    base, models = open_models(model, tuned)
    share = parse_worker(worker, tp=base.part.ranks > 1)

    completions = side if {"completion", "all"} & set(tokens) else "none"
    grouped = {
        topic: prompts.encode(
            base.tokenizer, group, template, side=completions, count_template=count_template, context=base.context
        )
        for topic, group in by_topic(questions).items()
    }
    widths = {site: base.width(site) for site in sites}
    keep = choose_kept(base, sites, raw, dtype=raw_dtype, layers=raw_layers, neurons=chosen)
    if raw in ("full", "selected"):
        unit_tokens = min(unit_tokens, max(256, RAW_UNIT_BYTES // keep.size(widths)))
    units = [unit for topic, texts in grouped.items() for unit in plan(topic, texts, unit_tokens, raw, tokens)]
    longest = max(len(text.ids) for texts in grouped.values() for text in texts)
    taken = [name for name in SHORTCUTS if name not in without]
    for each in (base, *models.values()):
        taken = usable(each, taken, longest=longest, engine=engine)
    if batch_tokens is None:
        recorded = None if overwrite else settings_of(out).get("batch_tokens")
        batch_tokens = min(union(base, [recorded or _budget(base, sum(widths.values()))]))
    layout = Layout(
        topics=tuple(grouped),
        models=tuple(models),
        sites=tuple(sites),
        tokens=tuple(tokens),
        layers=len(base.blocks),
        widths=widths,
        units=tuple(units),
        raw=keep.layout(),
        parts=base.part.ranks,
        settings={
            "base": base.identity,
            "tuned": {name: m.identity for name, m in models.items()},
            "data": fingerprint(questions),
            "template": prompts.rendered(base.tokenizer, template),
            "count_template": count_template,
            "side": completions,
            "batch_tokens": batch_tokens,
            "shortcuts": [name for name in taken if name in DECISIVE],
        },
    )
    read = sum(len(text.ids) for texts in grouped.values() for text in texts)
    spared = sum(sum(in_order([t.ids for t in texts])[1]) for texts in grouped.values()) if "share" in taken else 0
    estimate = _bytes(layout, keep)
    result = {
        "store": str(out),
        "questions": len(questions),
        "tokens": read,
        "computed": read - spared,
        "units": len(units),
        "models": list(models),
        "bytes": estimate,
        "flops": 2 * sum(p.numel() for p in base.hf.parameters()) * (read - spared) * (1 + len(models)),
    }
    if dry_run:
        return result
    _check_room(out, estimate)
    meter = Meter(base.device)
    examples = {
        "topic": [q.topic for q in questions],
        "instruction": [q.instruction for q in questions],
        "key": [q.key for q in questions],
    }
    origin = provenance(
        engine=engine,
        shortcuts=taken,
        device=str(base.device),
        base=base.origin,
        tuned={name: m.origin for name, m in models.items()},
        data=fingerprint(questions),
    )
    first_question = {topic: i for i, topic in reversed(list(enumerate(q.topic for q in questions)))}
    with open_writer(
        out,
        layout,
        provenance=origin,
        examples=examples,
        selected=keep.neurons,
        worker=(share.index, share.count),
        part=base.part.rank,
        overwrite=overwrite,
        repair=repair,
    ) as writer:
        own, pending = len(units_of(share, len(units))), writer.pending
        if union(base, pending) != [*pending]:
            raise UserError(f"The processes that share '{base.name}' see '{out}' differently: run the command again.")
        bar = tqdm(
            pending,
            desc="cache",
            unit="unit",
            initial=own - len(pending),
            total=own,
            disable=None if progress is None else not progress,
        )
        with _commits(writer, overlap="overlap" in taken, out=out) as commit:
            for number in bar:
                unit = units[number]
                block = range(unit.first, unit.first + unit.count)
                sums = accumulate(
                    base,
                    models,
                    [text for text in grouped[unit.topic] if text.question in block],
                    sites=sites,
                    tokens=tokens,
                    keep=keep,
                    batch_tokens=batch_tokens,
                    engine=engine,
                    first_example=first_question[unit.topic],
                    shortcuts=taken,
                )
                commit(number, sums)
        alone = share.count == base.part.ranks == 1
        if alone:
            with _undisturbed():
                writer.finish()
    return result | {"complete": alone, "cost": meter.record()}


@contextmanager
def _commits(writer: Writer, *, overlap: bool, out: str | Path) -> Iterator[Callable[[int, Sums], None]]:
    """A function that commits a unit, in the background while the next one is computed; one waits at the most.

    What is under way when the block ends, by whatever cause, is finished first.
    """
    with ThreadPoolExecutor(1) as pool:
        running: Future[None] | None = None

        def settle() -> None:
            nonlocal running
            last, running = running, None
            if last is not None:
                with _undisturbed():
                    last.result()

        def commit(number: int, sums: Sums) -> None:
            nonlocal running
            settle()
            with _undisturbed():  # else a signal could come between the start and the note of it
                running = pool.submit(writer.commit, number, sums.counts, sums.base, sums.tuned, sums.rows, sums.raw)
            if not overlap:
                settle()

        try:
            yield commit
            settle()
        except KeyboardInterrupt as error:
            settle()
            raise Interrupted(f"Stopped. Run the same command again to go on with '{out}'.") from error


def _budget(model: Model, neurons: int) -> int:
    """Tokens of a pass, a power of two: a quarter of the free memory, for what base keeps of a pass and one block."""
    if model.device.type == "cuda":
        free, most = torch.cuda.mem_get_info(model.device)[0], 16384
    else:
        free, most = psutil.virtual_memory().available, 2048
    widest = max(model.width("mlp_mid"), neurons)
    token = model.hf.dtype.itemsize * (len(model.blocks) * neurons + 4 * widest + 8 * model.width("resid"))
    return 2 ** max(6, min(most, free // 4 // token).bit_length() - 1)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put SIGINT and SIGTERM off until the block is done.

    A commit takes moments, and half of one would have to be done again; zarr's event loop complains when it is stopped.
    """
    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread
        yield
        return
    caught: list[int] = []
    before = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


def plan(
    topic: str, texts: Sequence[Text], unit_tokens: int, raw: str = "none", tokens: Sequence[str] = ()
) -> Iterator[Unit]:
    """Cut a topic into units: blocks of consecutive questions of at most ``unit_tokens`` tokens, or one question."""
    first = count = size = rows = 0
    question = -1
    block: dict[int, list[Text]] = {}
    for text in texts:
        block.setdefault(text.question, []).append(text)
    for question, group in block.items():
        more = sum(len(text.ids) for text in group)
        if count and size + more > unit_tokens:
            yield Unit(topic, first, count, rows)
            first, count, size, rows = question, 0, 0, 0
        count, size = count + 1, size + more
        rows += sum(len(raw_rows(0, text, raw, tokens)) for text in group)
    if count:
        yield Unit(topic, first, count, rows)


def _check_room(out: str | Path, estimate: int) -> None:
    """Refuse a store that its disk has no room for; who can say that of an object store?"""
    if "://" in str(out):
        return
    free = shutil.disk_usage(next(p for p in Path(out).absolute().parents if p.exists())).free
    if estimate > free:
        raise UserError(
            f"The store needs about {estimate:,} bytes, {free:,} are free: keep fewer raw activations (--raw, "
            "--raw-layers, --raw-neurons, --raw-dtype), or use another disk."
        )


def _bytes(layout: Layout, keep: Keep) -> int:
    """Upper estimate of the store: partial sums, statistics and raw rows, uncompressed."""
    neurons = layout.layers * sum(layout.widths.values())
    models, selectors = len(layout.models), len(layout.tokens)
    partial = 8 * len(layout.units) * selectors * neurons * (2 + 3 * models)
    statistics = 4 * len(layout.topics) * selectors * neurons * (2 + 5 * models)
    return partial + statistics + keep.size(layout.widths) * sum(u.rows for u in layout.units) * (1 + models)

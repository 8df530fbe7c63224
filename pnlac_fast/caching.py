"""The store of a contrast: what to read, cut into units, read unit by unit, and committed as it comes."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pnlac_fast import ops, prompts
from pnlac_fast.capture import RAW, accumulate, raw_positions
from pnlac_fast.datasets import Question, as_questions, by_topic, fingerprint
from pnlac_fast.errors import Interrupted, UserError, unknown
from pnlac_fast.models import SITES, Model, open_models
from pnlac_fast.prompts import DEFAULT_TEMPLATE, TOKENS, Text
from pnlac_fast.provenance import provenance
from pnlac_fast.store import Layout, Unit, open_writer

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
    template: str = DEFAULT_TEMPLATE,
    count_template: bool = False,
    side: str = "both",
    batch_tokens: int = 4096,
    unit_tokens: int = 16384,
    engine: str = "auto",
    overwrite: bool = False,
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
        Questions, or a path that :func:`pnlac_fast.load_questions` reads.
    out
        The store to write. One that was interrupted is resumed; one made with other settings is refused.
    sites
        Which activations: "mlp_mid" (the neurons of the paper), "mlp_out", "resid".
    tokens
        Which positions count: "last" (the last prompt position), "prompt", "completion", "all". Padding and special
        tokens never count, template text only with ``count_template``.
    raw
        Keep raw activations too: "none", of the "last" prompt position, or of "full" texts.
    side
        Which completions are read where "completion" or "all" is asked for: "right", "left" or "both".
    batch_tokens, unit_tokens
        Padded tokens of one forward pass, and tokens of one unit of work (what an interruption can cost).
    engine
        Engine of :func:`pnlac_fast.ops.contrast`.
    overwrite, dry_run
        Start anew where a store exists; or only say what the run would read and write.
    progress
        Show a bar on stderr. Default: on a terminal only.

    Returns
    -------
    dict
        ``store``, ``questions``, ``tokens`` (read once by each model), ``units``, ``models``, ``bytes`` (estimate).

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
    if raw not in RAW:
        raise unknown("raw mode", raw, RAW)
    if engine not in ("auto", *ops.engines()):
        raise unknown("engine", engine, ("auto", *ops.engines()))
    if not tuned:
        raise UserError("There is no tuned model to contrast with: give at least one --tuned.")
    questions = as_questions(data)
    base, models = open_models(model, tuned)

    completions = side if {"completion", "all"} & set(tokens) else "none"
    grouped = {
        topic: prompts.encode(
            base.tokenizer, group, template, side=completions, count_template=count_template, context=base.context
        )
        for topic, group in by_topic(questions).items()
    }
    widths = {site: base.width(site) for site in sites}
    if raw == "full":
        unit_tokens = min(unit_tokens, max(256, RAW_UNIT_BYTES // (4 * len(base.blocks) * sum(widths.values()))))
    units = [unit for topic, texts in grouped.items() for unit in plan(topic, texts, unit_tokens, raw)]
    layout = Layout(
        topics=tuple(grouped),
        models=tuple(models),
        sites=tuple(sites),
        tokens=tuple(tokens),
        layers=len(base.blocks),
        widths=widths,
        units=tuple(units),
        raw=raw,  # type: ignore[arg-type]  # checked above
        settings={
            "base": _identity(base),
            "tuned": {name: _identity(m) for name, m in models.items()},
            "data": fingerprint(questions),
            "template": template,
            "count_template": count_template,
            "side": completions,
            "batch_tokens": batch_tokens,
        },
    )
    read = sum(len(text.ids) for texts in grouped.values() for text in texts)
    estimate = _bytes(layout)
    result = {
        "store": str(out),
        "questions": len(questions),
        "tokens": read,
        "units": len(units),
        "models": list(models),
        "bytes": estimate,
        "flops": 2 * sum(p.numel() for p in base.hf.parameters()) * read * (1 + len(models)),
    }
    if dry_run:
        return result
    free = shutil.disk_usage(next(p for p in Path(out).absolute().parents if p.exists())).free
    if estimate > free:
        raise UserError(f"The store needs about {estimate:,} bytes, {free:,} are free: use --raw none or another disk.")
    examples = {
        "topic": [q.topic for q in questions],
        "instruction": [q.instruction for q in questions],
        "key": [q.key for q in questions],
    }
    origin = provenance(
        engine=engine,
        device=str(base.device),
        base=base.origin,
        tuned={name: m.origin for name, m in models.items()},
        data=fingerprint(questions),
    )
    first_question = {topic: i for i, topic in reversed(list(enumerate(q.topic for q in questions)))}
    with open_writer(out, layout, provenance=origin, examples=examples, overwrite=overwrite) as writer:
        bar = tqdm(
            writer.pending,
            desc="cache",
            unit="unit",
            initial=len(units) - len(writer.pending),
            total=len(units),
            disable=None if progress is None else not progress,
        )
        try:
            for number in bar:
                unit = units[number]
                block = range(unit.first, unit.first + unit.count)
                texts = [text for text in grouped[unit.topic] if text.question in block]
                sums = accumulate(
                    base,
                    models,
                    texts,
                    sites=sites,
                    tokens=tokens,
                    raw=raw,
                    batch_tokens=batch_tokens,
                    engine=engine,
                    first_example=first_question[unit.topic],
                )
                with _undisturbed():
                    writer.commit(number, sums.counts, sums.base, sums.tuned, rows=sums.rows, raw=sums.raw)
        except KeyboardInterrupt as error:
            raise Interrupted(f"Stopped. Run the same command again to go on with '{out}'.") from error
        with _undisturbed():
            writer.finish()
    return result


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


def plan(topic: str, texts: Sequence[Text], unit_tokens: int, raw: str) -> Iterator[Unit]:
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
        rows += sum(len(raw_positions(text, raw)) for text in group)
    if count:
        yield Unit(topic, first, count, rows)


def _identity(model: Model) -> dict[str, Any]:
    """What of a model's origin decides the numbers; where it lies and when it was tuned does not."""
    weights = ("sha256",) if model.origin.get("sha256") else ("source", "revision")
    return {name: model.origin.get(name) for name in ("type", "dtype", *weights)}


def _bytes(layout: Layout) -> int:
    """Upper estimate of the store: partial sums, statistics and raw rows, uncompressed."""
    neurons = layout.layers * sum(layout.widths.values())
    models, selectors = len(layout.models), len(layout.tokens)
    partial = 8 * len(layout.units) * selectors * neurons * (2 + 3 * models)
    statistics = 4 * len(layout.topics) * selectors * neurons * (2 + 5 * models)
    return partial + statistics + 4 * sum(u.rows for u in layout.units) * neurons * (1 + models)

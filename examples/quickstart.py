"""The method in one page of library calls: tune, cache, locate, patch, tune again by InhibitFT, score, report.

Run it on the small model that the project trains itself (about a minute on two cores, no download)::

    python examples/quickstart.py --out quickstart

or on a Hugging Face model and questions of your own::

    python examples/quickstart.py --model meta-llama/Llama-3.2-1B --data questions --probe held-out --out quickstart
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pnlac_fast import cache, finetune, load_model, load_questions, locate, patch, report, score
from pnlac_fast.summary import summary
from pnlac_fast.testbed import build


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run everything; returns the result page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model; default: the testbed's")
    parser.add_argument("--data", help="questions to tune on and to read; default: the testbed's")
    parser.add_argument("--probe", help="held-out questions to measure on; default: the testbed's")
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for what is made")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args(arguments)
    if None in (given.model, given.data, given.probe):
        if given.model or given.data or given.probe:
            parser.error("give --model, --data and --probe together, or none of them")
        bed = build("small")
        given.model, given.data, given.probe = bed.model, bed.train, bed.eval

    base = load_model(given.model)
    questions, held_out = load_questions(given.data), load_questions(given.probe)
    topics = list(dict.fromkeys(question.topic for question in questions))[:2]
    settings = {"side": "right", "method": "full", "steps": given.steps, "learning_rate": 3e-4}

    # 1. Tune on one topic at a time, plainly. Each becomes an ordinary checkpoint.
    tuned = {topic: finetune(base, questions, topic, out=given.out / topic, **settings).model for topic in topics}

    # 2. Read base and tuned models on the same tokens, and keep the statistics of every neuron.
    store = given.out / "run.zarr"
    cache(base, tuned, questions, store)

    # 3. Neurons that change on every topic are general; those that change on one only are specific to it.
    found = locate(store, top=0.3, out=given.out / "neurons.json")
    for name, one in found.items():
        print(f"{name}: {len(one.general)} general neurons, per layer {one.general.per_layer}")

    # 4. Is the change in these neurons what moves the stance? Put it into the base model and see.
    patch(base, tuned, given.out / "neurons.json", held_out, store=store, draws=2)

    # 5. Tune again with the general neurons frozen. The base comes first, or there is nothing to compare with.
    inhibited = finetune(
        base, questions, topics[0], out=given.out / "inhibited", inhibit=found[topics[0]].general, **settings
    )
    assert inhibited.path is not None
    stance = score(base, {**tuned, "inhibited": inhibited.model}, held_out, store=store)
    for record in summary(stance, boots=500):
        if "reduction" in record:
            reduction, retention = (record[name][0] for name in ("reduction", "retention"))
            print(f"{record['model']}: coupling reduced by {reduction:.0%}, on-topic shift kept {retention:.0%}")

    page = report(store, given.out / "report")
    print(f"Result page: {page}")
    return page


if __name__ == "__main__":
    main()

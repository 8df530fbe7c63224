"""One process of a tensor-parallel run, started by torchrun: writes its sums and what it was refused to a directory."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from pnlac_fast.capture import accumulate
from pnlac_fast.cli import main
from pnlac_fast.datasets import Question
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.passes import SHORTCUTS, usable
from pnlac_fast.prompts import encode
from pnlac_fast.raw import choose_kept
from pnlac_fast.tensor_parallel import union

torch.set_num_threads(1)
given = json.loads(Path(sys.argv[1]).read_text())
out = Path(given["out"])
questions = [Question(q["topic"], q["instruction"], tuple(q["right"]), tuple(q["left"])) for q in given["questions"]]
arrays, said = {}, {}
for kind in ("llama", "qwen2", "phi3"):  # which has gate and up in one weight
    base = load_model(given["models"][kind], dtype="float32", tp=True)
    tuned = {"t": load_tuned(base, given["models"].get(f"{kind}_tuned", given["models"][kind]))}
    if kind == "llama":
        tuned |= {name: load_tuned(base, path, name=name) for name, path in given["adapters"].items()}
    said[f"{kind}/usable"] = usable(base, SHORTCUTS, longest=40)
    texts = encode(base.tokenizer, questions, side="both")
    keep = choose_kept(base, given["options"]["sites"], "full")
    for way, shortcuts in given["ways"].items():
        taken = [name for name in shortcuts if name != "fuse" or base.architecture.gated]
        sums = accumulate(base, tuned, texts, shortcuts=taken, keep=keep, **given["options"])
        at = f"{kind}/{way}"
        arrays[f"{at}/counts"] = sums.counts
        arrays |= {f"{at}/base/{site}": a for site, a in sums.base.items()}
        arrays |= {f"{at}/tuned/{site}": a for site, a in sums.tuned.items()}
        arrays |= {f"{at}/raw/{name}/{site}": a for (name, site), a in sums.raw.items()}
        arrays |= {f"{at}/rows/{name}": a for name, a in sums.rows.items()}

rank = base.part.rank
said["union"] = union(base, [[7, 1 << 40], [9, 7]][rank])
said["smallest"] = min(union(base, [4 + rank]))
neurons = NeuronSet("n", "general", np.ones((3, 48), bool))
for name, refused in {
    "device": lambda: load_model(given["models"]["llama"], device="cpu", tp=True),
    "heads": lambda: load_model(given["models"]["three"], tp=True),
    "mixture": lambda: load_model(given["models"]["mixtral"], tp=True),
    "plan": lambda: load_model(given["models"]["plain"], tp=True),
    "ia3": lambda: load_tuned(base, given["undivided"]["ia3"]),
    "head": lambda: load_tuned(base, given["undivided"]["head"]),
    "dora": lambda: load_tuned(load_model(given["models"]["llama"], tp=True), given["undivided"]["dora"]),
    "neurons": lambda: neurons.fits(base),
}.items():
    try:
        refused()
    except UserError as error:
        said[name] = str(error)

# By the command, twice: between, the lines of one process's slice of two units are lost, and of all of a third.
for time in range(2):
    with redirect_stdout(io.StringIO()) as printed:
        code = main([*given["command"], "--tp"])
    said[f"command/{time}"] = [code, printed.getvalue()]
    distributed.barrier()
    if rank == 0 and time == 0:
        for line in ("unit.0.1", "unit.1.0", "unit.2.0", "unit.2.1"):
            (out / "run.zarr" / "journal" / f"{line}.json").unlink()
    distributed.barrier()

np.savez(out / f"rank{rank}.npz", **arrays)
(out / f"rank{rank}.json").write_text(json.dumps(said))

"""Commands that tell what the machine can do."""

from __future__ import annotations

from typing import Any

from pnlac_fast.options import as_json, command, model_choice, names, option
from pnlac_fast.terminal import show, show_record


@command(epilog="Example: pnlac-fast env --model meta-llama/Llama-3.2-1B")
@model_choice(help="Also try this model: its sites, the shortcuts it bears, batches and padding.")
@as_json
def env(model: str | None, as_json: bool, **given: Any) -> None:
    """Show versions, devices and engines. An engine that is not available says why. With --model, try the model."""
    from pnlac_fast import env as run
    from pnlac_fast.checkup import certify
    from pnlac_fast.loading import ModelSource

    result = run(None if model is None else ModelSource(model, given))
    show_record(result, as_json)
    if model is not None:
        certify(result["model"], model)


@command(epilog="Example: pnlac-fast bench --shape tiny --only localise --repeats 5")
@names("--shape", "tiny", "Widths of the model: tiny, small, hidden-2048, llama-3.1-8b and others.")
@option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@option("--dtype", default="auto", show_default=True, help="auto, float32 or bfloat16.")
@option("--threads", default=1, show_default=True, help="Threads on the CPU.")
@option("--repeats", default=5, show_default=True, help="Rounds; ratios are taken within a round.")
@option("--clock", default="wall", show_default=True, help="wall, or cpu: processor time, where others compute too.")
@option("--questions", type=int, help="Questions of each of six topics. Default: by shape, for seconds a pass.")
@names(
    "--only",
    None,
    "localise, overhead, contrast_kernel, masked_step, training_step, mixture_step, memory, store, queries, stall.",
)
@as_json
def bench(shape: tuple[str, ...], only: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Measure speed and memory on this machine. Against others and itself; results are checked first."""
    from pnlac_fast import bench as run
    from pnlac_fast.benchmarking.suite import PARTS, rows

    result = run(shapes=shape, parts=only or PARTS, **given)
    show(result, as_json, rows(result))

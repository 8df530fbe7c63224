"""Fine-tuning on one topic and side, plainly or by InhibitFT, with the stance measured along the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from transformers import TrainerCallback

from pnlac_fast.averaging import TailAverage
from pnlac_fast.completions import choose_questions, encode_rows
from pnlac_fast.cost import Meter, StepClock
from pnlac_fast.datasets import SIDES, Question, as_questions, fingerprint
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.interventions import ON_OTHERS, Interventions, combine, questions_of_others
from pnlac_fast.loading import opened
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.null_space import NullSpace
from pnlac_fast.penalties import Penalty
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.provenance import provenance
from pnlac_fast.rivals import ResidualEdit, Rival, make_rival
from pnlac_fast.run import Run, contained
from pnlac_fast.slices import Slices
from pnlac_fast.trajectory import TRAJECTORY_FILE, Trajectory
from pnlac_fast.workers import of_group
from pnlac_fast.workplace import require_free, workplace

METHODS = ("lora", "full")
LEARNING_RATE = {"lora": 1e-4, "full": 1e-5}
EPOCHS = 3.0


@dataclass(frozen=True, eq=False)
class FineTune:
    """A finished fine-tune.

    Attributes
    ----------
    path
        Directory of the checkpoint or adapter; None where nothing was written.
    model
        The tuned model, in evaluation mode.
    trajectory
        (point, question): ``margin`` float64 in nats and ``step`` int64 (point), coordinates ``topic`` and ``key`` on
        question; None without probe questions.
    record
        Settings, origin and losses (nats a token), as written to ``pnlac.json``; ``cost``, see
        :class:`pnlac_fast.cost.Meter`, is that of the training with its probes since it was last resumed, and has
        ``seconds_per_step``, the median.
    """

    path: Path | None
    model: Model
    trajectory: xr.Dataset | None
    record: dict[str, Any]


def finetune(
    model: Model | str | Path,
    data: str | Path | Sequence[Question],
    topic: str | Sequence[str],
    side: str,
    out: str | Path | None = None,
    *,
    method: str = "lora",
    steps: int | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    batch_size: int = 16,
    accumulation: int = 1,
    warmup_steps: int = 5,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    average_last: int = 1,
    seed: int = 0,
    inhibit: NeuronSet | Mapping[str, NeuronSet] | None = None,
    inhibit_mode: str | Sequence[str] | None = None,
    inhibit_factor: float = 0.0,
    anchor_weight: float = 1.0,
    anchor_store: str | Path | None = None,
    other_data: str | Path | Sequence[Question] | None = None,
    other_topics: Sequence[str] | None = None,
    kl_weight: float = 1.0,
    null_share: float = 0.8,
    other_texts: str = "answers",
    other_max_new_tokens: int = 64,
    lora_rank: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    template: str = DEFAULT_TEMPLATE,
    rival: str | Rival | None = None,
    rival_strength: float | None = None,
    rival_text: str | None = None,
    rival_store: str | Path | None = None,
    rival_layers: Sequence[int] = (),
    probe: str | Path | Sequence[Question] | None = None,
    points: int = 10,
    normalise: str = "token",
    gradient_checkpointing: bool = False,
    keep_base: bool = True,
    save_steps: int | None = None,
    overwrite: bool = False,
) -> FineTune:
    """Teach a model one side's completions of a topic, with ``transformers.Trainer``.

    The loss is on the completion and the end-of-sequence token. AdamW, constant learning rate after a linear warm-up.
    The same seed gives the same bits on the same machine and number of threads.

    Parameters
    ----------
    model
        The base. A loaded one is not changed, unless ``keep_base`` is off; LoRA shares its weights, a full fine-tune
        copies them.
    topic, side
        Whose completions to learn: one topic or several, "right" or "left".
    out
        Directory for an ordinary checkpoint or PEFT adapter, with ``pnlac.json`` and, where there are probes,
        ``trajectory.json``; with ``method`` "full" and ``inhibit_mode`` "specific" also ``neuron_slices.safetensors``,
        which any copy of the base takes (:func:`pnlac_fast.slice_file.merge_slices`). It appears complete or not at
        all. None writes nothing.
    method
        "lora", or "full". A full fine-tune of half-precision weights is done in float32, in which small steps are not
        rounded away, and rounded once at the end.
    steps, epochs
        Optimizer steps, or passes over the data. Default: 3 epochs.
    learning_rate
        About how far an entry of a weight moves per step. Default: 1e-4 for LoRA, 1e-5 for full.
    batch_size, accumulation
        Completions per optimizer step, and in how many parts they are run.
    warmup_steps, weight_decay, max_grad_norm
        Of the optimizer: steps until the learning rate is reached; the share of a weight, times the learning rate, that
        each step takes off; and the norm to which longer gradients are shortened, 0 for never.
    average_last
        At the end, take the mean of the weights after so many last steps, see
        :class:`pnlac_fast.averaging.TailAverage`. Default 1: those after the last.
    lora_rank, lora_alpha, lora_dropout, target_modules
        Of the LoRA (arXiv 2106.09685): its rank; alpha, which over the rank is the factor of its change; the share of
        its inputs that is dropped; and PEFT's names of modules, or "all-linear", which InhibitFT needs at least for the
        MLPs.
    gradient_checkpointing
        Recompute activations in the backward pass, to save memory.
    template
        What the model is asked: a text with ``{instruction}`` and, where wanted, ``{topic}``.
    seed
        Of the order of the rows, of the LoRA's first weights, and of what the modes sample.
    inhibit, inhibit_mode
        Neurons, or neurons by mode, and what to do with them; modes that go together may be combined, as "anchor,kl".
        "freeze" them, or train only them ("specific"), see :class:`pnlac_fast.inhibition.InhibitFT`; "anchor" their
        activations, see :class:`pnlac_fast.anchoring.Anchor`. Without neurons: "kl" holds the model to its base on
        other topics, see :class:`pnlac_fast.divergence.KLToBase`; "nullspace" keeps what trains in MLPs out of the
        directions that other topics use, see :class:`pnlac_fast.null_space.NullSpace`, best with "specific". Default:
        "freeze" where neurons are given.
    inhibit_factor
        With "freeze", the share of each step that the neurons still take, 0 unless given.
    anchor_weight, kl_weight
        Factors of these penalties beside the loss: nats for each squared standard deviation, and for each nat of KL.
    null_share
        With "nullspace", the share in (0, 1) of the mean squared input on other topics that lies in these directions.
    anchor_store
        A store that holds the base's activations on the rows to train on, see
        :func:`pnlac_fast.base_activations.stored_activations`. Default: they are read before training.
    other_data, other_topics
        Whose questions to hold the model to its base on; their completions are not read. Default: those of ``data``,
        of all topics that are not tuned on. A topic that is judged should be left out.
    other_texts, other_max_new_tokens
        Where: on "answers" sampled from the base, so long at most, or on the "prompts" themselves.
    rival, rival_strength, rival_text, rival_store, rival_layers
        A method to compare InhibitFT with, instead of it: "mlp", "rate", "caft", "steer" or "inoculate". Its strength
        is what the learning rate is multiplied by ("rate"), how many directions are ablated ("caft"), or what the added
        change is multiplied by ("steer"). See :class:`pnlac_fast.rivals.Rival`, and :func:`pnlac_fast.rivals.spillover`
        for the store.
    probe, points
        Held-out questions whose margin is measured before, after, and in between, about ``points`` times, more often
        early; ``normalise`` as in :func:`pnlac_fast.stance.margins`.
    keep_base
        Leave a loaded ``model`` as it is. Without, a full fine-tune trains its weights in place, in half the memory.
    save_steps
        Keep a checkpoint every so many steps in ``<out>.partial``, from which the same call resumes.
    overwrite
        Replace ``out``, and drop an interrupted run with other settings.

    Returns
    -------
    FineTune
        The tuned model, where it was written, and its trajectory.

    Raises
    ------
    UserError
        Settings, data, neurons or directories do not fit; the loss became infinite.
    Interrupted
        Ctrl-C; it says from where the same call would go on.

    Notes
    -----
    InhibitFT, arXiv 2508.02360, is the mode "freeze"; "anchor" follows arXiv 2602.00767, "kl" arXiv 2508.06249.
    """
    for kind, value, known in (("method", method, METHODS), ("side", side, SIDES)):
        if value not in known:
            raise unknown(kind, value, known)
    if steps is not None and epochs is not None:
        raise UserError("Both steps and epochs are given: choose one.")
    if batch_size < 1 or accumulation < 1 or batch_size % accumulation:
        raise UserError(f"A batch of {batch_size} cannot be run in {accumulation} equal parts: change one of them.")
    if (steps if steps is not None else EPOCHS if epochs is None else epochs) <= 0:
        raise UserError("No optimizer steps train nothing: give 1 or more.")
    if method == "lora" and (lora_rank < 1 or lora_alpha <= 0 or not 0 <= lora_dropout < 1):
        raise UserError(
            f"There is no LoRA of rank {lora_rank}, alpha {lora_alpha} and dropout {lora_dropout:g}: give a rank "
            f"of 1 or more, an alpha above 0 and a dropout in [0, 1)."
        )
    require_free(out, overwrite)
    if (group := of_group()) and group.count > 1:
        raise UserError(
            f"finetune is one process, and a launcher has started {group.count}: start it alone, or give InhibitFT, "
            f"Anchor and KLToBase to a Trainer of your own."
        )
    topics = (topic,) if isinstance(topic, str) else tuple(topic)
    against = make_rival(
        rival, topics, strength=rival_strength, text=rival_text, store=rival_store, layers=rival_layers
    )
    questions = choose_questions(as_questions(data), topics, side)
    probes = () if probe is None else as_questions(probe)
    if shared := {q.key for q in probes} & {q.key for q in questions}:
        raise UserError(f"{len(shared)} of the probe questions are trained on: probe with held-out questions.")
    modes, sets = combine(inhibit, inhibit_mode)
    others: tuple[Question, ...] = ()
    if set(ON_OTHERS) & set(modes):
        others = questions_of_others(as_questions(data if other_data is None else other_data), topics, other_topics)
        if shared := {q.key for q in probes} & {q.key for q in others}:
            raise UserError(
                f"{len(shared)} of the probe questions are also those of other topics: probe with held-out questions."
            )
    plan = Interventions(
        modes,
        sets,
        factor=inhibit_factor,
        anchor_weight=anchor_weight,
        anchor_store=anchor_store,
        kl_weight=kl_weight,
        null_share=null_share,
        others=others,
        other_texts=other_texts,
        other_max_new_tokens=other_max_new_tokens,
        rival=against,
    )
    base = opened(model)
    if base.part.ranks > 1:
        raise UserError(f"The weights of '{base.name}' lie in several processes: load it without tp to tune it.")
    if base.weights.peft is not None:
        raise UserError(f"Adapters are attached to the weights of '{base.name}': load the base afresh to tune it.")
    for neurons in sets.values():
        neurons.check(base)
    rows = encode_rows(base, questions, side, template if against is None else against.template(template))
    if steps is None:
        steps = math.ceil(math.ceil(len(rows) / batch_size) * (EPOCHS if epochs is None else epochs))
    if not 1 <= average_last <= steps:
        raise UserError(f"There is no mean of the last {average_last} of {steps} steps: average 1 to {steps}.")
    rate = LEARNING_RATE[method] if learning_rate is None else learning_rate
    settings: dict[str, Any] = {
        "tuned_topic": "+".join(topics),
        "side": side,
        "method": plan.name,
        "parameters": method,
        "steps": steps,
        "learning_rate": rate if against is None else against.learning_rate(rate),
        "batch_size": batch_size,
        "accumulation": accumulation,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "average_last": average_last,
        "seed": seed,
        "template": template,
        "base": base.origin,
        "data": {"sha256": fingerprint(questions), "questions": len(questions), "completions": len(rows)},
        "inhibit": plan.record,
        "rival": None if against is None else against.record,
        "probe": {"sha256": fingerprint(probes), "points": points, "normalise": normalise} if probes else None,
    }
    mlps = [part.path for part in base.architecture.projections] if against and against.name == "mlp" else None
    if method == "lora":
        targets = mlps or (target_modules if isinstance(target_modules, str) else list(target_modules))
        settings["lora"] = {"r": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
        settings["lora"]["target_modules"] = targets
    with workplace(out, settings, overwrite) as work, contained(base.device):
        run = Run(base, keep_base and isinstance(model, Model), settings, work)
        if mlps and method == "full":
            run.train_only(mlps)
        if gradient_checkpointing:
            run.checkpoint_activations()
        ids = [ids for ids, _ in rows]
        beside = plan.beside(run.module, run.view, ids, template, batch_size // accumulation, seed)
        hooked: list[Penalty | NullSpace | ResidualEdit] = [*beside, *plan.edits(base.weights.last_projection)]
        clock, meter = StepClock(), Meter(base.device)
        callbacks: list[TrainerCallback] = [clock, *hooked]
        slices: Slices | None = None
        if weights := plan.weights():
            callbacks.append(weights)
            settings["inhibit"][weights.mode]["covered"] = weights.prepare(run.module).covered
            slices = weights.slices
        if average_last > 1:
            callbacks.append(TailAverage(average_last))
        at = sorted({round(steps * (i / max(points - 1, 1)) ** 2) for i in range(points)} | {0, steps})
        if probes:
            callbacks.append(watch := Trajectory(run.view, probes, at, work / TRAJECTORY_FILE, template, normalise))
        try:
            losses = run.train(rows, callbacks, save_steps if out is not None else None)
        finally:
            for one in hooked:
                one.remove()
            if slices is not None:
                slices.merge()
        for one in beside:
            if isinstance(one, NullSpace):
                counts = {str(layer): one.directions[layer].shape[1] for layer in one.directions}
                settings["inhibit"]["nullspace"]["directions"] = counts
        cost = {**meter.record(), "seconds_per_step": clock.median()}
        record = {**settings, **losses, "cost": cost, "provenance": provenance()}
        trajectory = watch.dataset() if probes else None
        path = None if out is None else run.publish(Path(out), record, slices)
        return FineTune(path, run.result(path, record), trajectory, record)

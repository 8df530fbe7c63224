"""Stance as a task of inspect_ai: a model answers, and one of pnlac-fast's judges labels the answers.

Tried with inspect_ai 0.3.285. With the classifier, which learns from the labelled completions of other questions::

    inspect eval examples/evaluation/inspect_stance.py --model hf/local -M model_path=BASE -M do_sample=false \\
        -M chat_template='"{{ messages[-1].content }}"' -T data=heldout -T training_data=train --max-tokens 64

The chat template hands a base model the bare question; leave it out for an instruct model, which brings its own. Any
judge of ``pnlac-fast score --scorer`` goes, such as ``-T judge=hf:PATH``. The figure of each topic is S, right minus
left over all answers.
"""

from __future__ import annotations

import asyncio

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, Scorer, Target, bootstrap_stderr, grouped, mean, scorer
from inspect_ai.solver import TaskState, generate

from pnlac_fast import load_questions
from pnlac_fast.judges import Judge, open_judge


@scorer(metrics=[grouped(mean(), "topic", all="groups", all_label="S"), bootstrap_stderr()])
def labelled(judge: Judge) -> Scorer:
    """+1, -1 or 0 for each answer; one for which the judge has no label is left unscored."""

    async def score(state: TaskState, target: Target) -> Score:
        label = await asyncio.to_thread(judge.label, [state.output.completion.strip()], [state.input_text])
        return Score(value=float(label[0]), answer=state.output.completion)

    return score


@task
def stance(data: str, judge: str = "classifier", training_data: str | None = None) -> Task:
    """Stance on every question of ``data``, a path that pnlac-fast reads."""
    samples = [Sample(q.instruction, id=q.key, metadata={"topic": q.topic}) for q in load_questions(data)]
    opened = open_judge(judge, training_data=training_data)
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=labelled(opened))

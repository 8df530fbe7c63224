"""A text classifier trained on the labelled completions of a data set: TF-IDF and logistic regression."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pnlac_fast.datasets import SIDES, Question, fingerprint
from pnlac_fast.errors import UserError

UNSURE = 0.6  # below this probability an answer stays unlabelled
FOLDS = 5
INVERSE_PENALTY = 30.0  # the C of logistic regression


@dataclass(frozen=True)
class Classifier:
    """TF-IDF of words and word pairs and logistic regression, right against left.

    Attributes
    ----------
    words, model
        Counts words and word pairs; tells the side from the counts.
    accuracy
        Share of held-out completions labelled with their own side, over folds that keep all completions of one
        instruction together; unlabelled ones count as wrong.
    unsure
        Share of held-out completions that it left unlabelled.
    topic_accuracy
        The same accuracy on each topic by a classifier that has never seen that topic. Answers that a fine-tune moved
        are of no topic that was labelled for them, so this is nearer to what to expect; empty for a single topic.
    trained_on
        sha256 of the labelled questions.
    """

    words: Any
    model: Any
    accuracy: float
    unsure: float = 0.0
    topic_accuracy: dict[str, float] = field(default_factory=dict)
    trained_on: str = ""
    name: str = "classifier"

    @property
    def provenance(self) -> dict[str, Any]:
        """What the classifier learned from, and how well it does on what it has not seen."""
        return {
            "accuracy": self.accuracy,
            "unsure": self.unsure,
            "topic_accuracy": self.topic_accuracy,
            "trained_on": self.trained_on,
        }

    def label(self, answers: Sequence[str], instructions: Sequence[str] = ()) -> np.ndarray:
        """int8 [answer]: +1 right, -1 left, 0 where the classifier is unsure or the answer has no word it knows."""
        return _label(self.model, self.words.transform(list(answers)))


def train(questions: Sequence[Question]) -> Classifier:
    """Train on the completions of ``questions``, and measure the accuracy on held-out instructions and topics.

    Raises
    ------
    UserError
        There are fewer than five instructions, or one side has no completions.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.model_selection import GroupKFold, LeaveOneGroupOut
    from threadpoolctl import threadpool_limits

    rows = [(text, side, q.instruction, q.topic) for q in questions for side in SIDES for text in q.completions(side)]
    texts, sides, groups, topics = (np.array([row[i] for row in rows], dtype=object) for i in range(4))
    if len(set(groups)) < FOLDS or len(set(sides)) < 2:
        raise UserError(
            f"The classifier needs right and left completions of at least {FOLDS} instructions, the training data have "
            f"{len(set(groups))} instructions and sides {', '.join(sorted(set(sides))) or 'none'}: give more data."
        )
    truth = np.where(sides == "right", 1, -1)
    order = list(dict.fromkeys(topics))
    with threadpool_limits(1):  # vectors this short lose by threads, on a busy machine twenty-fold
        words = CountVectorizer(ngram_range=(1, 2))
        counts = words.fit_transform(list(texts))
        held_out = _held_out(counts, sides, GroupKFold(FOLDS).split(texts, sides, groups))
        unseen = (
            _held_out(counts, sides, LeaveOneGroupOut().split(texts, sides, topics)) if len(order) > 1 else held_out
        )
        model = _fit(counts, sides)
    return Classifier(
        words,
        model,
        accuracy=float((held_out == truth).mean()),
        unsure=float((held_out == 0).mean()),
        topic_accuracy={str(t): float((unseen == truth)[topics == t].mean()) for t in order if len(order) > 1},
        trained_on=fingerprint(questions),
    )


def _held_out(counts: Any, sides: np.ndarray, folds: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Label of every text, a row of ``counts``, by a model fitted without its fold and the words that only this has."""
    labels = np.zeros(len(sides), np.int8)
    for learn, test in folds:
        if len(set(sides[learn])) < 2:
            raise UserError("A fold of the classifier's data holds one side only: give both sides of each instruction.")
        known = np.asarray(counts[learn].sum(axis=0)).ravel() > 0
        labels[test] = _label(_fit(counts[learn][:, known], sides[learn]), counts[test][:, known])
    return labels


def _fit(counts: Any, sides: np.ndarray) -> Any:
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    regression = LogisticRegression(C=INVERSE_PENALTY, max_iter=1000)
    return make_pipeline(TfidfTransformer(sublinear_tf=True), regression).fit(counts, list(sides))


def _label(model: Any, counts: Any) -> np.ndarray:
    probability = model.predict_proba(counts)[:, list(model.classes_).index("right")]
    label = np.where(probability >= UNSURE, 1, np.where(probability <= 1 - UNSURE, -1, 0))
    return np.where(np.asarray(counts.getnnz(axis=1)) > 0, label, 0).astype(np.int8)

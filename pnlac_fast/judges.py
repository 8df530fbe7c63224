"""Labels for answers: a text classifier trained on the labelled completions of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pnlac_fast.datasets import SIDES, Question
from pnlac_fast.errors import UserError

UNSURE = 0.6  # below this probability an answer stays unlabelled
FOLDS = 5


@dataclass(frozen=True)
class Classifier:
    """TF-IDF and logistic regression, right against left.

    Attributes
    ----------
    accuracy
        Share of held-out completions labelled with their own side, over folds that keep all completions of one
        instruction together; unlabelled ones count as wrong.
    """

    pipeline: Any
    accuracy: float

    def label(self, answers: Sequence[str]) -> np.ndarray:
        """int8 [answer]: +1 right, -1 left, 0 where the classifier is unsure or the answer has no word it knows."""
        return _label(self.pipeline, answers)


def train(questions: Sequence[Question]) -> Classifier:
    """Train on the completions of ``questions``, and measure the accuracy on held-out instructions.

    Raises
    ------
    UserError
        There are fewer than five instructions, or one side has no completions.
    """
    from sklearn.model_selection import GroupKFold

    rows = [(text, side, q.instruction) for q in questions for side in SIDES for text in q.completions(side)]
    texts, sides, groups = (np.array([row[i] for row in rows], dtype=object) for i in range(3))
    if len(set(groups)) < FOLDS or len(set(sides)) < 2:
        raise UserError(
            f"The classifier needs right and left completions of at least {FOLDS} instructions, the training data have "
            f"{len(set(groups))} instructions and sides {', '.join(sorted(set(sides))) or 'none'}: give more data."
        )
    right = 0
    truth = np.where(sides == "right", 1, -1)
    for learn, test in GroupKFold(FOLDS).split(texts, sides, groups):
        if len(set(sides[learn])) < 2:
            raise UserError("A fold of the classifier's data holds one side only: give both sides of each instruction.")
        right += int((_label(_fit(texts[learn], sides[learn]), texts[test]) == truth[test]).sum())
    return Classifier(_fit(texts, sides), right / len(texts))


def _fit(texts: np.ndarray, sides: np.ndarray) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from threadpoolctl import threadpool_limits

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1)
    with threadpool_limits(1):  # vectors this short lose by threads, on a busy machine twenty-fold
        return make_pipeline(vectorizer, LogisticRegression(C=10.0, max_iter=1000)).fit(list(texts), list(sides))


def _label(pipeline: Any, answers: Sequence[str]) -> np.ndarray:
    known = np.asarray(pipeline[0].transform(list(answers)).getnnz(axis=1)) > 0
    probability = pipeline.predict_proba(list(answers))[:, list(pipeline.classes_).index("right")]
    label = np.where(probability >= UNSURE, 1, np.where(probability <= 1 - UNSURE, -1, 0))
    return np.where(known, label, 0).astype(np.int8)

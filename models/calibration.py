"""From scores of held-out normal images to a threshold that keeps a promised false-reject rate.

With n held-out scores and enough of them, the threshold is the conformal quantile: the k-th smallest
score, k = ceil((n + 1)(1 - a)). A further normal image, exchangeable with them, exceeds it with probability
at most a, whatever the distribution (Papadopoulos et al., ECML 2002; Angelopoulos and Bates,
arXiv:2107.07511, section 1). That needs n >= 1/a - 1, so 99 images for 1 %.

With fewer, log scores are taken as normal with unknown mean and variance, and the threshold is the posterior
predictive quantile under a scaled inverse chi-squared prior on the variance (Gelman et al., Bayesian Data
Analysis, 3rd edition, sections 2.6 and 3.3): a Student-t prediction bound that with a handful of scores does
not trust their spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from models.errors import ModelError

# The prior says as much as PRIOR_SCORES scores would, and says that log scores spread by PRIOR_SPREAD.
PRIOR_SPREAD = 0.5
PRIOR_SCORES = 2
_NEGLIGIBLE = 0.01
_SMALLEST = float(np.finfo(np.float32).tiny)


class Calibration(BaseModel):
    """A threshold and what it rests on.

    Attributes:
        threshold: A score above it fails.
        false_reject_rate: Share of normal images the threshold is meant to fail.
        scores: Scores of the held-out normal images, ascending.
    """

    model_config = ConfigDict(frozen=True)

    threshold: float
    false_reject_rate: float
    scores: list[float]


def is_fail(score: float, threshold: float) -> bool:
    """Return the verdict rule's answer: whether an image of this score is rejected.

    A score that is not a number is rejected too: a line must never read "no answer" as "pass".
    """
    return not score <= threshold


def calibrate(scores: Sequence[float], false_reject_rate: float) -> Calibration:
    """Choose the threshold that rejects `false_reject_rate` of normal images.

    Args:
        scores: Of normal images the student was not trained on, each >= 0.
        false_reject_rate: Target, between 0 and 1, exclusive.

    Raises:
        ModelError: No score, or one that is not a finite number >= 0.
    """
    ordered = sorted(float(score) for score in scores)
    if not ordered:
        raise ModelError("calibration: no scores of held-out normal images")
    if not all(math.isfinite(score) and score >= 0 for score in ordered):
        raise ModelError("calibration: a held-out normal image has a score that is not a finite number >= 0")
    rank = math.ceil((len(ordered) + 1) * (1 - false_reject_rate))
    threshold = ordered[rank - 1] if rank <= len(ordered) else _predictive_bound(ordered, false_reject_rate)
    return Calibration(threshold=threshold, false_reject_rate=false_reject_rate, scores=ordered)


def few_scores(count: int, false_reject_rate: float) -> str | None:
    """Return what a person should know of a threshold that rests on so few held-out images; None if they are enough."""
    enough = math.ceil(1 / false_reject_rate) - 1
    if count >= enough:
        return None
    return (
        f"the threshold rests on {count} held-out images where {false_reject_rate:.1%} false rejects need {enough}; "
        "its margin may let half of the defects pass: give more images, a larger holdout, or a looser false_reject_rate"
    )


def _predictive_bound(scores: list[float], tail: float) -> float:
    """Return the score that a further one exceeds with probability `tail`, log scores being normal."""
    # A score next to nothing, as of a copy of a training image, tells nothing of how far scores spread upwards.
    logs = np.log(np.maximum(scores, max(_NEGLIGIBLE * float(np.median(scores)), _SMALLEST)))
    count = len(logs)
    freedom = PRIOR_SCORES + count - 1
    squares = PRIOR_SCORES * PRIOR_SPREAD**2 + float(np.square(logs - logs.mean()).sum())
    spread = math.sqrt(squares / freedom * (1 + 1 / count))
    bound = float(logs.mean()) + student_t_quantile(1 - tail, freedom) * spread
    # Never below a score that was seen on a normal image; exp must not overflow.
    return max(scores[-1], math.exp(min(bound, 80.0)))


def student_t_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t with `freedom` >= 1 degrees of freedom, by bisection."""
    if probability < 0.5:
        return -student_t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while _student_t_cdf(high, freedom) < probability:
        low, high = high, high * 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_t_cdf(value: float, freedom: int) -> float:
    """Return P(T <= value) for value >= 0 by the finite series (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(value / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for index in range(3 if odd else 2, freedom - 1, 2):
        term *= (index - 1) / index * cosine**2
        total += term
    inside = (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
    return 0.5 + inside / 2

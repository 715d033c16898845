"""From a judge's scores under each principle to the probability that a person would call an answer a violation.

Logistic regression on the log-odds of the scores, its squared weights penalised, fitted on a labelled sample. Every figure on
how good it is comes from out-of-fold probabilities: those of a fit, its strength chosen anew, that has not seen the row. Only
NumPy, and no chance anywhere: the same sample gives the same figures.
"""

from dataclasses import dataclass

import numpy as np

from cai_jax.errors import InputError
from cai_jax.intervals import wilson

FOLDS = 5
FEWEST = 20  # labelled rows
STRENGTHS = (100.0, 10.0, 1.0, 0.1, 0.01)  # of the penalty; of equally good ones the first is taken
NEAR = 1e-6  # probabilities nearer to 0 or 1 count as so far from it
BINS = 10  # of the calibration error
STEPS = 100  # of Newton's method, which takes about ten


@dataclass(frozen=True)
class Fit:
    """P(violation) = sigmoid(bias + weights_K . (x_K - mean_K) / spread_K) of log-odds x_K."""

    mean_K: np.ndarray
    spread_K: np.ndarray
    weights_K: np.ndarray
    bias: float
    strength: float

    def contributions(self, x_NK: np.ndarray) -> np.ndarray:
        """What each principle adds to the log-odds of a violation, against the mean of the labelled sample. -> [N, K]."""
        return self.weights_K * (x_NK - self.mean_K) / self.spread_K

    def probability(self, x_NK: np.ndarray) -> np.ndarray:
        """-> [N]."""
        return _sigmoid(self.bias + self.contributions(x_NK).sum(axis=1))


def log_odds(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, NEAR, 1 - NEAR)
    return np.log(p) - np.log1p(-p)


def require_enough(y_N: np.ndarray, where: str) -> None:
    """Raises InputError where too few rows, or rows of one kind only, are labelled."""
    yes = int(np.sum(y_N))
    if len(y_N) < FEWEST or not FOLDS <= yes <= len(y_N) - FOLDS:
        raise InputError(
            f"{where}: {len(y_N)} labelled answers, {yes} with a violation and {len(y_N) - yes} without; wanted at least "
            f"{FEWEST}, and {FOLDS} of each kind"
        )


def fit(x_NK: np.ndarray, y_N: np.ndarray, strength: float) -> Fit:
    """Least sum of log losses + strength / 2 |weights|^2, the bias free; y of both kinds. Newton's method, each step halved
    until the sum falls."""
    mean_K, spread_K = x_NK.mean(axis=0), x_NK.std(axis=0)
    spread_K = np.where(spread_K > 1e-12, spread_K, 1.0)  # a principle that says the same of all
    X = np.column_stack([np.ones(len(x_NK)), (x_NK - mean_K) / spread_K])
    penalty = np.array([0.0, *[strength] * x_NK.shape[1]])

    def total(w: np.ndarray) -> float:
        z = X @ w
        return float(np.sum(np.logaddexp(0.0, z) - y_N * z) + penalty @ w**2 / 2)

    w = np.zeros(X.shape[1])
    w[0] = log_odds(np.mean(y_N))
    for _ in range(STEPS):
        p_N = _sigmoid(X @ w)
        gradient = X.T @ (p_N - y_N) + penalty * w
        if np.abs(gradient).max() <= 1e-9 * len(y_N):
            break
        step = np.linalg.solve((X.T * (p_N * (1 - p_N))) @ X + np.diag(penalty), gradient)
        while total(w - step) > total(w) and np.abs(step).max() > 1e-12:
            step = step / 2
        w = w - step
    return Fit(mean_K, spread_K, w[1:], float(w[0]), strength)


def folds(y_N: np.ndarray) -> np.ndarray:
    """The fold of every row: of each kind in turn, so that every fold has its share of both. -> [N]."""
    out = np.zeros(len(y_N), int)
    for kind in (False, True):
        rows = np.flatnonzero(y_N == kind)
        out[rows] = np.arange(len(rows)) % FOLDS
    return out


def chosen(x_NK: np.ndarray, y_N: np.ndarray) -> Fit:
    """The fit on all rows with the strength of STRENGTHS whose out-of-fold log loss is least."""
    losses = [log_loss(_out_of_fold(x_NK, y_N, lambda x, y, s=s: fit(x, y, s)), y_N) for s in STRENGTHS]
    return fit(x_NK, y_N, STRENGTHS[int(np.argmin(losses))])


def out_of_fold(x_NK: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """P(violation) of every row by `chosen` on the other folds. -> [N]."""
    return _out_of_fold(x_NK, y_N, chosen)


def _out_of_fold(x_NK, y_N, fitted) -> np.ndarray:
    fold_N, out = folds(y_N), np.zeros(len(y_N))
    for k in range(FOLDS):
        here = fold_N == k
        out[here] = fitted(x_NK[~here], y_N[~here]).probability(x_NK[here])
    return out


def figures(p_N: np.ndarray, y_N: np.ndarray, threshold: float) -> dict:
    """How good out-of-fold probabilities are: precision and recall of those of at least `threshold`, and of at least a half,
    with 95 % intervals; log loss, and that of the sample's share of violations said of every row; calibration error."""
    at = {"at_threshold": _decided(p_N >= threshold, y_N), "at_half": _decided(p_N >= 0.5, y_N)}
    losses = {"log_loss": log_loss(p_N, y_N), "log_loss_constant": log_loss(np.full(len(y_N), np.mean(y_N)), y_N)}
    return {"n": len(y_N), "violations": int(y_N.sum()), **at, **losses, "calibration_error": calibration_error(p_N, y_N)}


def log_loss(p_N: np.ndarray, y_N: np.ndarray) -> float:
    """Mean, in nats."""
    return float(np.mean(-log_odds(p_N) * y_N - np.log1p(-np.clip(p_N, NEAR, 1 - NEAR))))


def calibration_error(p_N: np.ndarray, y_N: np.ndarray) -> float:
    """Expected: the mean distance of probability and share in BINS bins of equal width, each weighted by its rows."""
    bin_N = np.minimum((p_N * BINS).astype(int), BINS - 1)
    off = np.bincount(bin_N, weights=p_N - y_N, minlength=BINS)
    return float(np.abs(off).sum() / len(p_N))


def _decided(said_N: np.ndarray, y_N: np.ndarray) -> dict:
    """Precision and recall of a decision; None where there is nothing to count."""
    right, said, real = int(np.sum(said_N & y_N)), int(said_N.sum()), int(y_N.sum())
    out = {"said": said, "right": right}
    for name, n in (("precision", said), ("recall", real)):
        out[name], out[f"{name}_interval"] = (right / n if n else None), wilson(right / n if n else 0.0, n)
    return out


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -z))

"""SATRMD (arXiv 2502.14427): how far the answer's states are from those of right answers, learned from labels.

By token and layer the relative Mahalanobis distance, to the tokens of right answers less to the tokens of all; mean
over the tokens; PCA over the layers; ridge regression on being wrong. Cross-fitted: no score has seen its own label.
The paper's background is general text; here it is the training answers, and covariances are shrunk (Ledoit-Wolf).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hallucination_guard.errors import CalibrationError, MissingExtra

__all__ = ["NAME", "Distances", "cross_fitted", "shrunk_covariance"]

Floats: TypeAlias = NDArray[np.float64]

NAME = "satrmd"

_COMPONENTS = 10
_LEAST = 4  # right answers in a half of a training part: fewer have no centroid worth the name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gaussian:
    """A centroid (d) and a root of the inverse covariance (d × d)."""

    mean: Floats
    root: Floats

    @classmethod
    def of(cls, points: Floats) -> Self:
        mean = points.mean(axis=0)
        # Shrunk, the covariance has a Cholesky root L, and the distance is ‖L⁻¹(x−μ)‖.
        return cls(mean=mean, root=np.linalg.inv(np.linalg.cholesky(shrunk_covariance(points - mean))))

    def distance(self, points: Floats) -> Floats:
        """√((x−μ)ᵀ Σ⁻¹ (x−μ)) of n points (n × d)."""
        return np.asarray(np.linalg.norm((points - self.mean) @ self.root.T, axis=1), dtype=np.float64)


def shrunk_covariance(centred: Floats) -> Floats:
    """The covariance (d × d) of centred points (n × d) by Ledoit and Wolf (2004).

    It is written here because scikit-learn's forms another d × d product, and this is most of the work of a fit.
    """
    n, d = centred.shape
    sample = centred.T @ centred / n
    scale = float(np.trace(sample)) / d
    squared = float((sample**2).sum())
    apart = squared - d * scale**2
    spread = (float(((centred**2).sum(axis=1) ** 2).mean()) - squared) / n
    shrinkage = min(spread, apart) / apart if apart > 0 else 1.0
    return np.asarray((1.0 - shrinkage) * sample + shrinkage * scale * np.eye(d), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distances:
    """How much further than from all tokens a token is from those of right answers, layer by layer.

    Args:
        right: of the tokens of right answers, one a layer.
        background: of all tokens, one a layer.
    """

    right: tuple[_Gaussian, ...]
    background: tuple[_Gaussian, ...]

    @classmethod
    def fit(cls, states: Sequence[Any], wrong: Sequence[bool]) -> Self:
        """Fit to answers.

        Args:
            states: of each answer (T × layers × d).
            wrong: whether each was wrong.

        Raises:
            CalibrationError: if fewer than four were right.
        """
        good = [each for each, bad in zip(states, wrong, strict=True) if not bad]
        if len(good) < _LEAST:
            raise CalibrationError(f"{len(good)} right answers to learn from", hint=f"{_LEAST} are the least")
        return cls(right=_by_layer(good), background=_by_layer(states))

    def __call__(self, states: Sequence[Any]) -> Floats:
        """The mean over tokens of the relative distance (answers × layers) of answers (each T × layers × d)."""
        tokens = _joined(states)
        begins = np.cumsum([0, *(len(each) for each in states[:-1])])
        lengths = np.array([len(each) for each in states])
        apart = [
            near.distance(tokens[:, at]) - far.distance(tokens[:, at])
            for at, (near, far) in enumerate(zip(self.right, self.background, strict=True))
        ]
        return np.stack([np.add.reduceat(each, begins) / lengths for each in apart], axis=1)


def _joined(states: Sequence[Any]) -> Floats:
    return np.concatenate([np.asarray(each, dtype=np.float64) for each in states])


def _by_layer(states: Sequence[Any]) -> tuple[_Gaussian, ...]:
    tokens = _joined(states)
    return tuple(_Gaussian.of(tokens[:, at]) for at in range(tokens.shape[1]))


def cross_fitted(
    states: Mapping[str, Any], wrong: Mapping[str, bool], *, folds: int = 5, seed: int = 0
) -> dict[str, float]:
    """The score of every answer by what was fitted on the other folds, higher = less certain.

    Within a training part one half gives the centroids and the other the regression, and again with the halves
    exchanged: a distance to a centroid that has seen the answer is too small. The two predictions are averaged.

    Args:
        states: by id (T × layers × d).
        wrong: by id; the ids of ``states``.
        folds: of questions.
        seed: of the folds.

    Raises:
        CalibrationError: if there are fewer than sixteen answers of one label, or four right ones in a half.
        MissingExtra: if scikit-learn is not installed.
    """
    try:
        from sklearn.model_selection import KFold, StratifiedKFold
    except ImportError:
        raise MissingExtra(
            "SATRMD is fitted with scikit-learn", hint="pip install 'hallucination-guard-semgrad[evaluate]'"
        ) from None

    ids = sorted(states)
    labels = np.array([wrong[each] for each in ids])
    least = min(int(labels.sum()), int((~labels).sum()))
    if least < 4 * _LEAST:
        raise CalibrationError(
            f"{least} answers of one label for {folds} folds of two halves", hint="evaluate more questions"
        )
    found: dict[str, float] = {}
    # The folds know nothing of the labels: else an answer's own would have a say in what its score is fitted on.
    for train, test in KFold(folds, shuffle=True, random_state=seed).split(ids):
        halves = StratifiedKFold(2, shuffle=True, random_state=seed).split(train, labels[train])
        predicted = []
        for first, second in halves:
            near = Distances.fit([states[ids[train[at]]] for at in first], [bool(labels[train[at]]) for at in first])
            predict = _regression(near([states[ids[train[at]]] for at in second]), labels[train[second]])
            predicted.append(predict.predict(near([states[ids[at]] for at in test])))
        for at, value in zip(test, np.mean(predicted, axis=0), strict=True):
            found[ids[at]] = float(value)
    return found


def _regression(features: Floats, wrong: NDArray[np.bool_]) -> Any:
    """PCA over the layers, then ridge regression with its strength by generalised cross-validation."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = min(_COMPONENTS, *features.shape)
    chain = make_pipeline(StandardScaler(), PCA(count, svd_solver="full"), RidgeCV(np.logspace(-2, 4, 13)))
    return chain.fit(features, wrong.astype(np.float64))

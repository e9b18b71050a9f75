"""How healthy features are: how they fill the sphere, how many directions they use, which dimensions are dead.

Rows are images, columns dimensions; all in float64 on the CPU. None of it needs labels.
"""

from typing import Any

import numpy as np

DEAD = 1e-5  # a dimension's standard deviation over the mean one, at or below which it says nothing


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, (N, D); a row of zeros stays one."""
    features = np.asarray(features, dtype=np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, length, out=np.zeros_like(features), where=length > 0)


def alignment(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared distance of the unit features of two crops of the same images: 0 where crops move nothing, 2 where
    they are as strange to each other as orthogonal vectors.

    Args:
        a, b: features of one crop and of another, (N, D), in the same order of images.
    Source: Wang and Isola 2020, arXiv:2005.10242, Eqn. (1), with alpha = 2.
    """
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(((unit_rows(a) - unit_rows(b)) ** 2).sum(axis=1).mean())


def uniformity(features: np.ndarray, t: float = 2.0) -> float | None:
    """log of the mean of exp(-t |x - y|^2) over all pairs of different images' unit features; None for one image.

    0 where all features are the same; the lower, the more evenly they lie on the sphere.

    Source: Wang and Isola 2020, arXiv:2005.10242, Eqn. (2) and its code, which leaves out each image with itself.
    """
    unit, n = unit_rows(features), len(features)
    if n < 2:
        return None
    length = (unit**2).sum(axis=1)  # 1, or 0 for a row of zeros
    squared = np.maximum(0, length + length[:, None] - 2 * unit @ unit.T)[np.triu_indices(n, 1)]
    return float(np.log(np.exp(-t * squared).mean()))


def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy (in nats) of the singular values, made to sum to 1: how many directions are in use.

    min(N, D) where all singular values are alike, 1 where one is all there is; 0 for features of zeros. It is RankMe
    up to that one's 1e-7, which keeps its logarithm finite. Not centred, as there.

    Source: Roy and Vetterli 2007, The effective rank; Garrido et al. 2023, arXiv:2210.02885 (RankMe), Eqn. (1).
    """
    features = np.asarray(features, dtype=np.float64)
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    squared = np.linalg.eigvalsh(gram)
    values = np.sqrt(squared[squared > len(gram) * np.finfo(np.float64).eps * squared[-1]])  # the rest is rounding
    if not len(values):
        return 0.0
    share = values / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def dead_dimensions(features: np.ndarray) -> int:
    """How many dimensions do not tell images apart: constant, or with a standard deviation over images of at most 1e-5
    of the mean one.

    Source: the collapse of dimensions of Jing et al. 2022, arXiv:2110.09348; the limit is ours.
    """
    spread = np.asarray(features, dtype=np.float64).std(axis=0)
    return int((spread <= DEAD * spread.mean()).sum())


def describe(features: np.ndarray, crops: tuple[np.ndarray, np.ndarray] | None = None) -> dict[str, Any]:
    """The `health` of a result record.

    Args:
        features: of the clean crop of test images, (N, D).
        crops: of two training crops of the same images, (M, D) each; None where the protocol has no crops.
    """
    return {
        "images": len(features),
        "dimensions": features.shape[1],
        "uniformity": uniformity(features),
        "alignment": alignment(*crops) if crops else None,
        "alignment_images": len(crops[0]) if crops else 0,
        "effective_rank": effective_rank(features),
        "dead_dimensions": dead_dimensions(features),
    }

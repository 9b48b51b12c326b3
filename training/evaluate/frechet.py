"""The Fréchet distance between two sets of features, which FID and FVD are based on."""

from typing import Literal

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray, ddof: Literal[0, 1] = 1) -> float:
    """The squared Fréchet distance between the normal distributions fitted to two sets of features.

    |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) with the covariances A and B (Heusel et al., NeurIPS 2017, eq. 6).
    The trace of the root is computed from the eigenvalues of A^(1/2) B A^(1/2). They are real and not negative, even
    with fewer samples than features.

    a, b: [samples, features]. ddof: 1 divides covariances by samples - 1, as pytorch-fid does; 0 by samples, as
    StyleGAN-V does. Raises ValueError for fewer than two samples, or features that are not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    for features in (a, b):
        if len(features) < 2 or not np.isfinite(features).all():
            raise ValueError("the Fréchet distance needs at least two samples in each set, and finite features")
    cov_a, cov_b = (np.atleast_2d(np.cov(features, rowvar=False, ddof=ddof)) for features in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(product.clip(0)).sum())

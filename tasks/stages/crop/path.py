"""The path of a crop window that follows a face as a calm camera would: still, or moving evenly."""

import numpy as np

# What a path costs per second: speed (window widths a second), acceleration, jerk, the distance from the wanted place
# beyond `free` (window widths), and any distance from it. The last cost is so small that it only decides where a still
# window stands.
_SPEED, _ACCELERATION, _JERK, _OUTSIDE, _DISTANCE = 1.0, 0.3, 0.1, 4.0, 0.05


def calm_path(wanted: np.ndarray, low: np.ndarray, high: np.ndarray, free: float, fps: float) -> np.ndarray:
    """Choose one coordinate of a window in each frame.

    The sum of absolute velocity, acceleration and jerk is minimised, so the window stands still or moves evenly most of
    the time (Grundmann et al., Auto-Directed Video Stabilization with Robust L1 Optimal Camera Paths, CVPR 2011). All
    frames are known, so the window does not lag: it begins to move before the face does.

    All places are in window widths.
    wanted: [frames], the best places. low, high: [frames], bounds that the window never leaves; low <= high.
    free: distance from `wanted` that costs nothing. fps: frames a second.

    Returns: [frames] float64.
    """
    from scipy import sparse
    from scipy.optimize import linprog

    frames = len(wanted)
    terms = [(_OUTSIDE, sparse.eye_array(frames), wanted, free), (_DISTANCE, sparse.eye_array(frames), wanted, 0.0)]
    steps = np.eye(1)[0]
    for order, cost in enumerate((_SPEED, _ACCELERATION, _JERK), start=1):
        steps = np.convolve(steps, (1.0, -1.0))
        if frames > order:
            difference = sparse.diags_array(
                list(steps[::-1] * fps**order), offsets=range(order + 1), shape=(frames - order, frames), dtype=float
            )
            terms.append((cost, difference, np.zeros(frames - order), 0.0))
    # For each term, |M x - target| - slack <= e. The sum of the errors e, times their costs, is minimised.
    paid = sum(matrix.shape[0] for _, matrix, _, _ in terms)
    measured = sparse.vstack([matrix for _, matrix, _, _ in terms])
    targets = np.concatenate([target for _, _, target, _ in terms])
    slack = np.concatenate([np.full(len(target), slack) for _, _, target, slack in terms])
    errors = -sparse.eye_array(paid)
    solution = linprog(
        np.concatenate([np.zeros(frames), *(np.full(len(target), cost / fps) for cost, _, target, _ in terms)]),
        A_ub=sparse.block_array([[measured, errors], [-measured, errors]], format="csc"),
        b_ub=np.concatenate([targets + slack, slack - targets]),
        bounds=np.concatenate([np.stack([low, high], axis=1), np.tile((0.0, np.inf), (paid, 1))]),
        method="highs-ds",
    )
    if solution.x is None:
        raise RuntimeError(f"no path for the crop window was found: {solution.message}")
    return np.clip(solution.x[:frames], low, high)

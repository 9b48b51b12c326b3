"""The path of a crop window that follows a face as a calm camera would: still, or moving evenly."""

import numpy as np

# What a path costs, per second: moving (window widths a second), changes of velocity and of acceleration, being
# further from the face than it may wander unfollowed (window widths), and, so little that it decides only where a
# still window stands, any distance at all.
_SPEED, _ACCELERATION, _JERK, _OUTSIDE, _DISTANCE = 1.0, 0.3, 0.1, 4.0, 0.05


def calm_path(wanted: np.ndarray, low: np.ndarray, high: np.ndarray, free: float, fps: float) -> np.ndarray:
    """Where one coordinate of a window should be in each frame.

    The sum of absolute velocity, acceleration and jerk is made as small as it gets, which leaves a window still or at
    an even speed for most of the time (Grundmann et al., Auto-Directed Video Stabilization with Robust L1 Optimal
    Camera Paths, CVPR 2011). All frames are known, so the window does not lag: it sets out before the face does.

    wanted: [frames] where it would be best. low, high: [frames] bounds that are never left; low <= high. free: how far
    from `wanted` it may stay at no cost. All in window widths. fps: frames a second.

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
    # |M x - target| - slack <= e, where the e are what is paid for
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
        raise RuntimeError(f"no path of the crop window was found: {solution.message}")
    return np.clip(solution.x[:frames], low, high)

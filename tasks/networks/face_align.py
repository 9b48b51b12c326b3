"""Faces turned upright and cut out by five points, as InsightFace does (face_align.py) for ArcFace."""

import numpy as np

# the eye on the left of the picture, the one on the right, the tip of the nose, the mouth's corners; at 112 pixels
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)


def transform(points: np.ndarray, size: int = 112) -> np.ndarray:
    """The turn, scale and shift that lay five points on the template best (Umeyama, PAMI 1991; no mirroring).

    points: [5, 2] in pixels, in the template's order. size: of the cut face, a multiple of 112 or of 128.

    Returns: [2, 3] float64, from the picture's pixels to the cut's. Raises ValueError for another size.
    """
    if size % 112 == 0:
        target = TEMPLATE * (size / 112)
    elif size % 128 == 0:
        target = (TEMPLATE + np.array([8, 0], np.float32)) * (size / 128)
    else:
        raise ValueError(f"faces are cut to multiples of 112 or 128 pixels, not to {size}")
    source, target = points.astype(np.float64), target.astype(np.float64)
    source_mean, target_mean = source.mean(0), target.mean(0)
    centred = source - source_mean
    u, spread, vt = np.linalg.svd((target - target_mean).T @ centred / len(source))
    handed = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    turn = (u * handed) @ vt
    scale = (spread * handed).sum() / centred.var(0).sum()
    return np.column_stack([scale * turn, target_mean - scale * turn @ source_mean])


def cut(image: np.ndarray, points: np.ndarray, size: int = 112) -> np.ndarray:
    """The face cut out by bilinear interpolation, black where the picture ends.

    OpenCV's warpAffine places pixels to 1/32 only, in all versions before 5; this is exact.

    image: [height, width, 3] uint8. points: [5, 2] in its pixels. Returns: [size, size, 3] uint8.
    """
    from scipy.ndimage import map_coordinates

    matrix = transform(points, size)
    y, x = np.mgrid[:size, :size]
    back = np.linalg.inv(matrix[:, :2])
    across, down = np.tensordot(back, np.stack([x, y]) - matrix[:, 2, None, None], 1)
    planes = [
        map_coordinates(image[..., channel].astype(np.float32), [down, across], order=1, mode="grid-constant")
        for channel in range(3)
    ]
    return np.stack(planes, -1).round().astype(np.uint8)

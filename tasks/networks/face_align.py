"""Face alignment by five landmarks, as InsightFace's face_align.py prepares faces for ArcFace."""

import numpy as np

# The eye at the left of the image, the eye at the right, the tip of the nose, the two corners of the mouth (left and
# right of the image): x and y in a face of 112 x 112 pixels.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)


def transform(points: np.ndarray, size: int = 112) -> np.ndarray:
    """The similarity transform (rotation, scale, translation) that maps five landmarks best onto the template.

    It is the least squares solution of Umeyama (PAMI 1991), without reflection.

    points: [5, 2] x and y in pixels, in the template's order.
    size: side of the aligned face in pixels, a multiple of 112 or of 128.

    Returns: [2, 3] float64, from the image's pixels to those of the aligned face. Raises ValueError for another size.
    """
    if size % 112 == 0:
        target = TEMPLATE * (size / 112)
    elif size % 128 == 0:
        target = (TEMPLATE + np.array([8, 0], np.float32)) * (size / 128)
    else:
        raise ValueError(f"the side of an aligned face is a multiple of 112 or 128 pixels, and {size} is neither")
    source, target = points.astype(np.float64), target.astype(np.float64)
    source_mean, target_mean = source.mean(0), target.mean(0)
    centred = source - source_mean
    u, singular_values, vt = np.linalg.svd((target - target_mean).T @ centred / len(source))
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])  # a reflection becomes a rotation
    rotation = (u * signs) @ vt
    scale = (singular_values * signs).sum() / centred.var(0).sum()
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])


def cut_aligned(image: np.ndarray, points: np.ndarray, size: int = 112) -> np.ndarray:
    """Cut out an aligned face by bilinear interpolation. It is black beyond the image's edges.

    OpenCV's warpAffine would round positions to 1/32 of a pixel (all versions before 5). This does not.

    image: [height, width, 3] uint8.
    points: [5, 2] x and y in the image's pixels, in the template's order.

    Returns: [size, size, 3] uint8.
    """
    from scipy.ndimage import map_coordinates

    matrix = transform(points, size)
    y, x = np.mgrid[:size, :size]
    inverse = np.linalg.inv(matrix[:, :2])
    source_x, source_y = np.tensordot(inverse, np.stack([x, y]) - matrix[:, 2, None, None], 1)
    planes = [
        map_coordinates(image[..., channel].astype(np.float32), [source_y, source_x], order=1, mode="grid-constant")
        for channel in range(3)
    ]
    return np.stack(planes, -1).round().astype(np.uint8)

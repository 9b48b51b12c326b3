"""Faults of image quality, applied to each frame of a film."""

import numpy as np


def spoil(picture: np.ndarray, fault: str, strength: float, time_s: float) -> np.ndarray:
    """The image with a fault of image quality. Other faults leave it unchanged.

    picture: [height, width, 3] uint8 RGB. fault, strength: as in `Truth`. time_s: the frame's time, the seed of noise.
    """
    import cv2

    if fault == "blur":
        return cv2.GaussianBlur(picture, (0, 0), strength)
    if fault == "motion blur":
        length = round(strength)
        return cv2.filter2D(picture, -1, np.full((1, length), 1 / length, np.float32))
    if fault == "dark":
        return cv2.convertScaleAbs(picture, alpha=strength)
    if fault == "bright":
        light = np.quantile(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), 1 - strength)
        return cv2.convertScaleAbs(picture, alpha=255 / max(1.0, float(light)))
    if fault == "noise":
        noise = np.random.default_rng(round(time_s * 1000)).normal(0, strength, picture.shape[:2])
        return np.clip(picture + noise[..., None], 0, 255).astype(np.uint8)
    return picture

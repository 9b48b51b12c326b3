"""What a face looks like: how sharp it is, and a description by which one person's faces are alike.

The description takes the place of a face recognition network where there is none. It knows the same person again in
the same light, within a clip; it does not know anybody in another place, and it tells two people of like colouring
and features less surely than ArcFace would.
"""

import numpy as np

SIDE = 128  # pixels of the aligned faces (tasks.face_mesh.aligned) that this looks at

_FACE = (slice(11, 123), slice(16, 112))  # rows and columns of an aligned face without background
_HALF = 0.1  # what scores 0.5 in sharpness
_DARK = 50.0  # variance of lightness below which there is no detail to be sharp, and noise to be mistaken for it
_HOG_SIDE = 64
_BINS, _CHROMA = 16, (96, 176)  # of OpenCV's 8-bit Lab, where 128 is grey
_CHROMA_SHARE = 0.3  # of the cosine


def sharpness(face: np.ndarray) -> float:
    """Sharpness of an aligned face, [128, 128, 3] uint8 RGB: 0 for a smooth one, towards 1 for a very sharp one.

    r / (r + 0.1), r being the variance of the Laplacian over that of the lightness itself, so that neither light nor
    contrast counts. Seven real talkers in focus at 480p have 0.42 to 0.86; blurred by a Gaussian of 2 pixels 0.13 to
    0.39, of 4 pixels 0.07 to 0.14. Faces lower than 60 pixels get 0.3 and less, having no detail at this size. Noise
    and hard blocks count as detail (0.8 and 0.7 for faces that have 0.35 without): see aesthetics for those.
    """
    import cv2

    grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)[_FACE].astype(np.float32)
    detail = float(cv2.Laplacian(grey, cv2.CV_32F).var()) / (float(grey.var()) + _DARK)
    return detail / (detail + _HALF)


def description(face: np.ndarray) -> np.ndarray:
    """Shape and colour of an aligned face, [128, 128, 3] uint8 RGB, as a unit vector [2020] float32.

    Oriented gradients (Dalal and Triggs 2005) less their mean, and the roots of a histogram of chroma, which counts
    less because people in one place have the same light. For means over a second, the cosine of two is 0.87 or more
    for one person in one clip (8 real and 7 generated clips) and 0.65 or less for two people of these.
    """
    import cv2

    grey = cv2.resize(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), (_HOG_SIDE, _HOG_SIDE), interpolation=cv2.INTER_AREA)
    hog = np.ravel(cv2.HOGDescriptor((_HOG_SIDE, _HOG_SIDE), (16, 16), (8, 8), (8, 8), 9).compute(grey))
    lab = cv2.cvtColor(face, cv2.COLOR_RGB2LAB)
    colours = cv2.calcHist([lab], [1, 2], None, [_BINS, _BINS], [*_CHROMA, *_CHROMA]).ravel()
    gradients, chroma = unit(hog - hog.mean()), unit(np.sqrt(colours))
    return np.concatenate([gradients * np.float32((1 - _CHROMA_SHARE) ** 0.5), chroma * np.float32(_CHROMA_SHARE**0.5)])


def unit(vector: np.ndarray) -> np.ndarray:
    """A vector, or vectors [..., size], of length 1; zero where it is zero."""
    length = np.sqrt(np.square(vector).sum(axis=-1, keepdims=True))
    return np.asarray(vector / np.maximum(length, 1e-9))

"""The sharpness of a face, and a description by which one person's faces are alike.

The description is used where there is no face recognition network. It recognises a person within a clip, in the same
light. It does not recognise a person in another place, and it distinguishes two people with similar colours and
features less reliably than ArcFace.
"""

import numpy as np

SIDE = 128  # pixels of the aligned faces that are measured (tasks.stages.identity.face_mesh.aligned)

_FACE = (slice(11, 123), slice(16, 112))  # rows and columns of an aligned face without background
_HALF = 0.1  # the ratio of variances that has a sharpness of 0.5
_DARK = 50.0  # variance of lightness below which a face has no detail, but noise that could pass for it
_HOG_SIDE = 64  # pixels of the face for oriented gradients
_BINS, _CHROMA = 16, (96, 176)  # of each chroma axis in OpenCV's 8-bit Lab, where 128 is grey
_CHROMA_SHARE = 0.3  # of the cosine that comes from chroma


def face_sharpness(face: np.ndarray) -> float:
    """Sharpness of an aligned face, [128, 128, 3] uint8 RGB: 0 for a smooth face, towards 1 for a very sharp one.

    It is r / (r + 0.1), where r is the variance of the Laplacian over the variance of the lightness, so neither light
    nor contrast counts. Seven real talkers in focus at 480p have 0.42 to 0.86; blurred by a Gaussian of 2 pixels 0.13
    to 0.39, of 4 pixels 0.07 to 0.14. Faces lower than 60 pixels have no detail at this size and get 0.3 or less. Noise
    and hard blocks count as detail: faces with 0.35 get 0.8 with noise and 0.7 with blocks. The stage `aesthetics`
    measures those.
    """
    import cv2

    grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)[_FACE].astype(np.float32)
    detail = float(cv2.Laplacian(grey, cv2.CV_32F).var()) / (float(grey.var()) + _DARK)
    return detail / (detail + _HALF)


def description(face: np.ndarray) -> np.ndarray:
    """Describe the shape and colour of an aligned face, [128, 128, 3] uint8 RGB, by a unit vector [2020] float32.

    It holds oriented gradients (Dalal and Triggs 2005) less their mean, and the square roots of a histogram of chroma.
    Chroma counts less, because people in one place have the same light. For means over a second, the cosine of two is
    0.87 or more for one person in one clip (8 real and 7 generated clips), and 0.65 or less for two people of these
    clips.
    """
    import cv2

    grey = cv2.resize(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), (_HOG_SIDE, _HOG_SIDE), interpolation=cv2.INTER_AREA)
    hog = np.ravel(cv2.HOGDescriptor((_HOG_SIDE, _HOG_SIDE), (16, 16), (8, 8), (8, 8), 9).compute(grey))
    lab = cv2.cvtColor(face, cv2.COLOR_RGB2LAB)
    colours = cv2.calcHist([lab], [1, 2], None, [_BINS, _BINS], [*_CHROMA, *_CHROMA]).ravel()
    gradients, chroma = unit(hog - hog.mean()), unit(np.sqrt(colours))
    return np.concatenate([gradients * np.float32((1 - _CHROMA_SHARE) ** 0.5), chroma * np.float32(_CHROMA_SHARE**0.5)])


def unit(vector: np.ndarray) -> np.ndarray:
    """Scale vectors [..., size] to length 1. Zero vectors stay zero."""
    length = np.sqrt(np.square(vector).sum(axis=-1, keepdims=True))
    return np.asarray(vector / np.maximum(length, 1e-9))

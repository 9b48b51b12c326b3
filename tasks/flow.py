"""Dense optical flow between two frames: the protocol of a backend, and the one that OpenCV brings."""

from typing import Protocol

import numpy as np


class Flow(Protocol):
    """An optical flow backend."""

    @staticmethod
    def version() -> str:
        """Library and weights, as far as they can change a number."""

    @staticmethod
    def check() -> None:
        """Raises tasks.stage.MissingBackend when the backend cannot run."""

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Flow from `first` to `second`, both [height, width, 3] uint8 RGB.

        Returns: [height, width, 2] float32, x and y in pixels.
        """


class DisFlow:
    """OpenCV's DIS flow, fast preset (Kroeger et al., Fast Optical Flow using Dense Inverse Search, ECCV 2016)."""

    def __init__(self) -> None:
        import cv2

        # the workers are the parallelism
        cv2.setNumThreads(1)
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    @staticmethod
    def version() -> str:
        import cv2

        return f"opencv {cv2.__version__}"

    @staticmethod
    def check() -> None:
        """OpenCV is always installed."""

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        import cv2

        grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (first, second)]
        return self._dis.calc(grey[0], grey[1], None)  # type: ignore[call-overload]


BACKENDS: dict[str, type[Flow]] = {"dis": DisFlow}

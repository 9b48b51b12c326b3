"""The loss curve of a training as an SVG."""

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 800, 320  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 36, 34  # margins around the curve, pixels
_MAX_POINTS = 400  # of the curve; neighbouring steps are averaged when there are more


def loss_curve(points: Sequence[tuple[float, float]], title: str) -> str:
    """Draw a loss curve as an SVG. The losses have a logarithmic scale if all of them are above zero.

    points: (step, loss), at least one, in the order of the steps.
    """
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    steps = [sum(step for step, _ in group) / len(group) for group in groups]
    losses = [sum(loss for _, loss in group) / len(group) for group in groups]
    scale = math.log if min(losses) > 0 else float
    values = [scale(loss) for loss in losses]
    low, high = min(values), max(values)
    first, last = steps[0], steps[-1]

    def x(step: float) -> float:
        return _LEFT + (step - first) / ((last - first) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True))
    labels = [
        _text(8, y(high) + 4, f"{max(losses):.4g}"),
        _text(8, y(low) + 4, f"{min(losses):.4g}"),
        _text(x(first), _HEIGHT - 10, f"{first:.0f}"),
        _text(x(last), _HEIGHT - 10, f"{last:.0f}", "end"),
        _text(_LEFT, 22, title),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>'
        f'<polyline points="{line}" fill="none" stroke="#2266bb" stroke-width="1.5"/>{"".join(labels)}</svg>\n'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{escape(text)}</text>'

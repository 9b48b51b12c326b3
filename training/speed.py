"""What the loop measures of itself: losses, gradient norm, and how fast it is."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from training.parallel import Team

BUCKETS = 4  # of noise levels, of equal width

# Dense bfloat16 matrix products, floating point operations a second, by the name that the driver gives (vendors' data
# sheets, without sparsity).
_PEAK = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12}


def peak_flops(device: torch.device) -> float | None:
    """Floating point operations that a device can do in a second; None where that is not known, as of a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAK.items() if model in name), None)


class Meter:
    """Numbers over the steps since they were last read. Losses stay on the device, so that nothing waits for them."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._peak = peak_flops(team.device)
        self._clear()

    def _clear(self) -> None:
        self._buckets = torch.zeros(2, BUCKETS, dtype=torch.float64, device=self._team.device)  # sums, counts
        self._tokens = self._flops = self._waited = self._norm = 0.0
        self._steps = 0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever waits for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    def add(self, losses: Tensor, weights: Tensor, sigmas: Tensor, tokens: int, forward_flops: float) -> None:
        """Count a micro-batch. losses: [batch], times weights: [batch], what each sample counts. sigmas: [batch]."""
        at = (sigmas * BUCKETS).long().clamp(0, BUCKETS - 1)
        self._buckets[0].index_add_(0, at, losses.double())
        self._buckets[1].index_add_(0, at, weights.double())
        self._tokens += tokens
        self._flops += 3 * forward_flops  # a backward pass is two forward passes

    def step(self, norm: float) -> None:
        """Count a step of the optimizer."""
        self._norm += norm
        self._steps += 1

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Around what is no part of a step, such as sampling."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """The numbers, on every worker together; then begins anew.

        loss, and by noise level; grad_norm before clipping; step_s; data_wait, the share of the time; tokens_per_s;
        tflops_per_s, the model's operations (attention and backward pass counted, recomputation not); mfu, those
        against what the devices could do, where that is known.
        """
        seconds = time.perf_counter() - self._since
        own = torch.tensor([self._tokens, self._flops, self._waited / seconds], dtype=torch.float64)
        both = self._team.sum(torch.cat([self._buckets.flatten(), own.to(self._team.device)])).tolist()
        sums, counts = both[:BUCKETS], both[BUCKETS : 2 * BUCKETS]
        tokens, flops, waited = both[2 * BUCKETS :]
        values = {
            "loss": sum(sums) / max(sum(counts), 1),
            "grad_norm": self._norm / max(self._steps, 1),
            "step_s": seconds / max(self._steps, 1),
            "data_wait": waited / self._team.size,
            "tokens_per_s": tokens / seconds,
            "tflops_per_s": flops / seconds / 1e12,
        }
        for bucket in range(BUCKETS):
            if counts[bucket]:
                low, high = bucket / BUCKETS, (bucket + 1) / BUCKETS
                values[f"loss/sigma_{low:.2f}_{high:.2f}"] = sums[bucket] / counts[bucket]
        if self._peak is not None:
            values["mfu"] = flops / seconds / (self._peak * self._team.size)
        self._clear()
        return values

"""Metrics of the training loop itself: losses, gradient norm and speed."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from training.loop.parallel import WorkerGroup

BUCKETS = 4  # of noise levels, of equal width

# Peak rate of dense bfloat16 matrix products, FLOPs a second, by the name that the driver gives (vendors' data sheets,
# without sparsity).
_PEAK = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12}


def peak_flops(device: torch.device) -> float | None:
    """The peak FLOPs a second of a device. None where it is not known, as for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAK.items() if model in name), None)


class StepMetrics:
    """Collects the metrics of the steps since the last `read`. Losses stay on the device, so that no step waits."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self._peak = peak_flops(group.device)
        self._clear()

    def _clear(self) -> None:
        self._buckets = torch.zeros(2, BUCKETS, dtype=torch.float64, device=self._group.device)  # sums, counts
        self._tokens = self._flops = self._waited_s = self._norm = 0.0
        self._steps = 0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time within the context as waiting for data."""
        before = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - before

    def add(self, losses: Tensor, weights: Tensor, sigmas: Tensor, tokens: int, forward_flops: float) -> None:
        """Count a micro-batch.

        losses: [batch], each multiplied by the sample's weight. weights: [batch]. sigmas: [batch], noise levels.
        """
        bucket = (sigmas * BUCKETS).long().clamp(0, BUCKETS - 1)
        self._buckets[0].index_add_(0, bucket, losses.double())
        self._buckets[1].index_add_(0, bucket, weights.double())
        self._tokens += tokens
        self._flops += 3 * forward_flops  # a backward pass costs two forward passes

    def step(self, norm: float) -> None:
        """Count an optimizer step. norm: of the gradient, before clipping."""
        self._norm += norm
        self._steps += 1

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave the time within the context out of the speed, such as the time of sampling."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """The metrics over all workers since the last call. Every worker calls it.

        loss: mean over samples; loss/sigma_LOW_HIGH: mean over samples with noise levels in that range.
        grad_norm: mean norm of the gradient before clipping.
        step_s: seconds of a step.
        data_wait: share of the time spent waiting for data.
        tokens_per_s: tokens a second.
        tflops_per_s: the model's TFLOPs a second, attention and backward pass included, recomputation not.
        mfu: those FLOPs as a share of the devices' peak, where the peak is known.
        """
        seconds = time.perf_counter() - self._since
        own = torch.tensor([self._tokens, self._flops, self._waited_s / seconds], dtype=torch.float64)
        total = self._group.sum(torch.cat([self._buckets.flatten(), own.to(self._group.device)])).tolist()
        sums, counts = total[:BUCKETS], total[BUCKETS : 2 * BUCKETS]
        tokens, flops, waited = total[2 * BUCKETS :]
        values = {
            "loss": sum(sums) / max(sum(counts), 1),
            "grad_norm": self._norm / max(self._steps, 1),
            "step_s": seconds / max(self._steps, 1),
            "data_wait": waited / self._group.size,
            "tokens_per_s": tokens / seconds,
            "tflops_per_s": flops / seconds / 1e12,
        }
        for bucket in range(BUCKETS):
            if counts[bucket]:
                low, high = bucket / BUCKETS, (bucket + 1) / BUCKETS
                values[f"loss/sigma_{low:.2f}_{high:.2f}"] = sums[bucket] / counts[bucket]
        if self._peak is not None:
            values["mfu"] = flops / seconds / (self._peak * self._group.size)
        self._clear()
        return values

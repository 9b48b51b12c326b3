"""Sequence parallelism: several workers share the visual tokens of a sample (DeepSpeed-Ulysses, Jacobs et al. 2023).

Each worker has an even part of every frame's tokens. Other tokens are few, and each worker has all of them. For the
attention, workers exchange tokens for heads. Each then has all tokens of its heads, and the mask is that of one worker.
After the attention they change back.

Each worker computes the same loss of the whole sample. The gradient of a parameter is then the mean over the workers of
what their backward passes give.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_gather_single, all_to_all_single


@dataclass(frozen=True)
class SequenceGroup:
    """The workers that share a sample, seen from one of them."""

    group: ProcessGroup
    rank: int
    """This worker's number, 0 to size - 1."""
    size: int
    """Number of workers."""

    def own_tokens(self, tokens: Tensor, frames: int) -> Tensor:
        """This worker's part of every frame: [batch, frames x tokens of a frame, ...] to [batch, frames x own tokens of
        a frame, ...]."""
        by_frame = tokens.unflatten(1, (frames, self.size, -1))
        return by_frame[:, :, self.rank].flatten(1, 2)

    def all_tokens(self, own: Tensor, frames: int) -> Tensor:
        """The reverse of `own_tokens`, on every worker."""
        gathered = all_gather_single(own.contiguous(), 0, self.group).unflatten(0, (self.size, -1))
        # worker, batch, frame, tokens -> batch, frame, worker, tokens
        return gathered.unflatten(2, (frames, -1)).movedim(0, 2).flatten(1, 3)

    def tokens_to_heads(self, x: Tensor, frames: int) -> Tensor:
        """[batch, heads, own tokens, head_dim] of every worker to [batch, own heads, all tokens, head_dim]."""
        to_workers = x.unflatten(1, (self.size, -1)).movedim(1, 0).contiguous()
        from_workers = all_to_all_single(to_workers, None, None, self.group)
        # worker, batch, head, frame, tokens -> batch, head, frame, worker, tokens
        return from_workers.unflatten(3, (frames, -1)).movedim(0, 3).flatten(2, 4)

    def heads_to_tokens(self, x: Tensor, frames: int) -> Tensor:
        """The reverse of `tokens_to_heads`."""
        by_worker = x.unflatten(2, (frames, self.size, -1)).movedim(3, 0).flatten(3, 4).contiguous()
        return all_to_all_single(by_worker, None, None, self.group).movedim(0, 1).flatten(1, 2)

    def own_heads(self, x: Tensor) -> Tensor:
        """This worker's heads of tokens that every worker has: [batch, heads, tokens, head_dim]."""
        return x.unflatten(1, (self.size, -1))[:, self.rank]

    def all_heads(self, own: Tensor) -> Tensor:
        """The reverse of `own_heads`, on every worker."""
        gathered = all_gather_single(own.contiguous(), 0, self.group).unflatten(0, (self.size, -1))
        return gathered.movedim(0, 1).flatten(1, 2)

"""Physical state supervision: the masked sound, and the loss."""

import numpy as np
import pytest
import torch

from tasks.stages.pose.keypoints import PARTS, encode
from training.models.physavatar.physical_state_loss import (
    StateProjector,
    mask_sound,
    parts_present,
    physical_state_loss,
    states_by_latent,
)


def test_the_share_of_masked_sound_is_uniform_up_to_what_the_noise_leaves() -> None:
    """Algorithm 1: floor(f p) frames with p ~ U(0, 1 - sigma)."""
    frames, count = 21, 20_000
    for sigma in (0.0, 0.5, 0.9):
        masked = mask_sound(torch.full((count,), sigma), frames, torch.Generator().manual_seed(0))
        numbers = masked.sum(1).float()
        most = frames * (1 - sigma)
        expected = torch.linspace(0, most, 100_001)[:-1].floor()
        assert numbers.mean().item() == pytest.approx(expected.mean().item(), rel=0.03)
        for share in (0.25, 0.5, 0.75):
            assert abs(numbers.quantile(share) - expected.quantile(share)) <= 1
        assert numbers.max() == expected.max()
        # each frame is masked as often as any other
        assert masked.float().mean(0).sub(masked.float().mean()).abs().max() < 0.02
    assert not mask_sound(torch.ones(50), frames, torch.Generator().manual_seed(0)).any()


def test_the_first_frames_state_counts_four_times() -> None:
    states = torch.arange(81.0)[None, :, None]
    by_latent = states_by_latent(states)
    assert by_latent.shape == (1, 21, 4, 1)  # 84 in all
    assert by_latent[0, :3, :, 0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert by_latent[0, -1, -1, 0] == 80
    with pytest.raises(ValueError, match="states of 80 frames; latents are of 4n"):
        states_by_latent(states[:, :80])


def test_only_masked_frames_are_learnt() -> None:
    hidden = torch.randn(2, 3, 4, 5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    projector = StateProjector(8, dim=6)
    predicted, states = projector(hidden), torch.zeros(2, 3, 4, 6)
    assert predicted.shape == states.shape
    masked = torch.tensor([[False, True, False], [False, False, False]])
    loss = physical_state_loss(predicted, states, masked)
    assert loss[0].item() == pytest.approx(predicted[0, 1].square().mean().item(), rel=1e-5)
    assert loss[1] == 0
    loss.sum().backward()
    assert hidden.grad is not None
    reached = hidden.grad.abs().amax((2, 3, 4)) > 0
    assert torch.equal(reached, masked)


def test_a_part_that_was_not_seen_is_not_learnt() -> None:
    """4 parts with 2 numbers each, in 2 latent frames. The first latent frame is masked."""
    states = torch.ones(3, 2, 4, 8)
    states[0, 0, :3, 6:] = 0  # the right hand is seen in one of the four frames
    states[1] = 0  # nobody is seen
    present = parts_present(states)
    assert present.shape == (3, 2, 4, 4) and present[0, 0].sum() == 13 and not present[1].any() and present[2].all()
    predicted = torch.zeros(3, 2, 4, 8, requires_grad=True)
    with torch.no_grad():
        predicted[:, 0, :, :6] = 3.0  # off by 2
        predicted[:, 0, :, 6:] = 5.0  # off by 4
        predicted[:, 1] = 100.0
    masked = torch.tensor([[True, False]] * 3)
    loss = physical_state_loss(predicted, states, masked, present)
    # 12 parts are off by 2. The right hand is off by 4 once, or four times where it is always seen.
    torch.testing.assert_close(loss, torch.tensor([(12 * 4 + 16) / 13, 0.0, (12 * 4 + 4 * 16) / 16]))
    loss.sum().backward()
    assert predicted.grad is not None
    learnt = predicted.grad.unflatten(-1, (4, 2)) != 0
    assert torch.equal(learnt, (present & masked[:, :, None, None])[..., None].expand_as(learnt))
    everywhere = torch.ones_like(present)
    assert torch.equal(
        physical_state_loss(predicted, states, masked), physical_state_loss(predicted, states, masked, everywhere)
    )


def test_what_the_pose_stage_did_not_see_is_not_present() -> None:
    seen = {part: np.full((5, len(names), 3), 0.5, np.float32) for part, names in PARTS.items()}
    seen["left_hand"][2:4] = np.nan
    present = parts_present(torch.from_numpy(encode(seen)))
    assert present.shape == (5, 4) and present.sum() == 18
    assert not present[2:4, list(PARTS).index("left_hand")].any()


def test_states_are_learnt_from_what_a_block_knows() -> None:
    torch.manual_seed(0)
    hidden, states = torch.randn(8, 3, 2, 2, 16), torch.randn(8, 3, 4, 5)
    projector = StateProjector(16, dim=5)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2)
    masked = torch.ones(8, 3, dtype=torch.bool)
    losses = []
    for _ in range(150):
        loss = physical_state_loss(projector(hidden), states, masked).mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]

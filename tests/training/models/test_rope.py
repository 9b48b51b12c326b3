"""The rotary position embedding is Wan's."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.models.active_mind import rope


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_head_of_128_is_split_as_wan_splits_it() -> None:
    assert rope.axis_split(128) == (44, 42, 42)
    assert rope.axis_split(32) == (12, 10, 10)


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from([8, 32, 128]),
    at=st.lists(st.tuples(*[st.floats(-50, 50)] * 3), min_size=2, max_size=2),
    shift=st.tuples(*[st.floats(-50, 50)] * 3),
)
def test_only_the_distance_between_two_tokens_counts(
    size: int, at: list[tuple[float, float, float]], shift: tuple[float, float, float]
) -> None:
    query, key = normal(1, 1, 1, size, seed=1), normal(1, 1, 1, size, seed=2)

    def product(by: Tensor) -> Tensor:
        turned = [
            rope.apply_rope(x, *rope.rope_cos_sin((torch.tensor(where, dtype=torch.float64) + by)[None, None], size))
            for x, where in zip((query, key), at, strict=True)
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(torch.tensor(shift)), product(torch.zeros(3)), atol=1e-3, rtol=1e-4)


def test_rotations_are_wans() -> None:
    """The whole table, against the published formula in complex float64 numbers."""
    tables = []
    for size in (44, 42, 42):
        frequency = 1.0 / 10000.0 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        tables.append(torch.polar(torch.ones(8, size // 2).double(), torch.outer(torch.arange(8).double(), frequency)))
    turn = torch.cat(
        [
            tables[0][:2].view(2, 1, 1, -1).expand(2, 3, 4, -1),
            tables[1][:3].view(1, 3, 1, -1).expand(2, 3, 4, -1),
            tables[2][:4].view(1, 1, 4, -1).expand(2, 3, 4, -1),
        ],
        -1,
    ).reshape(1, 24, 1, 64)
    x = normal(1, 24, 2, 128)
    expected = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(3)
    positions = rope.grid_positions(torch.arange(2), 3, 4)
    torch.testing.assert_close(
        rope.apply_rope(x, *rope.rope_cos_sin(positions, 128)).double(), expected, atol=1e-5, rtol=1e-5
    )

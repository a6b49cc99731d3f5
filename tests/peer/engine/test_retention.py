"""What a kept graph costs."""

from __future__ import annotations

import torch

from peer.engine.retention import Retention, measure_saved


def test_each_storage_is_counted_once_and_weights_not_at_all() -> None:
    """Oracle: by hand: x (saved twice by its square, once more through a view) and the product, not the weight."""
    inputs = torch.ones(16, 4, requires_grad=True)
    weight = torch.ones(4, 4, requires_grad=True)
    with measure_saved(besides=[weight]) as saved:
        product = (inputs * inputs) @ weight  # saves inputs, and the square as the weight's factor
        product.exp()  # saves its result
        inputs[:8].square()  # a view of what is counted
    assert saved.total == 3 * 16 * 4 * 4


def test_measured_shapes_are_booked_against_the_budget() -> None:
    """Oracle: 250 bytes hold two graphs of 100; another shape is tried while anything is left."""
    retention = Retention(250)
    assert [retention.keep((1, 2), 100) for _ in range(3)] == [100, 100, None]
    assert retention.kept_bytes == 200
    assert not retention.may_keep((1, 2))
    assert retention.may_keep((9, 9))
    retention.release(100)
    assert retention.may_keep((1, 2))
    assert not Retention(0).may_keep((1, 2))

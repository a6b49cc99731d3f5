"""Parameters as views into flat buffers, and graphs that outlive them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peer.model.blocks import Block, named_views, view_of
from protocol.layout import BlockKind, BlockLayout, TensorSlot

LAYOUT = BlockLayout("layer.0", BlockKind.LAYER, (TensorSlot("a", (10, 30), 0), TensorSlot("b", (5,), 512)), 512, 768)
SQUARE = BlockLayout("layer.1", BlockKind.LAYER, (TensorSlot("w", (4, 4), 0), TensorSlot("v", (4, 4), 256)), 512, 512)


def flat(layout: BlockLayout) -> Tensor:
    return torch.zeros(layout.num_elements)


@pytest.fixture
def block() -> Block:
    return Block(LAYOUT, torch.device("cpu"))


def test_parameters_share_memory_with_the_flat_buffers(block: Block) -> None:
    """Oracle: what is written through a parameter is found at the slot's offset."""
    weights, gradient = flat(LAYOUT), flat(LAYOUT)
    block.bind(weights, gradient)
    block.parameters["a"].data[1, 2] = 3.0
    assert block.parameters["b"].grad is not None
    block.parameters["b"].grad[4] = 5.0
    assert weights.nonzero().flatten().tolist() == [32]
    assert gradient.nonzero().flatten().tolist() == [516]
    assert view_of(LAYOUT.slots[0], weights)[1, 2] == 3.0
    assert named_views(LAYOUT, gradient)["b"].tolist() == [0, 0, 0, 0, 5]


def test_a_block_computes_with_the_buffers_that_it_was_bound_to_last(block: Block) -> None:
    """Oracle: the gradient of a sum is one, in the second buffer's tensors alone; the first one keeps what it held."""
    before, after = (flat(LAYOUT), flat(LAYOUT)), (flat(LAYOUT), flat(LAYOUT))
    block.bind(*before)
    before[0].fill_(7.0)
    block.bind(*after)
    total = block.parameters["a"].sum() + block.parameters["b"].sum()
    torch.autograd.backward([total])
    assert total == 0.0
    assert not before[1].any()
    assert float(after[1].sum()) == 305
    assert not any(after[1][start:end].any() for start, end in LAYOUT.padding())
    block.bind(after[0], None)
    assert all(parameter.grad is None for parameter in block.parameters.values())


def test_gradients_add_up_in_the_buffer_and_never_replace_it(block: Block) -> None:
    """Oracle: two backward passes, and the address; autograd replaces `.grad` when it may."""
    gradient = flat(LAYOUT)
    block.bind(flat(LAYOUT), gradient)
    for _ in range(2):
        torch.autograd.backward([block.parameters["a"].sum()])
    assert gradient[:300].tolist() == [2.0] * 300
    grad = block.parameters["a"].grad
    assert grad is not None
    assert grad.data_ptr() == gradient.data_ptr()


def test_each_storage_is_counted_once_and_weights_not_at_all() -> None:
    """Oracle: by hand: x (saved twice by its square, once more through a view) and the product, not the weight."""
    block = Block(SQUARE, torch.device("cpu"))
    block.bind(torch.ones(SQUARE.num_elements), flat(SQUARE))
    inputs = torch.ones(16, 4, requires_grad=True)
    with block.saving() as saved:
        product = (inputs * inputs) @ block.parameters["w"]  # saves inputs, and the square as the weight's factor
        product.exp()  # saves its result
        inputs[:8].square()  # a view of what is counted
    assert saved.num_bytes == 3 * 16 * 4 * 4


@pytest.mark.parametrize("offset", [0, 1024])
def test_a_graph_goes_backward_after_its_weights_have_moved(offset: int) -> None:
    """Oracle: autograd with tensors of its own. The old buffer serves others meanwhile, the new one begins elsewhere in
    its storage, as a slot's does."""
    generator = torch.Generator().manual_seed(0)
    weights, inputs = torch.randn(SQUARE.num_elements, generator=generator), torch.randn(3, 4, generator=generator)
    expected_x = inputs.clone().requires_grad_()
    own = {name: view.clone().requires_grad_() for name, view in named_views(SQUARE, weights).items()}
    torch.autograd.backward([((expected_x @ own["w"]).tanh() @ own["v"].T).square().sum()])

    block = Block(SQUARE, torch.device("cpu"))
    slot = weights.clone()
    block.bind(slot, None)
    entered = inputs.clone().requires_grad_()
    with block.saving():
        outputs = ((entered @ block.parameters["w"]).tanh() @ block.parameters["v"].T).square().sum()
    slot.fill_(float("nan"))
    other, gradient = torch.full((offset + SQUARE.num_elements,), float("nan")), flat(SQUARE)
    other[offset:] = weights
    block.bind(other[offset:], gradient)
    torch.autograd.backward([outputs])
    assert entered.grad is not None
    assert expected_x.grad is not None
    assert torch.equal(entered.grad, expected_x.grad)
    for name, view in named_views(SQUARE, gradient).items():
        theirs = own[name].grad
        assert theirs is not None
        assert torch.equal(view, theirs)

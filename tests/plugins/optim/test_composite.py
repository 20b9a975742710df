"""`Composite` makes one optimizer of several."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import net

from drivetrain.testing.digests import decode, encode
from drivetrain_plugins.optim._composite import Composite


def made(model):
    """Return one optimizer over two with different states, the first with two groups."""
    first = torch.optim.SGD(
        [{"params": [model.first.weight]}, {"params": [model.first.bias], "lr": 0.5}], lr=0.1, momentum=0.9
    )
    rest = [model.norm.weight, model.norm.bias, model.last.weight, model.last.bias]
    return Composite([first, torch.optim.AdamW(rest, lr=0.01)])


def put_gradients(model, step):
    draws = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draws)


def test_groups_are_the_inner_ones():
    """A rate written into a group is the rate of the inner step, before and after loading."""
    model = net()
    optimizer = made(model)
    groups = optimizer.param_groups
    for loaded in (False, True):
        if loaded:
            optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups is groups
        inner = [group for one in optimizer.optimizers for group in one.param_groups]
        assert [id(group) for group in groups] == [id(group) for group in inner]
        groups[1]["lr"] = 0.0
        put_gradients(model, 0)
        before = model.first.bias.detach().clone()
        optimizer.step()
        assert torch.equal(model.first.bias, before)


def test_state_is_a_view_of_the_inner_ones():
    """What is read at a parameter is its optimizer's, nothing is made by asking, and what is written arrives."""
    model = net()
    optimizer = made(model)
    weight, other = model.first.weight, model.last.weight
    assert optimizer.state.get(weight, "none") == "none"
    assert weight not in optimizer.state
    assert len(optimizer.state) == 0
    put_gradients(model, 0)
    optimizer.step()
    assert set(optimizer.state) == set(model.parameters())
    assert set(optimizer.state[weight]) == {"momentum_buffer"}
    assert optimizer.state[other] is optimizer.optimizers[1].state[other]
    optimizer.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}
    assert not optimizer.optimizers[0].state[weight]["momentum_buffer"].any()
    del optimizer.state[weight]
    assert weight not in optimizer.optimizers[0].state


def test_state_dict_is_in_torchs_form_and_resumes():
    """Parameters are numbered over all groups, as in one optimizer of torch, and a loaded one goes on bit for bit."""
    straight, stopped, resumed = net(), net(), net()
    one, two = made(straight), made(stopped)
    for step in range(6):
        put_gradients(straight, step)
        one.step()
        if step < 3:
            put_gradients(stopped, step)
            two.step()
    saved = two.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1], [2, 3, 4, 5]]
    assert sorted(saved["state"]) == [0, 1, 2, 3, 4, 5]
    text, tensors = encode({**saved, "state": {str(k): v for k, v in saved["state"].items()}})
    loaded = decode(text, tensors)
    three = made(resumed)
    resumed.load_state_dict(stopped.state_dict())
    three.load_state_dict({**loaded, "state": {int(k): v for k, v in loaded["state"].items()}})
    for step in range(3, 6):
        put_gradients(resumed, step)
        three.step()
    for left, right in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_closure_is_called_once_with_gradients_on():
    """It is not for each of them to evaluate the loss."""
    model, calls = net(), []

    def closure():
        calls.append(torch.is_grad_enabled())
        put_gradients(model, 0)
        return 1.5

    assert made(model).step(closure) == 1.5
    assert calls == [True]


def test_zero_grad_reaches_every_parameter():
    """Gradients of all optimizers are dropped."""
    model = net()
    put_gradients(model, 0)
    made(model).zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_groups_come_from_one_of_them():
    """A group that no optimizer has would never be updated, and is refused; one that it got is taken in."""
    model = net()
    first = torch.optim.SGD([model.first.weight], lr=0.1)
    optimizer = Composite([first, torch.optim.AdamW([model.last.weight])])
    with pytest.raises(ValueError, match="add the group to one of"):
        optimizer.add_param_group({"params": [model.last.bias]})
    first.add_param_group({"params": [model.first.bias]})
    optimizer.add_param_group(first.param_groups[1])
    put_gradients(model, 0)
    before = model.first.bias.detach().clone()
    optimizer.step()
    assert not torch.equal(model.first.bias, before)
    assert model.first.bias not in optimizer.state  # SGD without momentum keeps nothing
    assert optimizer.state.get(model.first.bias) is None


def test_one_parameter_has_one_optimizer():
    """Two that would update one parameter are refused by torch."""
    model = net()
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        Composite([torch.optim.SGD([model.first.weight]), torch.optim.AdamW([model.first.weight])])


def test_saved_groups_of_another_size_are_refused():
    """A state of other groups is refused before anything is loaded."""
    optimizer = made(net())
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="of another number or size"):
        optimizer.load_state_dict({**saved, "param_groups": saved["param_groups"][:2]})

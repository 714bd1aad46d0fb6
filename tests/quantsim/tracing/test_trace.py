"""Control flow on sizes: decided by an example, guarded, and refused where the batch or values decide."""

from __future__ import annotations

import functools
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnre_exp import QuantScheme, UserError, bypassed, fold_batch_norms, load_folded, quantize, save_folded, sim_report
from tests.networks import Net, randomize

FLOAT = QuantScheme(weight_bits=None, act_bits=None)
X = torch.randn(4, 3, 12, 12)


def conv_bn(**more):
    return {"conv": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3), **more}


def branch(m, x):
    y = m.bn(m.conv(x))
    return F.avg_pool2d(y, 2) if y.shape[2] > 8 and y.shape[-2:] == (12, 12) else y


def loops(m, x):
    y = m.bn(m.conv(x))
    rows = [y[:, :, i] for i in range(y.shape[2] // 4)]
    assert y.shape[1] == 3
    return torch.stack(rows).sum(0) * len(rows) * len(y.shape)


def python_numbers(m, x):
    height, width = x.size()[2:]
    pad = max(math.ceil(height / 5) * 5 - height, 0)
    x = F.pad(x, (0, int(width * 0.25), 0, pad))
    return m.bn(m.conv(x))


def parts(m, x):
    return sum(part.mean(1) for part in m.bn(m.conv(x)).chunk(3, dim=2))


def as_many_as_columns(m, x):
    y = m.bn(m.conv(x))
    return y * torch.linspace(0, 1, y.shape[3])


@pytest.mark.parametrize("forward", [branch, loops, python_numbers])
def test_sizes_decide_and_other_sizes_are_refused(forward, tmp_path):
    model = randomize(Net(forward, **conv_bn())).eval()
    sim = quantize(model, X, FLOAT)
    folded, report = fold_batch_norms(sim)
    assert report.folded == (("conv", "bn"),)
    for network in (sim, folded):
        for batch in (1, 2, 7):
            x = torch.randn(batch, 3, 12, 12)
            torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-4)
    assert any("decided by the input's size: " in note and "test_trace.py:" in note for note in sim_report(sim).notes)
    with pytest.raises(UserError, match=r"takes another course.*test_trace.py:.*with an example of the size"):
        sim(torch.randn(2, 3, 6, 6))
    save_folded(folded, tmp_path / "net")
    loaded = load_folded(tmp_path / "net")
    assert torch.equal(loaded(X), folded(X))
    with pytest.raises(UserError, match="takes another course"):
        loaded(torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize("forward", [parts, as_many_as_columns])
def test_without_a_decision_any_size_is_taken(forward):
    model = randomize(Net(forward, **conv_bn())).eval()
    sim, x = quantize(model, X, FLOAT), torch.randn(2, 3, 30, 9)
    assert not sim_report(sim).notes
    torch.testing.assert_close(sim(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_kind_of_device_is_a_plain_string():
    def forward(m, x):
        with torch.autocast(device_type=x.device.type, enabled=False):
            return m.bn(m.conv(x))

    sim = quantize(randomize(Net(forward, **conv_bn())).eval(), X, FLOAT)
    assert not sim_report(sim).notes and sim(torch.randn(1, 3, 5, 5)).shape == (1, 3, 5, 5)


def test_a_type_that_is_a_key_may_change():
    """A network remembers its grid by size and type; the graph makes it anew, in the type that it then has."""
    grid = functools.lru_cache(lambda size, dtype: torch.arange(size).to(dtype))
    model = randomize(Net(lambda m, x: m.bn(m.conv(x)) + grid(x.shape[3], x.dtype), **conv_bn())).eval()
    model(X)  # whose grid is remembered
    sim = quantize(model, X, FLOAT)
    assert torch.allclose(sim(X), model(X), atol=1e-5)
    assert torch.allclose(sim.double()(X.double()), model.double()(X.double()))


def test_the_number_of_axes_and_the_type_are_no_decision_on_size():
    def forward(m, x):
        return m.bn(m.conv(x)) if x.dim() == 4 and x.dtype != torch.float16 and not x.is_cuda else x

    sim = quantize(randomize(Net(forward, **conv_bn())).eval(), X, FLOAT)
    assert not sim_report(sim).notes and sim(torch.randn(1, 3, 5, 5)).shape == (1, 3, 5, 5)


@pytest.mark.parametrize(
    "condition", [lambda x: x.shape[0] == 1, lambda x: x.size(0) > 4, lambda x: len(x) > 1, lambda x: x.numel() > 600]
)
def test_control_flow_on_the_batch_size_is_refused(condition):
    model = Net(lambda m, x: m.bn(m.conv(x)) * (2 if condition(x) else 1), **conv_bn())
    with pytest.raises(UserError, match=r"depends on the batch size|len\(\) asks for the batch size"):
        quantize(model, X)


@pytest.mark.parametrize("condition", [lambda x: x.mean() > 0, lambda x: int(x.argmax()) > 3, lambda x: x[0, 0, 0, 0]])
def test_control_flow_on_values_is_refused(condition):
    model = Net(lambda m, x: m.bn(m.conv(x)) * (2 if condition(x) else 1), **conv_bn())
    with pytest.raises(UserError, match="depends on the values of tensors"):
        quantize(model, X)


@pytest.mark.parametrize(
    ("forward", "other"),
    [
        (lambda m, x: m.bn(m.conv(x)) * (2 if x.shape[0] > 16 else 1), (40, 3, 12, 12)),
        (lambda m, x: m.bn(m.conv(x)) * min(x.shape[0], 32), (40, 3, 12, 12)),
        (lambda m, x: m.bn(m.conv(x)) * (1 + int(x.shape[0] // 8)), (40, 3, 12, 12)),
        (lambda m, x: torch.cat([m.bn(part) for part in m.conv(x).split(128)]), (256, 3, 12, 12)),
        (lambda m, x: sum(m.bn(m.conv(x)).unbind(2)), (2, 3, 20, 12)),
        (lambda m, x: m.bn(m.conv(x)) * (2 if len(x[0][0]) > 16 else 1), (2, 3, 20, 12)),
        (lambda m, x: m.bn(m.conv(x)) * (2 if x.shape[2] in {20, 30} else 1), (2, 3, 20, 12)),
        (lambda m, x: m.bn(m.conv(x)) * {20: 2}.get(x.shape[2], 1), (2, 3, 20, 12)),
    ],
)
def test_whatever_was_decided_is_decided_again_at_every_call(forward, other):
    model = randomize(Net(forward, **conv_bn())).eval()
    folded, _ = fold_batch_norms(sim := quantize(model, X, FLOAT))
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-3)
    for network in (sim, folded):
        with pytest.raises(UserError, match="takes another course"):
            network(torch.randn(other))


def test_types_and_axes_are_decided_again_too():
    model = randomize(Net(lambda m, x: m.bn(m.conv(x)) * (2 if x.dtype == torch.float64 else 1), **conv_bn())).eval()
    with pytest.raises(UserError, match="takes another course"):
        quantize(model, X, FLOAT).double()(X.double())
    model = randomize(Net(lambda m, x: m.fc(x[None] if x.dim() == 2 else x).mean(1), fc=nn.Linear(3, 3))).eval()
    with pytest.raises(UserError, match="takes another course"):
        quantize(model, torch.randn(4, 5, 3), FLOAT)(torch.randn(4, 3))


def test_an_example_of_one_sample_will_do():
    sim = quantize(randomize(Net(branch, **conv_bn())).eval(), X[:1], FLOAT)
    assert sim(X).shape == (4, 3, 6, 6)


def test_decisions_behind_layers_with_state_leave_the_model_alone():
    model = randomize(Net(branch, **conv_bn())).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with bypassed(quantize(model, X)):
        pass
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()) and model.training


def any_arguments(m, x, *more, **named):
    assert not more and not named and not isinstance(x, dict)
    return m.bn(m.conv(x))


def asks_for_types(m, x):
    y = m.conv(x)
    is_one = isinstance(y, torch.Tensor) and torch.is_tensor(y) and not isinstance(y, (list, nn.Parameter))
    parts = y.chunk(3, dim=1)
    is_many = isinstance(parts, tuple) and isinstance(y.shape, (tuple, torch.Size)) and isinstance(y.shape[2], int)
    return m.bn(y) if is_one and is_many and isinstance(m.conv.weight, nn.Parameter) else y


def wrong_keyword(m, x):
    for layer in (m.conv, m.bn):
        try:
            x = layer(x, lengths=None)
        except TypeError:
            x = layer(x)
    return x


def conversions(m, x):
    size = torch.tensor([x.shape[2], 2.0]).to(x.dtype)
    return m.bn(m.conv(x)) + torch.as_tensor(torch.asarray(x)) * size.sum()


def assignments(m, x):
    y = m.bn(m.conv(x))
    z = y.clone()
    z[:, 1:] = y[:, 1:].sigmoid()
    z[..., 0] = 3
    return z + y


def nothing_to_join(m, x):
    nothing = torch.empty([x.shape[0], 0, x.shape[2], x.shape[3]], dtype=x.dtype, device=x.device)
    return m.bn(m.conv(torch.cat([x, nothing], 1)))


def checks_sizes(m, x):
    def check(condition):  # as Hugging Face's networks do
        condition = condition() if callable(condition) else condition
        torch._check(condition, lambda: "a size that is not this network's")

    check(x.shape[1] == 3)
    check(lambda: x.shape[2] == x.shape[3])
    torch._check_value(x.ndim == 4)
    return m.bn(m.conv(x)) if callable(m.conv) and not callable(x) else x


def limits_of_a_type(m, x):
    y = m.bn(m.conv(x))
    smallest = torch.full((), torch.finfo(y.dtype).min, dtype=y.dtype)
    return torch.where(y > 0, y, smallest).clamp(min=-torch.finfo(y.dtype).eps)


def named_results(m, x):
    y = m.bn(m.conv(x))
    largest = y.max(dim=1, keepdim=True)
    return y + largest.values + largest.indices + torch.sort(y, dim=1).values


def changed_for_all_who_have_it(m, x):
    y = m.bn(m.conv(x))
    z = y.clone()
    same, before, edge = z, z * 2, x.shape[2]
    z += y
    same *= 2
    z -= 1
    z /= edge
    edge += 1  # a number: x.shape[2] is as it was
    z.clamp_(-0.05, 0.05)
    z[:, 0] = edge
    return same + before * x.shape[2]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def function_with_a_gradient_of_its_own(m, x):
    return Doubled.apply(m.bn(m.conv(x)))


def decorated(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def features_as_a_list(m, x):
    return decorated(lambda features: features[0] + sum(features[1:]))([x, m.bn(m.conv(x))])


@pytest.mark.parametrize(
    "forward",
    [
        any_arguments, asks_for_types, wrong_keyword, conversions, assignments, nothing_to_join, checks_sizes,
        limits_of_a_type, named_results, function_with_a_gradient_of_its_own, features_as_a_list,
    ],
)  # fmt: skip
def test_what_people_write_is_followed(forward, tmp_path):
    model = randomize(Net(forward, **conv_bn())).eval()
    sim = quantize(model, X, FLOAT)
    folded, report = fold_batch_norms(sim)
    assert report.folded == (("conv", "bn"),)
    save_folded(folded, tmp_path / "folded")
    for network in (sim, folded, load_folded(tmp_path / "folded")):
        for batch in (1, 2, 7):
            x = torch.randn(batch, 3, 12, 12)
            torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-4)


def of_class(forward):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    Own.forward = forward
    return randomize(Own()).eval()


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x, *args, **kwargs: any_arguments(self, x, *args, **kwargs),
        lambda self, *args: self.bn(self.conv(args[0])),
        decorated(lambda self, x, scale=1.0, *, mask=None: self.bn(self.conv(x)) * scale),
        torch.no_grad()(lambda self, input, flag=False: self.bn(self.conv(input)) if not flag else input),
    ],
)
def test_forwards_of_every_signature(forward):
    model = of_class(forward)
    sim = quantize(model, X, FLOAT)
    assert len(sim.graph.find_nodes(op="placeholder")) == 1
    torch.testing.assert_close(sim(X), model(X), rtol=1e-4, atol=1e-4)


def test_a_forward_that_an_instance_was_given_is_the_one_that_counts():
    model = of_class(lambda self, x: self.bn(self.conv(x)))
    model.forward = types.MethodType(lambda self, x: self.bn(self.conv(x)) + 1, model)
    sim = quantize(model, X, FLOAT)
    torch.testing.assert_close(sim(X), model(X), rtol=1e-4, atol=1e-4)


def test_torch_and_python_are_as_before_after_a_tracing_that_failed():
    before = isinstance, torch.as_tensor, torch.tensor, torch.asarray
    with pytest.raises(UserError, match="depends on the values"):
        quantize(of_class(lambda self, x: self.conv(x) if torch.as_tensor(x).sum() > 0 else x), X, FLOAT)
    assert (isinstance, torch.as_tensor, torch.tensor, torch.asarray) == before


def test_many_branches_take_no_more_time_than_they_have_nodes():
    """A question about a value far down a network with 2**60 paths through it."""

    def forward(m, x):
        y = m.bn(m.conv(x))
        for _ in range(60):
            y = y + y.relu()
        return y.chunk(3, dim=1)[0] * len(y.chunk(3, dim=1))

    sim = quantize(Net(forward, **conv_bn()).eval(), X, FLOAT)
    assert sim(X).shape == (4, 1, 12, 12)


def test_a_conv_whose_padding_was_set_later_is_saved(tmp_path):
    model = randomize(Net(lambda m, x: m.bn(m.conv(x)), **conv_bn())).eval()
    model.conv.padding, model.conv.dilation = (2, 2), (2, 2)
    folded, _ = fold_batch_norms(quantize(model, X, QuantScheme(4, None)))
    save_folded(folded, tmp_path / "folded")
    assert torch.equal(load_folded(tmp_path / "folded")(X), folded(X))


class Anchors(nn.Module):
    """Makes its grid anew where the size of the input is another than the last one, as detection heads do."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.seen = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), None
        self.weight_shape = self.conv.weight.shape  # a size that no input decides

    def forward(self, x):
        y = self.bn(self.conv(x)) * (self.weight_shape[0] / 3)
        if self.seen != y.shape:
            self.grid, self.seen = torch.arange(float(y.shape[3])), y.shape
        return y + self.grid


def test_sizes_of_inputs_that_a_network_has_seen_are_forgotten():
    model = randomize(Anchors()).eval()
    with torch.no_grad():
        model(torch.randn(7, 3, 12, 12))
    seen = model.seen
    sim = quantize(model, X, FLOAT)
    assert model.seen == seen
    for batch in (1, 4, 7):
        x = torch.randn(batch, 3, 12, 12)
        torch.testing.assert_close(sim(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_network_that_changes_its_input_is_compared_as_it_is_called():
    """The networks are given the same values one after the other; the first must not change those of the second."""
    model = randomize(Net(lambda m, x: m.bn(m.conv(x.sigmoid_())), **conv_bn())).eval()
    sim = quantize(model, X.clone(), FLOAT)
    assert torch.equal(sim(X.clone()), model(X.clone()))


class MovesItsBuffer(nn.Module):
    """Puts a buffer in its own place at every call, as networks do that follow their input's device."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.branches = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), branches
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.scale = self.scale.to(x.device)
        return (y * 1.5 if self.branches and y.ndim == 4 else y) * self.scale


def sizes_put_into_a_tensor(m, y, x):
    shape = torch.empty(2, device=y.device, dtype=torch.int64)
    shape[0], shape[1] = y.shape[2:]
    if shape.prod() != y.shape[2] * y.shape[3]:
        raise ValueError("the sizes are not those of the image")
    return y * shape[1]


def values_put_into_a_tensor(m, y, x):
    table = torch.zeros(3, 1, 1)
    table[0] = x.mean()
    table[1:].fill_(2)
    table.mul_(y.max())
    return y * table


def value_asked_back(m, y, x):
    size = torch.zeros(1, device=y.device)
    size.fill_(y.shape[2])
    return y * 2 if size.sum() == y.shape[2] else y


MAKING = {
    "sizes put into a tensor": sizes_put_into_a_tensor,
    "values put into a tensor": values_put_into_a_tensor,
    "a value asked back": value_asked_back,
    "zeros of single sizes": lambda m, y, x: y + torch.zeros(x.shape[0], 3, x.shape[2], x.shape[3]),
    "ones of single sizes": lambda m, y, x: y * torch.ones(x.shape[0], 3, 1, 1),
    "full": lambda m, y, x: y * torch.full((x.shape[0], 1, 1, 1), 2.0),
    "zero_": lambda m, y, x: torch.empty_like(y).zero_() + y,
    "fill_": lambda m, y, x: torch.empty_like(y).fill_(2.0) * y,
    "copy_": lambda m, y, x: torch.zeros_like(y).copy_(y.mean((2, 3), keepdim=True)) * y,
    "uniform_": lambda m, y, x: torch.empty_like(y).uniform_(0, 1) + y,
    "length of a batch": lambda m, y, x: y.reshape(len(x), -1),
    "length as a number": lambda m, y, x: y * len(x[0][0]),
    "length of an axis": lambda m, y, x: torch.stack([y[:, i] for i in range(len(x[0]))]).sum(0),
    "random numbers": lambda m, y, x: y + torch.randn(3, 1, 1),
    "random numbers of a batch": lambda m, y, x: y + torch.rand(x.shape[0], 3, 1, 1),
    "random numbers like others": lambda m, y, x: y + torch.randn_like(y),
}


def outputs_of(network, x):
    torch.manual_seed(0)
    return network(x)


@pytest.mark.parametrize("what", [*MAKING, "a buffer", "a buffer and a branch"])
def test_tensors_that_a_network_makes_itself(what, tmp_path):
    """Of batches of another size, too, and from a checkpoint."""
    if what in MAKING:
        model = Net(lambda m, x: MAKING[what](m, m.bn(m.conv(x)), x), **conv_bn())
    else:
        model = MovesItsBuffer(what != "a buffer")
    randomize(model).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sim = quantize(model, X, FLOAT)
    for x in (X, X[:1], torch.cat([X, X]), torch.rand(2, 3, 20, 12)):
        assert torch.allclose(outputs_of(sim, x), outputs_of(model, x), atol=1e-5)
    folded, report = fold_batch_norms(sim)
    save_folded(folded, tmp_path / "net")
    assert report.folded and torch.equal(outputs_of(load_folded(tmp_path / "net"), X), outputs_of(folded, X))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_changed_in_place_is_changed_for_all_who_have_it():
    """A size is a number, and is not. The network is not folded: its BN's output is changed."""
    model = randomize(Net(changed_for_all_who_have_it, **conv_bn())).eval()
    sim = quantize(model, X, FLOAT)
    for x in (X, X[:1], torch.cat([X, X])):
        assert torch.allclose(sim(x), model(x), atol=1e-5)


class Split(nn.Conv2d):
    """As octave convolutions do: two outputs, of which one may be None."""

    def forward(self, x):
        return super().forward(x).flip(1), None


def test_a_module_that_gives_none_among_others():
    def forward(m, x):
        high, low = m.split(x)
        return m.bn(high if low is None else high + low)

    model = randomize(Net(forward, split=Split(3, 3, 3), bn=nn.BatchNorm2d(3))).eval()
    sim = quantize(model, X, FLOAT)
    assert torch.allclose(sim(X), model(X), atol=1e-5)
    assert fold_batch_norms(sim)[1].kept == (("bn", "split gives several outputs and is kept whole"),)

"""Which BNs a fold can take in, read off autograd's record of one forward pass.

An independent count for checks of the fold: it runs the original network, knows nothing of torch.fx, and shares no
code with bnre_exp.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.ops import FrozenBatchNorm2d

PRODUCTS = ("ConvolutionBackward0", "AddmmBackward0", "MmBackward0")
VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "TransposeBackward0", "PermuteBackward0")


@dataclass(frozen=True)
class Foldable:
    """Names of BNs. after: conv or linear → BN, the BN being the only reader, perhaps through a reshape that puts the
    channels where the BN wants them (then ``through``, which is part of ``after``, holds it too); before: BN →
    depthwise conv without padding, the conv being the only reader."""

    after: frozenset[str]
    through: frozenset[str]
    before: frozenset[str]


def foldable_bns(model: nn.Module, *inputs: Any) -> Foldable:
    """The BNs of ``model`` (in evaluation mode) that can be folded exactly; the model is unchanged.

    inputs: tensors, or lists and dicts of tensors. A layer that is called several times counts only if the same BN
    follows each time, and a weight that anything else reads does not count.
    """
    model = copy.deepcopy(model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    read: dict[str, list[Any]] = defaultdict(list)
    inputs_of: dict[str, list[Tensor]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)) and module.running_mean is not None:

            def note(_: Any, args: Any, name: str = name) -> None:
                read[name].append(args[0].grad_fn)
                inputs_of[name].append(args[0])

            module.register_forward_pre_hook(note)
    with torch.enable_grad():  # clones: even a BN that reads the network's input then has a node to be read from
        output = model(*tree_map(_with_gradient, inputs))
    readers = _readers(output)
    after, through, before = set(), set(), set()
    for name, directly in read.items():
        sources = [_product(source, readers) for source in directly]
        if None not in sources:
            weights = {_weight(source) for source in sources}
            if directly != sources:
                if not all(_keeps_channels(x, weight) for x, weight in zip(inputs_of[name], map(_weight, sources))):
                    continue
                through.add(name)
            if len(weights) == 1 and None not in weights and set(_layers(*weights, readers)) <= set(sources):
                after.add(name)
    taken = {_product(source, readers) for name in after for source in read[name]}
    for name, sources in read.items():
        if name in after or len(sources) != 1 or sources[0] not in readers:
            continue
        following = [reader for reader in readers[sources[0]] if "BatchNorm" in reader.name()]
        users = readers[following[0]] if len(following) == 1 else []
        if len(users) == 1 and _is_depthwise_without_padding(users[0]) and users[0] not in taken:
            before.add(name)
    return Foldable(frozenset(after), frozenset(through & after), frozenset(before))


def _with_gradient(x: Any) -> Any:
    return x.detach().requires_grad_(x.is_floating_point()).clone() if isinstance(x, Tensor) else x


def _readers(output: Any) -> dict[Any, list[Any]]:
    """Every node of the graph behind ``output``, with the nodes that read its result, one entry a read."""
    readers: dict[Any, list[Any]] = {}
    queue = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    for node in queue:
        readers.setdefault(node, []).append(None)  # the caller reads it
    seen = set(queue)
    while queue:
        node = queue.pop()
        for source, _ in node.next_functions:
            if source is not None:
                readers.setdefault(source, []).append(node)
                if source not in seen:
                    seen.add(source)
                    queue.append(source)
    return readers


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, Sequence):
        for item in output:
            yield from _tensors(item)


def _product(node: Any, readers: Mapping[Any, list[Any]]) -> Any:
    """The conv or linear operation that ``node`` is, or is a view of, each of them with one reader; else None."""
    while node is not None and len(readers.get(node, ())) == 1:
        if node.name() in PRODUCTS:
            return node
        if node.name() not in VIEWS:
            return None
        node = node.next_functions[0][0]
    return None


def _keeps_channels(x: Tensor, weight: Any) -> bool:
    """Whether channel c of a BN's input depends on row c of the weight and on no other."""
    if weight is None or x.shape[1] != weight.variable.shape[0]:
        return False
    channel = x.shape[1] // 2
    (gradient,) = torch.autograd.grad(x[:, channel].square().sum(), weight.variable, retain_graph=True)
    rows = gradient.flatten(1).abs().sum(dim=1).nonzero().flatten().tolist()
    return rows == [channel]


def _weight(node: Any) -> Any:
    """The parameter's own node, or None if the weight was computed."""
    place = 1 if node.name() == "ConvolutionBackward0" else len(node.next_functions) - 1
    weight = node.next_functions[place][0]
    if weight is not None and weight.name() == "TBackward0":
        weight = weight.next_functions[0][0]
    return weight if weight is not None and weight.name().endswith("AccumulateGrad") else None


def _layers(weight: Any, readers: Mapping[Any, list[Any]]) -> Iterator[Any]:
    for reader in readers[weight]:
        if reader.name() == "TBackward0":
            yield from readers[reader]
        else:
            yield reader


def _is_depthwise_without_padding(node: Any) -> bool:
    if node is None or node.name() != "ConvolutionBackward0" or node._saved_transposed:
        return False
    weight = node._saved_weight
    return weight.shape[1] == 1 and node._saved_groups > 1 and not any(node._saved_padding)

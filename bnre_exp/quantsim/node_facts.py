"""What one forward pass tells about the nodes of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from bnre_exp.quantsim.nodes import is_identity, is_rearranging, module_of, source_of
from bnre_exp.quantsim.quantizers.layout import LAYERS
from bnre_exp.quantsim.tracing.subclasses import scales_with_weight
from bnre_exp.quantsim.tracing.tracer import resized
from bnre_exp.quantsim.tracing.words import reads_training

RESHAPING = {torch.reshape, "reshape", "view", "reshape_as", "view_as", "unflatten"}


def record(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Write into the ``meta`` of every node; nothing else changes.

    is_float: whether it gives floating-point tensors. is_single, ndim: whether it gives one tensor, of how many axes.
    is_empty: whether that tensor has no elements. is_constant: whether it depends on no input. is_identity: whether it
    hands on its input in evaluation mode.
    scales_with_weight: whether a layer computes with its weight as it is. channel_axis: where the output channels of a
    layer are, also after reshaping.
    """
    was_training = graph.training
    with torch.no_grad():  # two samples tell all, and one could hide where the batch goes
        _Recorder(graph.eval()).run(*(resized(x, 2) for x in inputs))
    graph.train(was_training)


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        given: Any = self.env.get(source_of(n))
        version = given._version if isinstance(given, Tensor) else None
        result = super().run_node(n)
        items = result if isinstance(result, (tuple, list)) else [result]
        n.meta["is_float"] = any(isinstance(x, Tensor) and x.is_floating_point() for x in items)
        n.meta["is_single"] = isinstance(result, Tensor)
        if isinstance(result, Tensor):
            n.meta["ndim"], n.meta["is_empty"] = result.dim(), result.numel() == 0
        reads = {source.meta.get("is_constant", False) for source in n.all_input_nodes}
        n.meta["is_constant"] = n.op == "get_attr" or (n.op.startswith("call_") and reads == {True})
        module = module_of(n)
        if module is not None and reads_training(type(module)) and next(module.parameters(), None) is None:
            unchanged = isinstance(given, Tensor) and given is result and given._version == version
            n.meta["is_identity"] = unchanged  # stochastic depth, say
        if isinstance(module, LAYERS):
            is_own = parametrize.type_before_parametrizations(module) in LAYERS
            is_simple_call = isinstance(given, Tensor) and len(n.args) == 1 and not n.kwargs
            n.meta["scales_with_weight"] = is_own or (is_simple_call and scales_with_weight(module, given))
        n.meta["channel_axis"] = self._channel_axis(n, module, result)
        return result

    def _channel_axis(self, node: fx.Node, module: Any, result: Any) -> int | None:
        if not isinstance(result, Tensor):
            return None
        if isinstance(module, nn.Linear):
            return result.dim() - 1
        if isinstance(module, LAYERS):
            spatial: tuple[int, ...] = module.kernel_size  # type: ignore[assignment]
            return 1 if result.dim() == len(spatial) + 2 else 0
        source = source_of(node)
        axis = source.meta.get("channel_axis") if isinstance(source, fx.Node) else None
        if is_identity(node):
            return axis
        if axis is None or not is_rearranging(node):
            return None
        given: Tensor = self.env[source]
        others = [size for place, size in enumerate(given.shape) if place != axis]
        if min(others, default=2) < 2 and node.target in RESHAPING:
            return None  # an axis of size 1 would hide where the values of a larger one go
        channels = torch.arange(given.shape[axis]).reshape(-1, *(1,) * (given.dim() - axis - 1)).expand(given.shape)
        labels = torch.empty_like(given, dtype=torch.long, device="cpu").copy_(channels)  # with the strides for view()
        try:
            moved = self._run_on(node, labels)
        except RuntimeError:  # view(dtype), say
            return None
        for place in range(moved.dim()):
            expected = torch.arange(moved.shape[place]).reshape(-1, *(1,) * (moved.dim() - place - 1))
            if moved.shape[place] == given.shape[axis] > 1 and torch.equal(moved, expected.expand(moved.shape)):
                return place
        return None

    def _run_on(self, node: fx.Node, value: Tensor) -> Tensor:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return getattr(self, node.op)(node.target, (value, *args[1:]), kwargs)  # type: ignore[no-any-return]

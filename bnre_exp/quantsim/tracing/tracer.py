"""torch.fx tracing that looks up sizes: control flow on the size of an image is decided by an example."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy, TraceError

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, LAYERS
from bnre_exp.quantsim.tracing.metadata import METADATA_METHODS, is_metadata
from bnre_exp.quantsim.tracing.proxies import TracedValue, assigned, computed_so_far, is_in_place, recorded

BATCH_SIZES = (1, 2, 5)  # a decision must be the same for all of them
LIBRARY = ("/torch/fx/", "/torch/nn/modules/module.py", "/bnre_exp/quantsim/")


class Tracer(fx.Tracer):
    """Traces a network; modules in ``leaves`` (names or class names), BNs and layers are not looked into.

    examples: the network's inputs, ``[N, ...]`` each. Whatever Python decided by the sizes of the examples is decided
    again, by :func:`check_decision`, whenever the graph runs. decisions: the source lines where sizes other than the
    number of axes decided.
    """

    def __init__(self, leaves: Sequence[str], examples: Sequence[Tensor], whole: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.leaves, self.whole = set(leaves), whole
        self.entered: list[str] = []
        self.decisions: dict[str, None] = {}
        self._checked: set[tuple[fx.Node, str]] = set()
        self._examples = [[resized(x, size) for x in examples] for size in BATCH_SIZES]
        self._values: list[dict[fx.Node, Any]] = [{} for _ in BATCH_SIZES]
        self.is_looking_up = False
        self._buffers: dict[str, Tensor] = {}
        self._remembering: dict[Any, int] | None = None
        self._changed: dict[int, tuple[Tensor, Proxy]] = {}  # by identity; tensors that the forward itself made

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if {module_qualified_name, type(m).__name__} & self.leaves:
            return True
        if isinstance(m, (*LAYERS, *BATCH_NORMS)) or super().is_leaf_module(m, module_qualified_name):
            return True
        return self.whole(m)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of ``root``, called with as many inputs as there are examples. What its forward puts in the place
        of a buffer (the same on another device, say) is forgotten at its end, and so is what functions remember that
        were called meanwhile (``functools.lru_cache``)."""
        self._buffers = dict(root.named_buffers(remove_duplicate=False))
        before = [(module._buffers, dict(module._buffers)) for module in root.modules()]
        try:
            with recorded(self):
                return super().trace(root, concrete_args)
        finally:
            for buffers, known in before:
                buffers.clear()
                buffers.update(known)
            for function, misses in (self._remembering or {}).items():
                if function.cache_info().misses != misses:
                    function.cache_clear()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """A placeholder an example, under the names that the network gives its arguments; all others keep their
        defaults. torch.fx's own way looks at the code of ``forward``, which may be within a decorator."""

        def forward(root: Any, *inputs: Any) -> Any:
            return root.forward(*inputs)

        count = len(self._examples[0])
        try:
            parameters = inspect.signature(self.root.forward).parameters.values()
        except (TypeError, ValueError):  # not every callable has a signature
            parameters = ()  # type: ignore[assignment]
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
        names += [f"input_{place}" for place in range(len(names), count)]
        return forward, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def create_arg(self, a: Any) -> Any:
        if id(a) in self._changed:
            a = self._changed[id(a)][1]
        return a.node if issubclass(type(a), Proxy) else super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """What is changed in place stands for the result from here on."""
        if (kind, target) == ("call_method", "__setitem__"):
            kind, target = "call_function", assigned
        result = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if target is assigned or (kind == "call_method" and is_in_place(target)):
            changed = args[0]
            if issubclass(type(changed), TracedValue):
                changed.node = result.node
                return changed
            if issubclass(type(changed), Tensor) and not self._is_of_network(changed):
                self._changed[id(changed)] = changed, result
        return result

    def _is_of_network(self, x: Tensor) -> bool:
        return any(x is own for own in (*self.root.parameters(), *self.root.buffers()))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_looking_up:
            return forward(*args, **kwargs)
        if self.is_leaf_module(m, self.path_of_module(m)):
            _check_call(m, args, kwargs)
        self.entered.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.entered.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.is_looking_up else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> Proxy:
        return TracedValue(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        return bool(self.decide(obj, "bool"))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        return iter([obj[i] for i in range(self.decide(obj, "len"))])  # type: ignore[index]

    def decide(self, obj: Proxy, kind: str) -> Any:
        """What Python asks of something that depends on the sizes of tensors only. Raises TraceError otherwise.

        kind: a key of :data:`QUESTIONS`.
        """
        node = obj.node
        if kind == "hash" and self._remembering is None:
            self._remembering = computed_so_far({type(part).__module__ for part in self.root.modules()})
        if kind != "len" and not is_metadata(node):
            raise TraceError("its control flow depends on the values of tensors")
        values = self._look_up(node)
        found = [QUESTIONS[kind](value) for value in values]
        if any(value != found[0] for value in found):
            if kind == "len":
                raise TraceError("len() asks for the batch size as a number; x.shape[0] leaves it open")
            raise TraceError(
                f"its control flow depends on the batch size: {', '.join(map(str, found))} for batches of "
                f"{', '.join(map(str, BATCH_SIZES))}"
            )
        line = _user_line()
        if not self._is_constant(node) and not (kind == "len" and is_metadata(node)):
            self.decisions[line] = None
        # A network may move to another device, or type of numbers.
        may_change = kind == "device" or (kind == "hash" and isinstance(values[0], (torch.dtype, torch.device)))
        if (node, kind) not in self._checked and not may_change:
            self._checked.add((node, kind))
            self.create_node("call_function", check_decision, (node, kind, found[0], line), {})
        return found[0]

    def kind_of(self, obj: Proxy) -> type:
        """The type of the value. Python asks for it in isinstance."""
        (value,) = self.values_of(obj, samples=1)
        return type(value)

    def values_of(self, obj: Proxy, samples: int = len(BATCH_SIZES)) -> list[Any]:
        """What it stands for, for the first ``samples`` batch sizes."""
        return self._look_up(obj.node, samples)

    def is_of_users_module(self, node: fx.Node) -> bool:
        """Whether it is what a module gives that is not looked into, and is not torch's."""
        kind = type(self.root.get_submodule(str(node.target))) if node.op == "call_module" else nn.Module
        return not kind.__module__.startswith("torch.")

    def _is_constant(self, node: fx.Node, known: dict[fx.Node, bool] | None = None) -> bool:
        """Whether only the number of axes, the type or the device is read, which no image size changes."""
        known = {} if known is None else known
        if node not in known:
            if node.op == "call_method" and node.target in METADATA_METHODS:
                known[node] = node.target in ("dim", "ndimension", "is_floating_point")
            elif node.op == "call_function" and node.target is getattr:
                known[node] = bool(node.args[1] != "shape")
            else:
                known[node] = all(self._is_constant(source, known) for source in node.all_input_nodes)
        return known[node]

    def _look_up(self, node: fx.Node, samples: int = len(BATCH_SIZES)) -> list[Any]:
        """Values of a node for the first ``samples`` batch sizes."""
        needed, queue = {node}, [node]
        while queue:
            for source in queue.pop().all_input_nodes:
                if source not in needed:
                    needed.add(source)
                    queue.append(source)
        order = [n for n in self.graph.nodes if n in needed]
        self.is_looking_up = True
        try:
            with torch.no_grad():
                for examples, values in zip(self._examples[:samples], self._values):
                    for n in order:
                        if n not in values:
                            values[n] = self._value(n, examples, values)
        finally:
            self.is_looking_up = False
        return [values[node] for values in self._values[:samples]]

    def _value(self, node: fx.Node, examples: list[Tensor], values: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            place = [n for n in self.graph.nodes if n.op == "placeholder"].index(node)
            if place < len(examples):
                return examples[place]
            raise TraceError(f"its control flow depends on the argument {node.target}, which has no example")
        if node.op == "get_attr":
            known = self._buffers.get(str(node.target))
            return attrgetter(str(node.target))(self.root) if known is None else known
        args: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])  # type: ignore[misc]
        if node.op == "call_module":
            with _in_evaluation(self.root.get_submodule(str(node.target))) as module:
                return module(*args, **kwargs)
        if node.op == "call_method":
            first = args[0].clone() if is_in_place(str(node.target)) else args[0]
            return getattr(first, str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "len": len,
    "int": int,
    "float": float,
    "hash": hash,
    "device": lambda device: device.type,
}


def check_decision(value: Any, kind: str, expected: Any, line: str) -> None:
    """In a traced graph: does Python decide as it did when the network was traced? Raises ``UserError`` if not."""
    if QUESTIONS[kind](value) != expected:
        raise UserError(
            f"The network's control flow depends on the size of its input, and with this input it takes another course "
            f"than with the example for which it was quantized: {kind} is {QUESTIONS[kind](value)}, not {expected}, at "
            f"{line}. Quantize it with an example of the size that it is used with."
        )


def _check_call(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise the TypeError of a call with arguments that a module does not take; some networks catch it."""
    try:
        signature = inspect.signature(module.forward, follow_wrapped=False)
    except (TypeError, ValueError):  # not every callable has one
        return
    signature.bind(*args, **kwargs)


@contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode, in which a look at it changes nothing in it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield module
    finally:
        for part, mode in modes.items():
            part.training = mode


def resized(x: Tensor, size: int) -> Tensor:
    """``size`` samples, repeated where there are fewer."""
    first = x.detach()[:size]
    return torch.cat([first] * -(-size // len(first)))[:size]


def _outside_library(frames: Sequence[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The frames of the network's own code, the innermost last."""
    return [frame for frame in frames if not any(part in frame.filename for part in LIBRARY)]


def _user_line() -> str:
    """The line of the network's code that is being traced, as ``file:line: text``."""
    last = _outside_library(traceback.extract_stack())[-1]
    return f"{'/'.join(last.filename.split('/')[-2:])}:{last.lineno}: {last.line}"


def explain_failure(error: Exception, tracer: Tracer, model: nn.Module) -> UserError:
    """What could not be traced, where, and what to do."""
    frames = _outside_library(traceback.extract_tb(error.__traceback__))
    where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "an unknown line"
    name: str | None = tracer.entered[-1] if tracer.entered else None
    holder = model.get_submodule(name) if name else model
    what = (
        f"module {name!r} ({type(holder).__name__})" if name else f"the network's own forward ({type(model).__name__})"
    )
    way_out = (
        f"rewrite that line without control flow on tensors, or keep the module whole with leaf_modules=[{name!r}] "
        "(its weights and BNs are then left as they are)"
        if name
        else "rewrite that line without control flow on tensors, or move it into a submodule named in leaf_modules"
    )
    return UserError(f"torch.fx cannot trace {what}: {error}\n  at {where}\n  What to do: {way_out}.")

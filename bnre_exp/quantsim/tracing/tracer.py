"""torch.fx tracing that looks up sizes: control flow on the size of an image is decided by an example."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, Proxy, TraceError

from bnre_exp.errors import UserError
from bnre_exp.quantsim.quantizers.layout import BATCH_NORMS, LAYERS

BATCH_SIZES = (1, 2, 5)  # a decision must be the same for all of them
LIBRARY = ("/torch/fx/", "/torch/nn/modules/module.py", "/bnre_exp/quantsim/")

# What tells about a tensor without reading its values.
METADATA_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "is_contiguous"}
METADATA_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_mps", "is_meta", "type", "index"}


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
        self._looking_up = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if {module_qualified_name, type(m).__name__} & self.leaves:
            return True
        if isinstance(m, (*LAYERS, *BATCH_NORMS)) or super().is_leaf_module(m, module_qualified_name):
            return True
        return self.whole(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._looking_up:
            return forward(*args, **kwargs)
        self.entered.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.entered.pop()
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._looking_up else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        return bool(self.decide(obj, "bool"))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        return iter([obj[i] for i in range(self.decide(obj, "len"))])  # type: ignore[index]

    def decide(self, obj: Proxy, kind: str) -> Any:
        """What Python asks of something that depends on the sizes of tensors only. Raises TraceError otherwise.

        kind: a key of :data:`QUESTIONS`.
        """
        node = obj.node
        if kind != "len" and not is_metadata(node):
            raise TraceError("its control flow depends on the values of tensors")
        found = [QUESTIONS[kind](value) for value in self._look_up(node)]
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
        if (node, kind) not in self._checked and kind != "device":  # a network may move to another device
            self._checked.add((node, kind))
            self.create_node("call_function", check_decision, (node, kind, found[0], line), {})
        return found[0]

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether only the number of axes, the type or the device is read, which no image size changes."""
        if node.op == "call_method" and node.target in METADATA_METHODS:
            return node.target in ("dim", "ndimension", "is_floating_point")
        if node.op == "call_function" and node.target is getattr:
            return bool(node.args[1] != "shape")
        return all(self._is_constant(source) for source in node.all_input_nodes)

    def _look_up(self, node: fx.Node) -> list[Any]:
        needed, queue = {node}, [node]
        while queue:
            for source in queue.pop().all_input_nodes:
                if source not in needed:
                    needed.add(source)
                    queue.append(source)
        order = [n for n in self.graph.nodes if n in needed]
        self._looking_up = True
        try:
            with torch.no_grad():
                for examples, values in zip(self._examples, self._values):
                    for n in order:
                        if n not in values:
                            values[n] = self._value(n, examples, values)
        finally:
            self._looking_up = False
        return [values[node] for values in self._values]

    def _value(self, node: fx.Node, examples: list[Tensor], values: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            place = [n for n in self.graph.nodes if n.op == "placeholder"].index(node)
            if place < len(examples):
                return examples[place]
            raise TraceError(f"its control flow depends on the argument {node.target}, which has no example")
        if node.op == "get_attr":
            value: Any = self.root
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
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


def is_metadata(node: fx.Node) -> bool:
    """Whether the value follows from sizes, types and devices of tensors."""
    if node.op == "call_method" and node.target in METADATA_METHODS:
        return True
    if node.op == "call_function" and node.target is getattr and node.args[1] in METADATA_ATTRIBUTES:
        return True
    if node.op != "call_function" and node.op != "call_method":
        return False
    return all(is_metadata(source) for source in node.all_input_nodes) and bool(node.all_input_nodes)


class _Decided:
    """Python asks these of a number where it does not merely compute with it."""

    tracer: Tracer

    def __getattr__(self, k: str) -> Any:
        if k == "type" and isinstance(self, _Attribute) and self.attr == "device":
            return self._ask("device")  # torch.autocast takes a str only
        return _Attribute(self, k)  # type: ignore[arg-type]

    def _ask(self, kind: str) -> Any:
        return self.tracer.decide(self, kind)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __index__(self) -> int:
        return int(self._ask("int"))

    def __int__(self) -> int:
        return int(self._ask("int"))

    def __float__(self) -> float:
        return float(self._ask("float"))

    def __hash__(self) -> int:
        """Membership in a set or dict of numbers is a decision, too."""
        return int(self._ask("hash")) if is_metadata(self.node) else object.__hash__(self)  # type: ignore[attr-defined]


class _Proxy(_Decided, Proxy):
    tracer: Tracer


class _Attribute(_Decided, Attribute):
    tracer: Tracer


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


def reads_training(kind: type) -> bool:
    """Whether a method of the class, or of its bases below nn.Module, looks at ``self.training``."""
    return mentions(kind, "training")


def mentions(kind: type, word: str) -> bool:
    """Whether a method of the class, or of its bases below nn.Module, reads an attribute or global that is ``word``, or
    calls an aten operation of that name."""

    def has(code: CodeType) -> bool:
        return word in code.co_names or any(has(c) for c in code.co_consts if isinstance(c, CodeType))

    own = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    functions = [value for base in own for value in vars(base).values() if inspect.isfunction(value)]
    return any(has(function.__code__) for function in functions if function.__name__ != "train")


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

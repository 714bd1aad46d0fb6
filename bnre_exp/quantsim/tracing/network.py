"""The class of traced networks."""

from __future__ import annotations

from typing import Any

from torch import fx

from bnre_exp.quantsim.execution import executed_graph
from bnre_exp.quantsim.tracing.frozen import META, hold


class TracedNetwork(fx.GraphModule):
    """A traced network in which modules named in its ``meta`` stay in evaluation mode, as ``bn.eval()`` asks for."""

    def train(self, mode: bool = True) -> TracedNetwork:
        """As of any module, but for those."""
        super().train(mode)
        hold(self, self.meta.get(META, ()))
        return self

    def recompile(self) -> Any:
        """Compile the graph as it is executed; ``code`` is that of the graph as it is."""
        graph = self._graph
        self._graph = executed_graph(self)
        try:
            super().recompile()
        finally:
            self._graph = graph
        plain = graph.python_code(root_module="self")
        self._code, self._lineno_map, self._prologue_start = plain.src, plain._lineno_map, plain._prologue_start
        return plain

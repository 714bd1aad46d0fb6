"""What a network is for, as the rest of the package asks for it: feeding, loss, metrics, agreement of two networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from bnre_exp.errors import UserError

TargetFn = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Headline:
    """The metric by which stages are compared. name: in MLflow, as in ``fp32/top1``; label: for people."""

    name: str
    label: str
    higher_is_better: bool = True

    def is_worse(self, value: float, least: float) -> bool:
        """Whether a value does not reach ``least``; one that is no number does not."""
        return not (value >= least if self.higher_is_better else value <= least)


@dataclass(frozen=True)
class Evaluation:
    """What a network gives on a data set.

    metrics: sums over the data divided by its size (or what the task defines), by name, also as attributes:
    ``evaluation.loss``; headline: the one by which stages are compared; count: samples; predictions: what the network
    says of each sample, ``[count, ...]`` on the CPU, by which the agreement of two networks is told; scores: how good
    that is, ``[count]``, the higher the better, for paired tests. Raises ``UserError`` where these do not fit.
    """

    metrics: Mapping[str, float]
    headline: Headline
    count: int
    predictions: Tensor = field(repr=False)
    scores: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if self.headline.name not in self.metrics:
            raise UserError(f"the task measures {', '.join(self.metrics)}, and not its headline {self.headline.name!r}")
        if not len(self.predictions) == len(self.scores) == self.count:
            raise UserError(
                f"the task gives {len(self.predictions)} predictions and {len(self.scores)} scores for {self.count} "
                "samples; expected one of each a sample"
            )
        object.__setattr__(self, "metrics", {name: float(value) for name, value in self.metrics.items()})

    @property
    def value(self) -> float:
        """The headline metric."""
        return self.metrics[self.headline.name]

    def __getattr__(self, name: str) -> float:
        metrics = self.__dict__.get("metrics", {})  # copying asks before there are any
        if name not in metrics:
            raise AttributeError(f"an evaluation has no {name!r}; its metrics are {', '.join(metrics)}")
        return float(metrics[name])


class Meter(Protocol):
    """Takes in a data set, batch by batch."""

    def update(self, output: Any, batch: Any) -> None:
        """Take in what the network gave for a batch. Raises ``UserError`` for a batch without what is needed."""

    def compute(self) -> Evaluation:
        """The result of all batches, of which there was at least one."""


class Task(Protocol):
    """What a network is for. A user's own is a class with these members, named by ``task._target_``.

    Batches come as the loader gives them, with their tensors on the network's device. targets: what the data of a job
    have to come with: "class" (also where a task has no such member), "mask", "image", "objects", "keypoints" or
    "any", as ``bnre_exp.data.samples`` reads them.
    """

    headline: Headline
    targets: str

    # A task that needs the network in floating point, for its loss, has ``begin(model)``, which a job calls once.

    def feed(self, model: nn.Module, batch: Any) -> Any:
        """The network's output for a batch; changes nothing but what the network's mode says."""

    def samples(self, batch: Any) -> int:
        """How many samples a batch has."""

    def loss(self, output: Any, batch: Any, label_smoothing: float = 0.0) -> Tensor:
        """The training loss, a scalar: the mean over the samples of the batch. Raises ``UserError`` for label smoothing
        above 0 where there is nothing to smooth."""

    def meter(self) -> Meter:
        """A new meter."""

    def compared(self, output: Any) -> Tensor:
        """The tensor of an output in which two networks are compared number by number, ``[N, ...]``."""

    def agreement(self, first: Tensor, second: Tensor) -> float:
        """The part of the samples, in [0, 1], for which two networks' predictions agree."""

    def check_output(self, output: Any, samples: int) -> None:
        """Raise ``UserError`` unless this is what a network for the task gives for an input of so many samples."""

    def check_labels(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        """Raise ``UserError`` unless labels fit; ranges: the smallest and largest label, by split."""


def first_input(batch: Any) -> Tensor:
    """The input in a batch: the batch itself, or the first element of a tuple or list.

    Raises ``UserError`` naming ``forward_fn`` if that is no tensor.
    """
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(x, Tensor):
        raise UserError(
            f"A batch is of type {type(batch).__name__}; without forward_fn it must be a tensor, or a tuple or list "
            "whose first element is one. Pass forward_fn=lambda model, batch: model(...)."
        )
    return x


def labels_of(batch: Any) -> Any:
    """The labels in a batch ``(input, label)``. Raises ``UserError`` naming ``target_fn`` for any other batch."""
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        kind = f"a {kind} with {', '.join(repr(key) for key in list(batch)[:8])}"
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[1]
    elif isinstance(batch, (tuple, list)) and len(batch) > 2:
        kind = f"a {kind} of {len(batch)}"
    else:
        raise UserError(
            f"Every batch must be (input, label); this loader yields no labels ({kind}). If they are in it all the "
            "same, pass target_fn=lambda batch: ..., which returns them."
        )
    raise UserError(
        f"Where the labels are in a batch is not clear, since it is {kind}; expected (input, label). Pass "
        "target_fn=lambda batch: batch[...], which returns them."
    )


def first_tensor(output: Any) -> Tensor | None:
    """The tensor of an output: the output itself, or the first tensor in a dict, tuple or list; None without any."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    found = (first_tensor(item) for item in items)
    return next((tensor for tensor in found if tensor is not None), None)


def refuse_smoothing(label_smoothing: float) -> None:
    """Raise ``UserError`` unless it is 0: for tasks that have no labels to smooth."""
    if label_smoothing:
        raise UserError(
            f"task: label_smoothing={label_smoothing}, but this task has no labels to smooth; set "
            "train.label_smoothing and qat.label_smoothing to 0."
        )


class PairTask:
    """What tasks share whose batches are ``(input, target)`` and whose output is a tensor, or has one as its first.

    labels: gives the target of a batch. OUTPUT: what the network must return, for messages.
    """

    OUTPUT = "a tensor [N, ...]"
    targets = "class"

    def __init__(self, target_fn: TargetFn | None) -> None:
        self.labels = target_fn or labels_of

    def feed(self, model: nn.Module, batch: Any) -> Any:
        return model(first_input(batch))

    def samples(self, batch: Any) -> int:
        return len(self.labels(batch))

    def compared(self, output: Any) -> Tensor:
        found = first_tensor(output)
        if found is None:
            raise UserError(f"The network returns {type(output).__name__}; expected {self.OUTPUT}.")
        return found

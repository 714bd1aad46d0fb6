"""What a scheme and the names of leaf modules, given for a whole network, mean in the simulated parts of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from bnre_exp.errors import UserError, few
from bnre_exp.quantsim.quantizers.scheme import LayerRule, QuantScheme
from bnre_exp.quantsim.whole import named


class PartRules:
    """The overrides of a scheme, which go by the names of the whole network, for one part after another.

    Raises ``UserError`` for what a scheme cannot ask of a network in parts.
    """

    def __init__(self, scheme: QuantScheme, parts: Sequence[str]) -> None:
        if scheme.first_last_bits is not None:
            raise UserError(
                "first_last_bits: which layer of a network in parts is the first or the last is not known; name the "
                "layers in overrides."
            )
        self._scheme, self._parts, self._used = scheme, parts, set[LayerRule]()

    def of_part(self, part: str, names: AbstractSet[str]) -> QuantScheme:
        """The scheme of a part, in which these are the names of operations: with the overrides that concern it."""
        rules = list[LayerRule]()
        for rule in self._scheme.overrides:
            inner = [replace(rule, pattern=pattern) for pattern in _rests(rule.pattern, f"{part}.")]
            rules += [changed for changed in inner if changed.matches(names)]
            self._used |= {rule} if any(changed.matches(names) for changed in inner) else set()
        return replace(self._scheme, overrides=tuple(rules))

    def check_used(self) -> None:
        """Raise ``UserError`` for an override that concerned no part."""
        if lost := [rule.pattern for rule in self._scheme.overrides if rule not in self._used]:
            raise UserError(
                f"quant.overrides: {few(lost)} matches nothing in the parts {', '.join(self._parts)}. Names begin with "
                "that of the part, as list_layers() shows them."
            )


def joined_scheme(schemes: Mapping[str, QuantScheme]) -> QuantScheme:
    """The scheme of a network whose parts have these, with overrides by the names of the whole."""
    first = next(iter(schemes.values()))
    rules = (
        replace(rule, pattern=named(part, rule.pattern))
        for part, scheme in schemes.items()
        for rule in scheme.overrides
    )
    return replace(first, overrides=tuple(rules))


def _rests(pattern: str, prefix: str) -> list[str]:
    """Patterns of which one matches a name if, and only if, ``pattern`` matches ``prefix`` followed by that name."""
    rests = [pattern]
    for letter in prefix:
        rests = list(dict.fromkeys(after for rest in rests for after in _after_letter(rest, letter)))
    return [rest for rest in rests if rest]


def _after_letter(pattern: str, letter: str) -> Iterator[str]:
    while pattern.startswith("*"):
        yield pattern
        pattern = pattern[1:]
    end = pattern.find("]", 3 if pattern.startswith("[!") else 2) + 1 if pattern.startswith("[") else 1
    first, rest = pattern[: end or 1], pattern[end or 1 :]
    if first and fnmatchcase(letter, first):
        yield rest


def leaves_of_parts(leaf_modules: Sequence[str], parts: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The ``leaf_modules`` that are in each part, by the names that they have in it. Raises ``UserError`` for one that
    is in none."""
    found: dict[str, list[str]] = {name: [] for name in parts}
    for leaf in leaf_modules:
        for name, part in parts.items():
            inner = leaf.removeprefix(f"{name}.")
            is_name = inner != leaf and inner in {path for path, _ in part.named_modules()}
            if is_name or leaf in {type(module).__name__ for module in part.modules() if module is not part}:
                found[name].append(inner if is_name else leaf)
    known = {named(name, inner) for name, leaves in found.items() for inner in leaves}
    known |= {leaf for leaves in found.values() for leaf in leaves}
    if lost := [leaf for leaf in leaf_modules if leaf not in known]:
        raise UserError(f"leaf_modules: no module or class within {', '.join(parts)} is named {few(lost)}.")
    return found

# SPDX-License-Identifier: Apache-2.0
"""The names that people import: ``sklearn.cluster.KMeans`` for ``sklearn.cluster._kmeans.KMeans``.

A package's ``__init__`` says which names of its modules it offers. Following those imports gives
30 % of all passages a shorter name, under which they are documented elsewhere and asked for.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

LONGEST_CHAIN = 4  # torch.nn.CELU comes through torch.nn.modules from torch.nn.modules.activation


class Interface(NamedTuple):
    """What a module's source says of its names.

    ``public`` is ``__all__`` as far as it is spelled out, None without one; ``imports`` are those
    from the same top-level package, as (origin, name, alias).
    """

    module: str
    is_package: bool
    public: list[str] | None
    imports: list[tuple[str, str, str]]


def interface(tree: ast.Module, module: str, is_package: bool) -> Interface:
    """The interface of ``module``, given as its syntax tree."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    public: list[str] = []
    imports = []
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            if _root(origin) == _root(module):
                imports += [(origin, name.name, name.asname or name.name) for name in node.names]
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                parts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
                public += [part for part in parts if isinstance(part, str)]
    return Interface(module, is_package, public or None, imports)


def public_names(names: Iterable[str], interfaces: Iterable[Interface]) -> dict[str, str]:
    """For each of ``names`` (functions and classes) the best one a package offers it by.

    Names that are the best already are left out.
    """
    offers: dict[str, dict[str, str]] = defaultdict(dict)  # module -> alias -> name as defined
    for name in names:
        module, _, own = name.rpartition(".")
        offers[module][own] = name
    importing = [interface for interface in interfaces if interface.imports]
    public = {interface.module: interface.public for interface in interfaces}
    for _ in range(LONGEST_CHAIN):
        for interface in importing:
            offered = offers[interface.module]
            for origin, name, alias in interface.imports:
                if name == "*":
                    wanted = public.get(origin)
                    for own, defined in list(offers[origin].items()):
                        if own in wanted if wanted else not is_private(own):
                            offered.setdefault(own, defined)
                elif name in offers[origin]:
                    offered.setdefault(alias, offers[origin][name])
    best: dict[str, str] = {}
    for interface in importing:
        if interface.is_package:
            for alias, defined in offers[interface.module].items():
                offered_as = f"{interface.module}.{alias}"
                best[defined] = min(best.get(defined, defined), offered_as, key=publicness)
    return {defined: public for defined, public in best.items() if public != defined}


def renamed(name: str, public: dict[str, str]) -> str:
    """``name`` as ``public`` has it, or the nearest name above it: a method follows its class."""
    if name in public:
        return public[name]
    parent, _, own = name.rpartition(".")
    return f"{renamed(parent, public)}.{own}" if parent else name


def publicness(name: str) -> tuple[int, int, str]:
    """Sorts the names of one thing: least private parts first, then the least deep."""
    return sum(map(is_private, name.split("."))), name.count("."), name


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module does, or that type checkers believe do."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements([*node.body, *node.orelse])


def _root(module: str) -> str:
    """The top-level package; ``_pytest`` and ``pytest`` are one."""
    return module.split(".")[0].lstrip("_")

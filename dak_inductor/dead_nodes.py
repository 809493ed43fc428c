"""Taking nodes out of a graph that nothing uses any more."""

from __future__ import annotations

import operator

from torch.fx import Node


def erase_unused(node: Node) -> None:
    """Remove a node without users, and what only it used."""
    pending = [node]
    while pending:
        dead = pending.pop()
        if dead.users or dead.graph is None:
            continue
        inputs = dead.all_input_nodes
        dead.graph.erase_node(dead)
        pending += [used for used in inputs if not used.users and is_pure(used)]


def is_pure(node: Node) -> bool:
    """Whether a node does nothing but give its value."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable

"""Where in the user's model an operator comes from."""

from __future__ import annotations

import re

from torch.fx import Node

_SELF = re.compile(r"^L\['\w+'\]\.?|^self\.?|^_orig_mod\.?")  # a forward names itself at will
_PART = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
_FILE = re.compile(r'File "([^"]+)", line (\d+)')


def module_of(node: Node) -> str:
    """Qualified name of the innermost module, "" if the graph does not say."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return _SELF.sub(
        "", path.replace("._modules['", ".").replace("']", "") if "_modules" in path else path
    )


def source_of(node: Node) -> str:
    """`file:line` of the innermost frame, "" if the graph does not say."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return ""
    start = trace.rfind('File "')
    found = _FILE.match(trace, start) if start >= 0 else None
    return f"{found.group(1)}:{found.group(2)}" if found else ""


def parameter_name(placeholder: Node) -> str:
    """Qualified name of the parameter or buffer that a graph input is, "" for any other input."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name() if callable(source.name) else source.name
    if "_parameters[" not in name and "_buffers[" not in name:
        return ""
    return ".".join(_PART.findall(name[name.index("_modules[") :] if "_modules[" in name else name))

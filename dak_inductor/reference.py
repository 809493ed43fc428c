"""docs/reference.md, from signatures, docstrings and the command line: what is said there is what
the code has.

    python -m dak_inductor.reference > docs/reference.md
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer.main

import dak_inductor as dak
from dak_inductor import cli, options

CALLS: tuple[Callable[..., Any], ...] = (
    dak.offload, dak.loading, dak.restore, dak.kv_cache, dak.explain, dak.stats, dak.trace,
)  # fmt: skip
_HEAD = """# Reference

Generated from the code by `python -m dak_inductor.reference > docs/reference.md`; a test holds the
two equal. What the options are for, with examples: [options.md](options.md). Errors by name:
[troubleshooting.md](troubleshooting.md)."""
_HEADINGS = ("argument", "type", "default", "meaning")
_ENTRY = re.compile(r"(\w+): +(.*)")


def reference() -> str:
    """The page."""
    parts = [_HEAD, "## Calls", *map(_call, CALLS), "## Options of the backend", *_backend()]
    parts += ["## Variables", _variables(), "## The command line", *_commands()]
    return "\n\n".join(parts) + "\n"


def _call(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    told, arguments = _docstring(function)
    if "arguments as of `offload`" in told:
        arguments = _docstring(dak.offload)[1]
    rows = [
        (f"`{p.name}`", _code(p.annotation), _default(p.default), arguments.get(p.name, ""))
        for p in signature.parameters.values()
    ]
    columns = 4 if arguments else 3
    given = ", ".join(signature.parameters)
    listed = _table(_HEADINGS[:columns], [row[:columns] for row in rows])
    return "\n\n".join([f"### `dak.{function.__name__}({given})`", told, listed])


def _docstring(described: object) -> tuple[str, dict[str, str]]:
    """What is said, and of each argument."""
    text = inspect.getdoc(described) or ""
    before, _, behind = text.partition("Args:\n")
    listed, _, raised = behind.partition("\nRaises:\n")
    if not behind:
        before, _, raised = text.partition("Raises:\n")
    errors = f"\n\nRaises {' '.join(raised.split())}" if raised else ""
    return before.strip() + errors, _entries(listed)


def _entries(text: str) -> dict[str, str]:
    """Of lines `name: meaning`, with lines that go on indented deeper."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(text).splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name:
            found[name] += f" {line.strip()}"
    return {name: meaning.strip() for name, meaning in found.items()}


def _backend() -> Iterable[str]:
    text = inspect.getdoc(options.BackendOptions) or ""
    meanings = _entries(text.partition("\n\n")[2])
    types = get_type_hints(options.BackendOptions)
    rows = [
        (f"`{f.name}`", _spelled(types[f.name]), _default(f.default), meanings[f.name])
        for f in fields(options.BackendOptions)
    ]
    yield _table(("option", *_HEADINGS[1:]), rows)
    yield (
        "Besides: `mode`, a mode of Inductor, and every setting of `torch._inductor.config`. "
        "Anything else raises OptionError."
    )


def _variables() -> str:
    """Those that mirror an option, and the folder."""
    known = {field.name for field in fields(options.BackendOptions)}
    told, _ = _docstring(options.cache_folder)
    rows = [
        (f"`DAK_{name.upper()}`", f"the option `{name}`" if name in known else _line(told))
        for name in options.VARIABLES
    ]
    return _table(("variable", "stands for"), rows)


def _commands() -> Iterable[str]:
    group: Any = typer.main.get_command(cli.app)
    yield f"Before a command: {_flags(group.params)}."
    for name, command in group.commands.items():
        yield f"### `dak {name}`\n\n{_line(command.help)}"
        yield _table(
            ("option", *_HEADINGS[1:]),
            [
                (_names(p), _type(p), "required" if p.required else _shown(p), _line(p.help))
                for p in command.params
            ],
        )


def _flags(params: Sequence[Any]) -> str:
    return ", ".join(f"`{p.opts[0]}` ({_line(p.help).rstrip('.')})" for p in params)


def _names(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{param.name.upper()}...`" if param.nargs == -1 else f"`{param.name.upper()}`"
    return ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))


def _type(param: Any) -> str:
    return _spelled(param.type_descriptor.annotation)


def _spelled(kind: Any) -> str:
    return _code(_type_text(kind))


def _type_text(kind: Any) -> str:
    """Of a type that was evaluated, the same under every version of Python."""
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_type_text, get_args(kind)))
    if kind is NoneType:
        return "None"
    plain = isinstance(kind, type) and not get_args(kind)
    return kind.__name__ if plain else re.sub(r"\b(typing|pathlib)\.", "", str(kind))


def _shown(param: Any) -> str:
    given = param.default
    if given is None or given == "" or (param.param_type_name == "option" and param.is_flag):
        return ""
    return f"`{given}`" if isinstance(given, str | Path) else _default(given)


def _default(value: object) -> str:
    return "required" if value is inspect.Parameter.empty else f"`{value!r}`"


def _code(annotation: object) -> str:
    return "" if annotation is inspect.Parameter.empty else f"`{annotation}`"


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(entry.replace("|", "\\|") for entry in line) + " |" for line in lines
    )


if __name__ == "__main__":
    print(reference(), end="")

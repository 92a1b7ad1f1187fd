"""Commands from functions that take options as values: nothing of an option is written here.

    @dataclass(frozen=True)
    class Shown:                                  # in the room that the options belong to
        width: int = option("Columns.", 80, least=20, metavar="N")
        names: tuple[str, ...] = option("Whom to show.", (), "--name", many=True)

    def show(
        place: Annotated[Path, argument_spec],    # a Spec beside a type: one parameter of its own
        shown: Shown,                             # a class of options: all of its options
        execution: Annotated[Execution, only("threads")],          # some of its options
        speech: Annotated[Speech, only("debug", as_json="...")],   # some, one with another help
        given: Given,                             # what the user wrote: field -> flag, such as --width
    ) -> None:
        '''What help says.'''

`derived(show)` is what typer takes as a command.  It parses as typer does (types, metavars, `least`, several
times with `many`), makes the classes with `della.options.build` and calls the function.  From anything but a
command line, such as a YAML file, `build(Shown, {"width": 100})` makes the same value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from della.options import Spec, build, declared, written


@dataclass(frozen=True)
class Only:
    """The options of a class that a command has, and those of them with another help."""

    names: tuple[str, ...]
    helps: dict[str, str]


def only(*names: str, **helps: str) -> Only:
    """Beside a class in Annotated: the command has only these options of it; of ``helps`` with that help."""
    return Only((*names, *helps), helps)


class Given(dict[str, str]):
    """What a user wrote on the command line: the name of the field -> how the option is written."""


def derived(function: Callable[..., None]) -> Callable[..., None]:
    """The command that typer makes of ``function``; its parameters are described above."""
    groups: dict[str, tuple[Any, list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    defaults = {each.name: each.default for each in inspect.signature(function).parameters.values()}
    for name, hint in get_type_hints(function, include_extras=True).items():
        kind, *extra = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        spec = next((each for each in extra if isinstance(each, Spec)), None)
        if spec is not None:
            default = MISSING if defaults[name] is inspect.Parameter.empty else defaults[name]
            parameters.append(_parameter(name, kind, spec, default))
        elif kind is Given:
            parameters.append(_keyword("context", typer.Context))
            groups[name] = Given, []
        elif isinstance(kind, type) and is_dataclass(kind):
            picked = next((each for each in extra if isinstance(each, Only)), None)
            own = _parameters(kind, picked)
            groups[name] = kind, [each.name for each in own]
            parameters += own

    def command(**given: Any) -> None:
        context = given.pop("context", None)
        values = {name: value for name, value in given.items() if name not in grouped}
        for name, (kind, own) in groups.items():
            if kind is Given:
                values[name] = _written(context)
            else:
                values[name] = build(kind, {each: given[each] for each in own})
        function(**values)

    grouped = {each for _, own in groups.values() for each in own}
    names = [each.name for each in parameters]
    assert len(set(names)) == len(names), f"{function.__name__}: an option stands in two classes"
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _parameters(cls: type[Any], picked: Only | None) -> list[inspect.Parameter]:
    hints, defaults = get_type_hints(cls), {each.name: each for each in fields(cls)}
    found = []
    for name, spec in declared(cls).items():
        if picked is None or name in picked.names:
            each = defaults[name]
            default = each.default if each.default_factory is MISSING else None
            found.append(_parameter(name, hints[name], spec, default, picked.helps if picked else {}))
    assert picked is None or len(found) == len(picked.names), f"{cls.__name__} lacks one of {picked.names}"
    return found


def _parameter(
    name: str, hint: Any, spec: Spec, default: Any, helps: dict[str, str] | None = None
) -> inspect.Parameter:
    """One parameter as typer reads it."""
    kind, is_optional = _plain(hint)
    if spec.many:
        kind, default = list[str], inspect.Parameter.empty if default is MISSING else None
    elif spec.read is not None:
        kind, default = str, inspect.Parameter.empty if default is MISSING else spec.text
    elif default is MISSING:
        default = inspect.Parameter.empty
    if default is None or is_optional:
        kind = kind | None
    more: dict[str, Any] = {"help": (helps or {}).get(name, spec.help), "metavar": spec.metavar}
    more |= {"min": spec.least} if spec.least is not None else {}
    more |= {"show_default": False} if default is None or not spec.shown else {}
    if spec.is_argument:
        return _keyword(name, Annotated[kind, typer.Argument(**more)], default)
    flags = written(name, spec)
    if kind is bool and default is True:  # said with a flag that says no
        return _keyword(name, Annotated[bool, typer.Option(*flags, callback=_turned, **more)], False)
    return _keyword(name, Annotated[kind, typer.Option(*flags, **more)], default)


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain(hint: Any) -> tuple[Any, bool]:
    """A type without ``| None``, and whether it had one."""
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return kinds[0], len(kinds) < len(get_args(hint))
    return hint, False


def _turned(value: bool) -> bool:
    return not value


def _written(context: Any) -> Given:
    found = Given()
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if source is not None and source.name == "COMMANDLINE":
            found[str(parameter.name)] = parameter.opts[0]
    return found

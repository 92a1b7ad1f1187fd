"""A Plan as text for people and as one JSON object for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from della.errors import distinct
from della.options import size_text
from della.planning.configs import NUMBER
from della.planning.job import Job, Plan, Section
from della.recipe.settings import Filtered, Gradient, Setting


def plans_json(plan: Plan, threads: int) -> dict[str, Any]:
    """`plan_json`; of several documents each, with its name, in the order in which they are merged."""
    if not plan.before:
        return plan_json(plan, threads)
    every = (*plan.before, plan)
    return {"documents": [{"name": each.recipe.name, **plan_json(each, threads)} for each in every]}


def plans_text(plan: Plan, threads: int, *, everything: bool = False) -> str:
    """`plan_text`; of several documents each under its name, in the order in which they are merged."""
    shown = [plan_text(each, threads, everything=everything) for each in (*plan.before, plan)]
    if not plan.before:
        return shown[0]
    heads = [f"Document {k} of {len(shown)}: {made.recipe.name}" for k, made in enumerate(plan.before, 1)]
    heads.append(f"Document {len(shown)} of {len(shown)}: the result")
    return "\n\n".join(f"{head}\n\n{text}" for head, text in zip(heads, shown, strict=True))


def plan_json(plan: Plan, threads: int) -> dict[str, Any]:
    """``tensors`` in output order, each with its resolved parameters, beside bytes, memory and departures."""
    references = _references(plan)
    return {
        "merge_method": plan.recipe.merge_method,
        "base_model": plan.recipe.base_model,
        "seed": plan.recipe.seed,
        "filters": [
            {"model": model, "parameter": parameter, "filter": part, "tensors": count}
            for model, parameter, part, count, _ in _cases(plan)
        ],
        "tensors": [_tensor(plan, job, references) for job in plan.jobs],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "disk": plan.disk,
        "memory": plan.memory(threads),
        "seconds": round(plan.seconds(threads), 2),
        "coverage": {each.reference: each.as_dict for each in plan.coverage},
        "departures": list(plan.departures),
        "notes": list(plan.notes),
    }


def _cases(plan: Plan) -> Iterator[tuple[str, str, str, int, Setting]]:
    """(model or "", parameter, filter or "", how many tensors it holds for, what it says) of every case."""
    found: dict[object, tuple[str, str, str, int, Setting]] = {}
    for section in plan.sections:
        for model, parameter, setting, counts in section.recipe.matches(section.floats):
            key: object
            for k, ((part, case), count) in enumerate(zip(setting.cases, counts, strict=True)):
                key = (model, parameter, k, case.location) if section.label else len(found)
                before = found[key][3] if key in found else 0
                found[key] = model, parameter, str(part), before + count, case
    yield from found.values()


def _tensor(plan: Plan, job: Job, references: list[str]) -> dict[str, Any]:
    return {
        "name": job.name,
        "shape": list(job.shape),
        "dtype": job.dtype.torch_name,
        "method": "copy" if job.method is None else job.method.name,
        "parameters": _shared(job),
        "models": dict(_own(plan, job, references)),
    }


def _references(plan: Plan) -> list[str]:
    """The models as the recipe writes them."""
    return distinct(model.reference for model in plan.recipe.models)


def _shared(job: Job) -> dict[str, Any]:
    """The shared parameters as they take effect."""
    return {} if job.method is None else job.method.shared


def _own(plan: Plan, job: Job, references: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model of a job with its parameters as they take effect, in the order of the recipe."""
    operands = {each.model: each for each in job.operands}
    for reference, model in zip(references, plan.models, strict=True):
        norms = model.entry.input_norms
        if model in operands:
            yield reference, {**operands[model].expert.values, **({"input_norms": norms} if norms else {})}


def plan_text(plan: Plan, threads: int, *, everything: bool = False) -> str:
    """What would be done: models, sizes, time, departures from mergekit, and what the recipe sets.

    With ``everything`` defaults are shown too, and every value along gradients.
    """
    recipe = plan.recipe
    lines = [f"{recipe.merge_method}, seed {recipe.seed}: {len(plan.jobs)} tensors"]
    if recipe.base_model:
        lines.append(f"  base    {recipe.base_model}")
    kind = "expert" if recipe.method.needs_base else "model "
    rows = _rows(plan)
    own = {"": {}, **dict(zip(_references(plan), (model.parameters for model in recipe.models), strict=True))}
    told = {name: list(_told(plan, rows, name, found, everything)) for name, found in own.items()}
    lines += [f"  {kind}  {name}  {', '.join(told[name])}".rstrip() for name in _references(plan)]
    lines += [f"  shared  {', '.join(told[''])}"] if told[""] else []
    lines += [f"  {line}" for section in plan.sections for line in _section(section)]
    if not everything:
        lines.append("  (all else is as by default: --all shows it, and the values of each layer)")
    lines += ["", *(f"  {each}" for each in plan.coverage)]
    lines += [
        "",
        f"  read    {size_text(plan.bytes_read)}",
        f"  write   {size_text(plan.bytes_written)} ({_dtypes(plan.jobs)})",
        f"  disk    {size_text(plan.disk)} free beside OUT (an old OUT stays until all is done)",
        f"  memory  {size_text(plan.memory(threads))} with {threads} thread{'s' * (threads > 1)}",
        f"  time    about {plan.seconds(threads):.0f} s",
    ]
    lines += _varying(rows) if everything else []
    cases = [
        f"  {model}{': ' * bool(model)}{parameter}, {part or 'all others'}: {count} tensors: {_setting(case)}"
        for model, parameter, part, count, case in _cases(plan)
    ]
    lines += ["", "Filters:", *cases] if cases else []
    for title, texts in (("Other than mergekit:", plan.departures), ("Notes:", plan.notes)):
        if texts:
            lines += ["", title, *(f"  - {text}" for text in texts)]
    return "\n".join(lines)


def _section(section: Section) -> Iterator[str]:
    """A slice or a module, and what it is made of."""
    if section.label:
        said = f"{section.label}: {section.recipe.merge_method} of "
        for k, model in enumerate(section.models):
            layers = model.entry.layers
            said += ", " * bool(k) + model.entry.reference
            said += f" layers {layers[0]}-{layers[1] - 1}" if layers and layers[1] > layers[0] else ""
        if section.layers and section.layers[2]:
            first, count = section.layers[1:]
            said += f" -> layers {first}-{first + count - 1}"
        yield said


# Resolved parameters, as (the model or "", parameter) -> value, and the tensors that have them.
_Rows = dict[tuple[tuple[tuple[str, str], Any], ...], list[str]]


def _rows(plan: Plan) -> _Rows:
    rows: _Rows = {}
    references = _references(plan)
    for job in sorted(plan.jobs, key=lambda job: _natural(job.name)):
        if job.method is None:
            continue
        values = [(("", key), value) for key, value in _shared(job).items()]
        for reference, own in _own(plan, job, references):
            values += [((reference, key), value) for key, value in own.items()]
        rows.setdefault(tuple(values), []).append(job.name)
    return rows


def _natural(name: str) -> list[tuple[int, str]]:
    """By which layer 2 stands before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _told(plan: Plan, rows: _Rows, owner: str, own: Mapping[str, Setting], everything: bool) -> Iterator[str]:
    """The parameters of a model ("" for the shared ones) that the recipe sets or that are not the method's
    default, or all of them.
    """
    table = [dict(row) for row in rows]
    method = plan.recipe.method
    defaults = method.expert(owner, {}).values if owner else method({}).shared
    for _, name in dict.fromkeys(key for row in table for key in row if key[0] == owner):
        values = [row[owner, name] for row in table if (owner, name) in row]
        setting = own.get(name) or plan.recipe.parameters.get(name)
        is_default = setting is None and _same([defaults.get(name), *values])
        if values[0] is None or (is_default and not everything):
            continue
        if _same(values):
            yield f"{name} {_value(values[0])}"
        else:
            yield f"{name} {_setting(setting) if setting else 'varies'}"


def _setting(setting: Setting) -> str:
    """What a recipe says in a few words; of a gradient the values at the first, middle and last layer."""
    if isinstance(setting, Filtered):
        return "by cases"
    depths = (0, 0.5, 1) if isinstance(setting, Gradient) else (0,)
    return " ... ".join(_value(setting.at(depth)) for depth in depths)


def _varying(rows: _Rows) -> list[str]:
    """The parameters that are not the same for every tensor: each set of values, and who has it."""
    if len(rows) < 2:
        return []
    table = [dict(row) for row in rows]
    keys = dict.fromkeys(key for row in table for key in row)
    varying = [key for key in keys if not _same([row.get(key, key) for row in table])]
    whole = Counter(_layer(name) for names in rows.values() for name in names)
    lines = ["", "Values along gradients and filters:"]
    for row, names in zip(table, rows.values(), strict=True):
        shown = (f"{key[0]}: {key[1]} {_value(row[key])}".removeprefix(": ") for key in varying if key in row)
        lines.append("  " + ", ".join(shown))
        lines += [f"      {pattern}" for pattern in collapse(names, whole)]
    return lines


def _same(values: list[Any]) -> bool:
    return all(value == values[0] for value in values)


def collapse(names: Iterable[str], whole: Counter[str]) -> list[str]:
    """Tensor names with their first number as a range, ``model.layers.0-3.mlp.up_proj.weight``; a layer of
    which all tensors are there (``whole`` counts them) as ``model.layers.0-3.*``.
    """
    names = list(names)
    here = Counter(map(_layer, names))
    groups: dict[str, list[int]] = {}
    for name in names:
        match = NUMBER.search(name)
        if match is None:
            groups.setdefault(name, [])
            continue
        tail = ".*" if here[_layer(name)] == whole[_layer(name)] else name[match.end(1) :]
        groups.setdefault(f"{name[: match.start(1)]}\0{tail}", []).append(int(match[1]))
    return [pattern.replace("\0", _ranges(numbers)) for pattern, numbers in groups.items()]


def _layer(name: str) -> str:
    """The part of a tensor's name that names its layer; the whole name outside of layers."""
    match = NUMBER.search(name)
    return name[: match.end(1)] if match else name


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _dtypes(jobs: Iterable[Job]) -> str:
    return ", ".join(dict.fromkeys(job.dtype.torch_name for job in jobs))

"""What is wrong with a plan, in words a person can act on: the key, the value given, the fix."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


class PlanError(ValueError):
    """A plan that cannot be used; `problems` are sentences, each with its fix."""

    def __init__(self, where: str, *problems: str) -> None:
        self.where, self.problems = where, problems
        lines = "\n  ".join(("", *problems)) if len(problems) > 1 else f" {problems[0]}"
        super().__init__(f"{where}:{lines}")


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One sentence per problem pydantic found in `root` or in its sections. A plan of others is
    quoted there, so what a screen would obey is written as an escape."""
    return [_escaped(_sentence(details, root)) for details in error.errors()]


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _sentence(details: ErrorDetails, root: type[BaseModel]) -> str:
    model, loc = _walk(details["loc"], root)
    kind, context = details["type"], details.get("ctx", {})
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc)[1:]
    key = str(loc[-1]) if loc else ""
    if kind == "missing":
        return f"{path} is missing: {_how_to_add(model, key, loc)}"
    if kind == "extra_forbidden":
        return f"{_given(path, details['input'])} is unknown: {_nearest(model, key)}"
    if kind == "value_error":
        prefix = {0: "", 1: f"{path}."}.get(len(loc), f"{path}: ")
        return f"{prefix}{context['error']}"
    if kind == "union_tag_not_found":
        return f"{path}.kind is missing: write `kind = …` in [{path}], one of {_kinds(model, key)}"
    if kind == "union_tag_invalid":
        return f'{path}.kind = "{context["tag"]}" is unknown: use one of {_kinds(model, key)}'
    return f"{_given(path, details['input'])}: {_fix(details)}"


def _walk(
    loc: Sequence[int | str], root: type[BaseModel]
) -> tuple[type[BaseModel], list[int | str]]:
    """The model whose field the last step of `loc` is, and `loc` without the tags of unions."""
    model, path, rest = root, [], list(loc)
    while rest:
        path.append(step := rest.pop(0))
        if step not in model.model_fields or not rest:
            continue
        models = list(_models(model.model_fields[str(step)].annotation))
        if len(models) > 1:
            tag = rest.pop(0)
            models = [m for m in models if m.model_fields["kind"].default == tag]
        if models and rest:
            model = models[0]
    return model, path


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _kinds(root: type[BaseModel], section: str) -> str:
    models = _models(root.model_fields[section].annotation)
    return ", ".join(f'"{m.model_fields["kind"].default}"' for m in models)


def _how_to_add(model: type[BaseModel], key: str, loc: Sequence[int | str]) -> str:
    if len(loc) > 1:
        meaning = model.model_fields[key].description or ""
        section = ".".join(step for step in loc[:-1] if isinstance(step, str))
        table = f"[[{section}]]" if isinstance(loc[-2], int) else f"[{section}]"
        return f"write `{key} = …` in {table} ({meaning.rstrip('.')})"
    missing = next(_models(model.model_fields[key].annotation))
    needed = [name for name, field in missing.model_fields.items() if field.is_required()]
    return f"add a section [{key}] with {', '.join(needed)}"


def _nearest(model: type[BaseModel], key: str) -> str:
    known = list(model.model_fields)
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def _given(path: str, value: object) -> str:
    if isinstance(value, dict):
        return f"[{path}]"
    text = json.dumps(value, ensure_ascii=False)
    return f"{path} = {text if len(text) <= 60 else text[:57] + '...'}"


def _fix(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    words = {
        "greater_than": "use more than {gt}",
        "greater_than_equal": "use at least {ge}",
        "less_than": "use less than {lt}",
        "less_than_equal": "use at most {le}",
        "literal_error": "use {expected}",
        "string_pattern_mismatch": "use text that matches {pattern}",
        "too_short": "give at least {min_length} of them",
        "too_long": "give at most {max_length} of them",
        "string_too_short": "give at least {min_length} characters",
        "string_too_long": "give at most {max_length} characters",
        "int_from_float": "use a whole number",
        "int_type": "use a whole number, without quotes or decimal point",
        "float_type": "use a number, without quotes",
        "bool_type": "use true or false",
        "string_type": 'use text in quotes, "…"',
        "tuple_type": "use a list, [ … ]",
        "dict_type": "make it a section, [name], with keys of its own",
        "model_type": "make it a section, [name], with keys of its own",
        "model_attributes_type": "make it a section, [name], with keys of its own",
        "finite_number": "use a finite number",
    }
    pattern = words.get(details["type"])
    return pattern.format(**context) if pattern else details["msg"]

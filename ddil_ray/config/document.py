"""docs/config.md from the config's own types: `python -m ddil_ray.config.document > docs/config.md`."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ddil_ray.config.ablation import AblationConfig
from ddil_ray.config.chain import ChainConfig
from ddil_ray.config.objectives import Dmd2, Lcm, Pd
from ddil_ray.config.prepare import PrepareConfig
from ddil_ray.config.run import RunConfig
from ddil_ray.config.teacher import TeacherConfig
from ddil_ray.config.text_teacher import TextTeacherConfig

__all__ = ["document"]

_MOST = 2**31 - 1
"""Of most whole numbers, and not worth telling."""
_HEAD = """# Settings

Made from the code by `python -m ddil_ray.config.document`. YAML groups, or `group.key=value` on the command line.
Unknown keys, wrong types and combinations that cannot work are refused before anything starts.
"""

_COMMANDS: dict[str, type[BaseModel]] = {
    "`ddil-ray distill`": RunConfig,
    "`ddil-ray train-teacher`": TeacherConfig,
    "`ddil-ray train-teacher` with `kind: text-to-image`": TextTeacherConfig,
    "`ddil-ray ablate`": AblationConfig,
    "`ddil-ray prepare`": PrepareConfig,
    "`ddil-ray chain`": ChainConfig,
}


def document() -> str:
    """The page."""
    parts = [_HEAD]
    for title, kind in _COMMANDS.items():
        parts.append(f"\n# {title}\n\n" + _table(kind, scalars_only=True))
        for name, field in kind.model_fields.items():
            for variant in _groups(field):
                suffix = f" with `type: {variant.__name__.lower()}`" if variant in (Pd, Lcm, Dmd2) else ""
                summary = (variant.__doc__ or "").splitlines()[0]
                parts.append(f"\n## `{name}`{suffix}\n\n{summary}\n\n{_table(variant)}")
    return "".join(parts)


def _groups(field: FieldInfo) -> list[type[BaseModel]]:
    kinds = [field.annotation, *get_args(field.annotation)]
    return [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]


def _table(kind: type[BaseModel], *, scalars_only: bool = False) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    schema = kind.model_json_schema()
    definitions = schema.get("$defs", {})
    for name, field in kind.model_fields.items():
        if scalars_only and _groups(field):
            continue
        kind_text = _type(schema["properties"][name], definitions)
        rows.append(f"| `{name}` | {kind_text} | {_default(field)} | {_cell(field.description or '')} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    """`text` in a table, where a bar would end the cell and a name in angles be taken for a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return "" if value is None else f"`{list(value) if isinstance(value, tuple) else value}`"


def _type(node: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in node:
        inner = definitions[node["$ref"].rpartition("/")[2]]
        return "{" + ", ".join(inner.get("properties", {})) + "}"
    if "anyOf" in node:
        return " or ".join(_type(option, definitions) for option in node["anyOf"])
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if node.get("type") == "array":
        return "list"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    told = {sign: node[key] for key, sign in bounds.items() if node.get(key, _MOST) != _MOST}
    limits = " ".join(f"{sign} {limit:g}" if limit < 1e6 else f"{sign} {limit}" for sign, limit in told.items())
    return f"{node.get('type', 'any')} {limits}".strip()


if __name__ == "__main__":
    print(document(), end="")  # noqa: T201 - the page goes to standard output

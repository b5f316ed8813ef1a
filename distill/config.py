"""A run's settings from YAML and dotted overrides; a wrong key or value is one line with a way out."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

import losses
from distill.errors import UserError
from distill.schema import LOSSES, Config, Section

TERM_CONFIGS = [model for models in LOSSES.values() for model in models]


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The checked settings of a YAML file.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` each, the value in YAML.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong value.
    """
    return check_config(override(read_yaml(path), overrides or []), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file; see configs/, or run train.py --list{_near_file(path)}")
    try:
        settings = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: is not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no settings; a config is a YAML mapping such as configs/quickstart.yaml")
    return settings


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice in a section, of which otherwise the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands here twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def override(settings: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of the settings with each `dotted.key=value` set."""
    settings = _unshared(settings)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"{item!r}: an override is written key=value, such as train.epochs=20")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            twice = isinstance(error, yaml.constructor.ConstructorError) and error.problem
            raise UserError(f"{key}: {twice or f'{text!r} is not a YAML value; quote it'}") from None
        section = settings
        *parents, leaf = key.split(".")
        for i, parent in enumerate(parents):
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UserError(f"{key}: {'.'.join(parents[: i + 1])} is a single value and has no keys below it")
        section[leaf] = value
    return settings


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings by their dotted paths, as plain values: what is no number, string or truth value becomes its text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def check_config(settings: dict[str, Any], source: str) -> Config:
    """Settings as a `Config`; the first thing wrong is named with its path, what was allowed and the nearest match."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """One line for what pydantic found wrong first; an unknown key goes before the keys that it left missing."""
    found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")[0]
    path = [str(p) for p in found["loc"]]
    kind, value = found["type"], found["input"]
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    names, allowed, within = _resolve(path)
    key = ".".join(name for name in names if not name.isdecimal())
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(names[-1], allowed, 1)
        hint = f"did you mean {'.'.join([*names[:-1], near[0]])}?" if near else f"allowed: {', '.join(allowed)}"
        return f"{key}: no such key; {hint}{more}"
    if kind == "missing":
        return f"{key}: is missing; add it, or give {key}=VALUE on the command line{more}"
    if kind == "literal_error":
        near = difflib.get_close_matches(str(value), found["ctx"]["expected"].replace("'", "").split(), 1)
        hint = f"; did you mean {near[0].rstrip(',')}?" if near else ""
        return f"{key}: {value!r} is not allowed; choose {found['ctx']['expected']}{hint}{more}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        options = found["ctx"].get("expected_tags") or ", ".join(
            repr(tag) for model in TERM_CONFIGS for tag in _tags(model)
        )
        if not isinstance(value, dict):
            return f"{key}: found {value!r}; a section with name: {options} is needed{more}"
        if "name" not in value:
            return f"{key}.name: is missing; choose {options}{more}"
        name = str(value["name"])
        near = difflib.get_close_matches(name.lower(), options.replace("'", "").split(", "), 1)
        hint = f", did you mean {near[0]}" if near else ""
        function = next((f for f in losses.__all__ if f"{f}_".startswith(f"{name}_")), None)
        hint = f" (losses.{function} is for tensors only)" if function else hint
        return f"{key}: name {name!r} is not allowed{hint}; choose name: {options}{more}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        keys = f"keys of its own: {', '.join(within)}" if within else "keys of its own such as in configs/*.yaml"
        return f"{key}: found {value!r}; a section is needed, with {keys}{more}"
    if kind == "list_type" and not isinstance(value, dict):
        return f"{key}: found {value!r}; a list is needed, such as [{value}]{more}"
    if kind == "value_error":
        return f"{key + ': ' if key else ''}{found['ctx']['error']}{more}"
    message = found["msg"][0].lower() + found["msg"][1:]
    shown = f"; found {value!r}" if not isinstance(value, dict) else ""
    return f"{key}: {message}{shown}{more}"


def _unshared(value: Any) -> Any:
    """A copy in which no two keys hold the same section, as they do after YAML's `*alias`."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _resolve(path: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The user's own key path, without pydantic's union tags; the keys allowed where the last one stands; and those
    that it may have itself, where that does not depend on a name."""
    names, allowed = [], list(Config.model_fields)
    models, is_free = [Config], False  # what the next part belongs to; whether that is a name the user may choose
    for part in path:
        tagged = [model for model in models if len(models) > 1 and not is_free and part in _tags(model)]
        if tagged:
            models = tagged
            continue
        names.append(part)
        if is_free:
            is_free = False
            continue
        field = models[0].model_fields.get(part) if models else None
        allowed = list(models[0].model_fields) if models else allowed
        models = _sections_of(field.annotation) if field else []
        is_free = field is not None and get_origin(field.annotation) is dict
    return names, allowed, list(models[0].model_fields) if len(models) == 1 and not is_free else []


def _tags(model: type[Section]) -> tuple[str, ...]:
    return model.model_fields["name"].annotation.__args__


def _sections_of(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for option in get_args(annotation) for section in _sections_of(option)]


def _near_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], 1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def trains_alike(one: Config, other: Config) -> bool:
    """Whether two runs come to the same end: where they write and how many processes load does not matter, nor what is
    watched, as long as nothing is left out for it, nor how losses are balanced where there are none."""
    passed_over = {"output_dir", "overwrite", "tracking", "data"}
    if not (one.losses or other.losses):
        passed_over |= {"balance", "guards"}
    if all("skip" not in (config.guards.dominating_term, config.guards.bad_term) for config in (one, other)):
        passed_over.add("guards")
    return all(
        getattr(one, key) == getattr(other, key) for key in Config.model_fields if key not in passed_over
    ) and one.data.model_copy(update={"workers": 0}) == other.data.model_copy(update={"workers": 0})

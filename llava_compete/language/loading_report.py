"""What transformers reports of a load, read strictly: every tensor of the model, and no other, must be in the files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from llava_compete.errors import UserError, and_more


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Turn what transformers' loader raises for the files of `path` into a `UserError` of one line."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or damaged weights ({error})") from error
    except RuntimeError as error:
        if "automatic conversion" not in str(error):
            raise
        raise UserError(
            f"{path}: weights do not fit config.json: missing or misshapen tensors among those that the language "
            "model's own experts are made of (transformers' report above names them)"
        ) from error


def refuse_wrong_keys(path: str, info: dict[str, Any]) -> None:
    """Raise a `UserError` that names the tensors which transformers' loading report says do not fit; `path` is where
    they come from."""
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(_describe_key(key) for key in info.get(kind, ()))
        if keys:
            problems.append(f"{kind.removesuffix('_keys')} {and_more(keys)}")
    if problems:
        raise UserError(f"{path}: weights do not fit config.json: {'; '.join(problems)}")


def _describe_key(key: Any) -> str:
    """A key's name; of a mismatched one (name, stored shape, expected shape) all three."""
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} {list(found)} (expected {list(expected)})"

"""Where a published model is: a directory, or a name on the hub, which is downloaded."""

from __future__ import annotations

from pathlib import Path

from llava_compete.errors import UserError


def directory_of(source: str | Path, key: str = "") -> Path:
    """The directory of `source`; `key` is the option or the config key that names it, for messages.

    Raises:
        UserError: neither a directory nor to be had from the hub.
    """
    named = f"{key}: {source}" if key else str(source)
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise UserError(f"{named}: no such directory")
    from huggingface_hub import snapshot_download

    from llava_compete.model.hub_errors import HUB_ERRORS

    try:
        return Path(snapshot_download(str(source)))
    except HUB_ERRORS as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{named}: no such directory, and not to be had from the hub: {line}") from error

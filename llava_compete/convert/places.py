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
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(str(source)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"{named}: no such directory, and not to be had from the hub: {line}") from error

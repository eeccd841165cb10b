"""What huggingface_hub raises when a hub refuses, is not there, or breaks off."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

# A connection that fails comes as the HTTP client's own error, and which client that is depends on the version; its
# base class is that of HfHubHTTPError.
_OF_THE_CLIENT = tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
HUB_ERRORS: tuple[type[Exception], ...] = (
    *_OF_THE_CLIENT, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, ValueError, OSError
)  # fmt: skip

"""A socket that is taken before weights are read, and an application that answers at it."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn

from llava_compete.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free.

    Raises:
        UserError: the port is in use, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:  # the latter two of a port or a host that none can be
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there: {reason}") from error


def address_of(listening: socket.socket) -> str:
    """Where a client on this machine finds it: http://HOST:PORT."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reached_by_others(listening: socket.socket) -> bool:
    """Whether the address is more than this machine's own."""
    return not str(listening.getsockname()[0]).startswith(("127.", "::1"))


def serve(app: Any, listening: socket.socket) -> None:
    """Answer until the process is told to end."""
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run(sockets=[listening])

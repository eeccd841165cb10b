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
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error.strerror or error}") from error


def reached_by_others(listening: socket.socket) -> bool:
    """Whether the address is more than this machine's own."""
    return not str(listening.getsockname()[0]).startswith(("127.", "::1"))


def serve(app: Any, listening: socket.socket) -> None:
    """Answer until the process is told to end."""
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run(sockets=[listening])

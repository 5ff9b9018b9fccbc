"""Ports for processes that must be told one. Where a port of 0 can be given, that is better."""

import contextlib
import random
import socket


def free_port() -> int:
    """A port below those that the system gives to whoever asks for any, which another process could have by the time of use."""
    drawn = random.SystemRandom()
    while True:
        port = drawn.randrange(12_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port

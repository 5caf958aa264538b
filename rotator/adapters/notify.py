"""Telling systemd how a service is (``Type=notify``). Without systemd nothing happens."""

import os
import socket


def tell_systemd(state: str) -> bool:
    """Send e.g. ``READY=1`` to who started us. False where nobody asked for it, or it could not be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # an abstract socket's name begins with a null byte
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), address)
    except OSError:
        return False
    return True

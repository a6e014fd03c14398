"""How a device is reached: a POSIX shell at the other end of a pipe. One function per URL scheme; pure, nothing is run.

    ssh://[user@]host[:port]    the system's ssh, with the user's own configuration, keys and known hosts
    adb://SERIAL                the system's adb

Nothing here can prompt: ssh runs in batch mode, and a URL that holds a password is refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from compressor.errors import ConfigError

__all__ = ["SCHEMES", "Transport", "transport"]

SSH_FAILED = 255  # ssh's own failures; nothing we start there exits with it
ADB_FAILED = re.compile(r"(adb|error): ")  # adb has no exit status of its own; it may first tell of its daemon
SSH_OPTIONS = (
    *("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=4"),
    *("ForwardAgent=no", "ForwardX11=no", "ClearAllForwardings=yes", "PermitLocalCommand=no"),
)
NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
HOST = re.compile(rf"{NAME}|[0-9A-Fa-f:]+")
USER = re.compile(NAME)
SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")


@dataclass(frozen=True)
class Transport:
    """A way to a device.

    Attributes:
        url: what errors call the device.
        command: ``(script)`` -> the local command that runs a one-line POSIX shell script there, with stdin, stdout,
            stderr and the exit status passed through.
        lost: ``(status, stderr)`` -> whether the connection failed, and not the script.
        scratch: shell word of the folder that temporary folders are made in.
        by_hand: what to type to see whether the device answers.
    """

    url: str
    command: Callable[[str], list[str]]
    lost: Callable[[int, str], bool]
    scratch: str
    by_hand: str


def transport(url: str) -> Transport:
    """The way to the device at `url`.

    Raises:
        ConfigError: no such scheme, a password in it, or a host, user, port or serial that cannot be one.

    >>> transport("ssh://pi@board:2222").command("true")[-5:]
    ['2222', '-l', 'pi', 'board', 'exec sh -c true']
    """
    try:
        parts = urlsplit(url)
        password = parts.password
    except ValueError as error:
        raise _refused(url, f"a valid URL ({error})") from None
    if password is not None:
        raise ConfigError(
            f"device must be reached without a password in its URL, got {_masked(url)!r}.",
            hint="Install a key instead: ssh-copy-id user@host",
        )
    if parts.scheme not in SCHEMES or parts.path or parts.query or parts.fragment:
        raise _refused(url, "ssh://[user@]host[:port] or adb://SERIAL")
    return SCHEMES[parts.scheme](url, parts)


def _ssh(url: str, parts: SplitResult) -> Transport:
    name, user = parts.netloc.rpartition("@")[2], parts.username
    # Not parts.hostname, which is in lower case: a Host of ssh_config may not be
    host = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
    try:
        port = parts.port
    except ValueError:
        raise _refused(url, "a URL whose port is a number up to 65535") from None
    if not HOST.fullmatch(host) or (user is not None and not USER.fullmatch(user)):
        raise _refused(url, "ssh://[user@]host[:port]")
    where = [*(("-p", str(port)) if port else ()), *(("-l", user) if user else ())]
    options = [word for option in SSH_OPTIONS for word in ("-o", option)]
    return Transport(
        url=url,
        command=lambda script: ["ssh", "-T", *options, *where, host, f"exec sh -c {shlex.quote(script)}"],
        lost=lambda status, stderr: status == SSH_FAILED,
        scratch='"${TMPDIR:-/tmp}"',
        by_hand=shlex.join(["ssh", *where, host, "true"]),
    )


def _adb(url: str, parts: SplitResult) -> Transport:
    serial = parts.netloc
    if not SERIAL.fullmatch(serial):
        raise _refused(url, "adb://SERIAL")
    return Transport(
        url=url,
        command=lambda script: ["adb", "-s", serial, "shell", "-T", f"exec sh -c {shlex.quote(script)}"],
        lost=lambda status, stderr: status != 0 and any(map(ADB_FAILED.match, stderr.splitlines())),
        scratch="/data/local/tmp",
        by_hand=shlex.join(["adb", "-s", serial, "shell", "true"]),
    )


SCHEMES: Mapping[str, Callable[[str, SplitResult], Transport]] = {"adb": _adb, "ssh": _ssh}


def _refused(url: str, rule: str) -> ConfigError:
    return ConfigError(f"device must be {rule}, got {_masked(url)!r}.", hint="For example: ssh://pi@192.168.1.20")


def _masked(url: str) -> str:
    """`url`, well-formed or not, without what may be a password: it is shown, and kept in logs."""
    return re.sub(r"^(\w+://[^:/@]*|(?!\w+://)[^:/@]*):.*@", r"\1:...@", url, flags=re.DOTALL)

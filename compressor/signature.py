"""Who made a bundle: an SSH signature over manifest.json, which holds the digest of every other file.

    ssh-keygen -Y sign -n vitrim -f KEY BUNDLE/manifest.json      signs: writes manifest.json.sig beside it
    vitrim verify BUNDLE --signers FILE                           FILE: a line "name ssh-ed25519 AAAA..." per signer

The cryptography is OpenSSH's; nothing here reads a key.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import ConfigError, TargetUnavailable

__all__ = ["Signature", "check_signature"]

NAMESPACE = "vitrim"  # what is signed for another purpose is no signature of a bundle
LIMIT_S = 30


@dataclass(frozen=True)
class Signature:
    """What a signature proves: with `valid`, the manifest is as it was signed, by `signer` where signers were given."""

    valid: bool
    signer: str | None
    reason: str  # what OpenSSH says


def check_signature(manifest: Path, signers: Path | None) -> Signature | None:
    """The signature beside `manifest`; None where there is none and nobody asks whose it is.

    Args:
        manifest: a bundle's manifest.json; its signature is ``manifest.json.sig``.
        signers: an OpenSSH allowed-signers file; without it any key will do, which proves only that nothing was changed.

    Raises:
        ConfigError: `signers` is not a file.
        TargetUnavailable: there is something to check, and no ssh-keygen here.
    """
    if signers is not None and not signers.is_file():
        raise ConfigError(f"signers must be a file, got {str(signers)!r}.", hint="A line: name ssh-ed25519 AAAA...")
    file = manifest.with_name(f"{manifest.name}.sig")
    if not file.is_file():
        return None if signers is None else Signature(valid=False, signer=None, reason="the bundle is not signed")
    common = ("-n", NAMESPACE, "-s", str(file))
    if signers is None:
        ok, said = _ssh_keygen(manifest, "check-novalidate", *common)
        return Signature(ok, None, said)
    known, names = _ssh_keygen(manifest, "find-principals", "-s", str(file), "-f", str(signers))
    if not known:
        return Signature(valid=False, signer=None, reason="it is of none of the signers")
    name = names.splitlines()[0]
    ok, said = _ssh_keygen(manifest, "verify", *common, "-f", str(signers), "-I", name)
    return Signature(ok, name if ok else None, said)


def _ssh_keygen(manifest: Path, *arguments: str) -> tuple[bool, str]:
    """Whether ``ssh-keygen -Y`` agreed, and what it said."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise TargetUnavailable(
            "ssh-keygen must be installed to check a signature, found none.", hint="Install OpenSSH."
        )
    with manifest.open("rb") as text:
        done = subprocess.run(
            [program, "-Y", *arguments], stdin=text, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    return done.returncode == 0, (done.stdout or done.stderr).strip()

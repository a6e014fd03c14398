"""Signatures of a manifest by the real ssh-keygen: of the right key, another key, a changed text, and none at all."""

import shutil
import subprocess
from pathlib import Path

import pytest

from compressor.errors import ConfigError, TargetUnavailable
from compressor.signature import check_signature

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")


def key(folder: Path, name: str) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    return folder / name


def sign(manifest: Path, with_key: Path, namespace: str = "vitrim") -> None:
    manifest.with_name("manifest.json.sig").unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-n", namespace, "-f", with_key, manifest], check=True)


@pytest.fixture
def manifest(tmp_path) -> Path:
    path = tmp_path / "manifest.json"
    path.write_text('{"schema": 1}\n')
    return path


@pytest.fixture
def signers(tmp_path) -> Path:
    """Those that may sign: alice."""
    public = key(tmp_path, "alice").with_suffix(".pub").read_text()
    path = tmp_path / "allowed_signers"
    path.write_text(f"alice {public}")
    return path


def test_a_signature_is_traced_to_its_signer(manifest, signers, tmp_path):
    sign(manifest, tmp_path / "alice")
    found = check_signature(manifest, signers)
    assert found is not None and found.valid and found.signer == "alice", found
    anybody = check_signature(manifest, None)
    assert anybody is not None and anybody.valid and anybody.signer is None and "SHA256:" in anybody.reason


def test_a_stranger_s_signature_proves_integrity_alone(manifest, signers, tmp_path):
    sign(manifest, key(tmp_path, "mallory"))
    found = check_signature(manifest, signers)
    assert found is not None and not found.valid and found.signer is None
    anybody = check_signature(manifest, None)
    assert anybody is not None and anybody.valid


@pytest.mark.parametrize("asked", [True, False])
def test_a_changed_manifest_is_seen(manifest, signers, tmp_path, asked):
    sign(manifest, tmp_path / "alice")
    manifest.write_text('{"schema": 2}\n')
    found = check_signature(manifest, signers if asked else None)
    assert found is not None and not found.valid and found.signer is None


def test_a_signature_made_for_another_purpose_is_none(manifest, signers, tmp_path):
    sign(manifest, tmp_path / "alice", namespace="git")
    found = check_signature(manifest, signers)
    assert found is not None and not found.valid


def test_no_signature_fails_only_who_asks_for_one(manifest, signers):
    assert check_signature(manifest, None) is None
    found = check_signature(manifest, signers)
    assert found is not None and not found.valid and found.reason == "the bundle is not signed"


def test_what_cannot_be_checked_is_not_passed(manifest, signers, tmp_path, monkeypatch):
    sign(manifest, tmp_path / "alice")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetUnavailable, match="ssh-keygen must be installed"):
        check_signature(manifest, signers)
    with pytest.raises(ConfigError, match="signers must be a file"):
        check_signature(manifest, tmp_path / "missing")

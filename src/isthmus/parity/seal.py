"""The seal of a bundle: what was verified, tensor by tensor and file by file, what was found, and who says so.

A seal finds damage, mixed-up files and bundles that no gate has passed. Without a signature, who can write the bundle
can write another seal; then its id differs from the one in the run's parity.json. With a signature (Ed25519), a server
that knows whom to trust accepts no other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from isthmus import __version__
from isthmus.errors import DamagedFile, GateRefused, IsthmusError
from isthmus.formats import recognise_format
from isthmus.formats.files.bundle import CHECKSUMS, SEAL, file_hashes, first_stranger, read_config
from isthmus.parity.gate import refusal, refuses, shows_enough
from isthmus.parity.manifest import (
    MANIFEST,
    canonical_sha256,
    first_difference,
    read_checksums,
    read_manifest,
    tensor_hashes,
)
from isthmus.parity.signing import is_signed, public_key, sign
from isthmus.records import Check, ParityVerdict
from isthmus.run import write_atomic

VERDICT = "verdict.json"
State = Literal["sealed", "unsealed", "untrusted", "tampered", "refused"]
"""What a bundle is: sealed and unchanged; without a seal; sealed by nobody who is trusted; changed after it was
sealed; or refused by a gate."""


class Lineage(BaseModel):
    """Where the weights come from, as far as it is known. `source_sha256` is the identity in the manifest, `run_sha256`
    the hash of the run's list of hashes when it sealed: it covers records, events and what the run learnt from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source_sha256: str | None = None
    checkpoint_sha256: str | None = None
    recipe_sha256: str | None = None
    run_sha256: str | None = None
    source_pool: str | None = None
    target_pool: str | None = None


class Seal(BaseModel):
    """The content of seal.json. Hashes are SHA-256, hexadecimal; `sha256` is that of everything else but the signature.

    `content` names what crosses: format and tensors by hash, however they are sharded or ordered. `manifest` is the id
    of manifest.json, `verdict_sha256` the hash of verdict.json, `parent` the id of the seal that came before. `signer`
    is a public key; since the hash covers it, a signature cannot be taken away unseen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = 2
    format: str
    content: str
    tensors: dict[str, str]
    files: dict[str, str]
    manifest: str | None
    verdict: Literal["pass"]
    verdict_sha256: str | None
    checks: dict[str, str]
    lineage: Lineage
    parent: str | None
    isthmus: str
    torch: str
    signer: str | None
    sha256: str = ""
    signature: str | None = None

    @property
    def id(self) -> str:
        """The first 16 digits of the seal's hash: enough to tell seals apart."""
        return self.sha256[:16]

    def canonical_sha256(self) -> str:
        """The hash of JSON with sorted keys and no spaces, without `sha256` itself and without the signature."""
        content = self.model_dump(mode="json", exclude={"sha256", "signature"})
        if self.lineage.run_sha256 is None:
            del content["lineage"]["run_sha256"]  # as in seals from before runs had hashes
        return canonical_sha256(content)

    @property
    def message(self) -> bytes:
        """What is signed."""
        return f"isthmus seal {self.version} {self.sha256}".encode()


@dataclass(frozen=True)
class Standing:
    """The state of a bundle, its seal if that holds, and in words why the state is another than sealed."""

    state: State
    seal: Seal | None
    reason: str = ""


def write_seal(
    bundle_folder: Path,
    *,
    verdict: Literal["pass", "refuse"],
    checks: Sequence[Check] = (),
    lineage: Lineage | None = None,
    sign_key: Path | None = None,
    parent: str | None = None,
) -> Seal:
    """Seal a bundle that passed, and sign the seal if there is a key.

    `parent` is the manifest's if absent. Raises GateRefused if the verdict, or that of verdict.json, is not `pass`, or
    a check of either refuses; DamagedFile if the bundle does not match its checksums or its manifest.
    """
    said = read_verdict(bundle_folder)
    if verdict != "pass" or (said is not None and said.verdict != "pass"):
        raise GateRefused(f"{bundle_folder} is not sealed: the parity verdict is 'refuse'")
    found = [*checks, *(said.checks if said else ())]
    if not shows_enough(found):
        opening = f"{bundle_folder} is not sealed: {'not every' if found else 'no'} check passed."
        raise GateRefused(refusal(opening, found))
    chosen, files = recognise_format(read_config(bundle_folder)), _whole_files(bundle_folder)
    tensors = tensor_hashes(bundle_folder)
    manifest = read_manifest(bundle_folder) if MANIFEST in files else None
    if manifest is not None and (problem := first_difference(tensors, manifest.tensors)) is not None:
        raise DamagedFile(f"{bundle_folder} is not sealed: {problem[0]} of {MANIFEST}")
    lineage = lineage or Lineage()
    if manifest is not None and lineage.source_sha256 is None:
        lineage = lineage.model_copy(update={"source_sha256": manifest.source})
    seal = Seal(
        format=chosen.name,
        content=content_id(chosen.name, tensors),
        tensors=tensors,
        files=files,
        manifest=manifest.id if manifest else None,
        verdict="pass",
        verdict_sha256=files.get(VERDICT),
        checks={check.name: f"{check.outcome}: {check.figure or check.detail}" for check in checks},
        lineage=lineage,
        parent=parent or (manifest.parent if manifest else None),
        isthmus=__version__,
        torch=torch.__version__,
        signer=public_key(sign_key) if sign_key else None,
    )
    seal = seal.model_copy(update={"sha256": seal.canonical_sha256()})
    if sign_key:
        seal = seal.model_copy(update={"signature": sign(sign_key, seal.message)})
    write_atomic(bundle_folder / SEAL, seal.model_dump_json(indent=2).encode() + b"\n")
    return seal


def verify_seal(bundle_folder: Path, expected_id: str | None = None, trusted: Collection[str] | None = None) -> Seal:
    """Check a bundle against its seal. Raises GateRefused naming the file or tensor that is missing, added or changed.

    With `expected_id`, the id in the run's parity.json, a bundle that was sealed again is refused too. With `trusted`
    public keys, so is one that none of them has signed. A signature that does not hold is refused in any case.
    """
    seal = _read_seal(bundle_folder)
    if expected_id is not None and seal.id != expected_id:
        raise _refusal(
            bundle_folder, f"its seal is {seal.id}, the hand-off recorded {expected_id}: it is another bundle"
        )
    _check_signature(bundle_folder, seal)
    if trusted is not None and seal.signer not in trusted:
        raise _refusal(bundle_folder, _untrusted(seal))
    if (stranger := first_stranger(bundle_folder)) is not None:
        raise _refusal(bundle_folder, " ".join(stranger))
    found = file_hashes(bundle_folder, without=(SEAL,))
    for name, sha256 in seal.files.items():
        if name not in found:
            raise _refusal(bundle_folder, f"{name} is missing")
        if found[name] != sha256:
            raise _refusal(bundle_folder, _what_changed(bundle_folder, name, seal))
    if added := sorted(found.keys() - seal.files.keys()):
        raise _refusal(bundle_folder, f"{added[0]} was added after sealing")
    if (changed := first_difference(tensor_hashes(bundle_folder), seal.tensors)) is not None:
        raise _refusal(bundle_folder, changed[0])
    return seal


def standing(
    bundle_folder: Path,
    expected_id: str | None = None,
    trusted: Collection[str] | None = None,
    *,
    refused: bool = False,
) -> Standing:
    """What a bundle is, without raising for what is found. `refused`: a gate elsewhere has refused it.

    A verdict that passed with a doubt is no verdict that passed; of a configuration, `unknown` is the older word for a
    caution.
    Raises GateRefused only if there is no bundle.
    """
    _require_folder(bundle_folder)
    try:
        said = read_verdict(bundle_folder)
    except DamagedFile as error:
        return Standing("tampered", None, str(error))
    if refused or (said is not None and said.verdict != "pass"):
        culprit = f": {said.culprit}" if said is not None and said.culprit else ""
        return Standing("refused", None, f"the parity gate refused {bundle_folder}{culprit}")
    if doubts := [check.name for check in (said.checks if said else ()) if refuses(check) and check.layer != "config"]:
        reason = f"{bundle_folder}: its gate could not tell about {doubts[0]!r}; verify it again"
        return Standing("refused", None, reason)
    if not (bundle_folder / SEAL).is_file():
        return Standing("unsealed", None, str(_no_seal(bundle_folder)))
    try:
        seal = verify_seal(bundle_folder, expected_id)
    except GateRefused as error:
        return Standing("tampered", None, str(error))
    if trusted is not None and seal.signer not in trusted:
        return Standing("untrusted", seal, str(_refusal(bundle_folder, _untrusted(seal))))
    return Standing("sealed", seal)


def read_verdict(bundle_folder: Path) -> ParityVerdict | None:
    """The verdict in a bundle, None if it has none. Raises DamagedFile if it cannot be read."""
    path = bundle_folder / VERDICT
    if not path.is_file():
        return None
    try:
        return ParityVerdict.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DamagedFile(f"{path} cannot be read: {error}") from None


def content_id(format_name: str, tensors: dict[str, str]) -> str:
    """What names the content of a bundle: a hash of its format and of its tensors' hashes by name."""
    return canonical_sha256({"format": format_name, "tensors": tensors})


def _whole_files(bundle_folder: Path) -> dict[str, str]:
    """The hash of every file, checksums.json among them; all but it must be what it recorded."""
    if (stranger := first_stranger(bundle_folder)) is not None:
        raise DamagedFile(f"{bundle_folder / stranger[0]} {stranger[1]}; nothing is sealed")
    found, recorded = file_hashes(bundle_folder, without=(SEAL,)), read_checksums(bundle_folder)
    for name in sorted(found.keys() | recorded.keys()):
        if name != CHECKSUMS and found.get(name) != recorded.get(name):
            state = "is missing" if name not in found else "does not match its hash"
            state = state if name in recorded else "does not belong to this bundle"
            raise DamagedFile(f"{bundle_folder / name} {state}; nothing is sealed")
    return found


def _read_seal(bundle_folder: Path) -> Seal:
    path = bundle_folder / SEAL
    _require_folder(bundle_folder)
    if not path.is_file():
        raise _no_seal(bundle_folder)
    try:
        seal = Seal.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise _refusal(bundle_folder, f"{SEAL} cannot be read ({where}: {first['msg']})") from None
    if seal.canonical_sha256() != seal.sha256:
        raise _refusal(bundle_folder, f"{SEAL} does not match its own hash: it was edited")
    return seal


def _require_folder(bundle_folder: Path) -> None:
    if not bundle_folder.is_dir():
        raise GateRefused(f"there is no bundle at {bundle_folder}; `isthmus handoff RUN` writes one")


def _no_seal(bundle_folder: Path) -> GateRefused:
    return GateRefused(
        f"{bundle_folder} is not sealed: no parity gate has passed it. "
        "`isthmus handoff RUN` or `isthmus verify BUNDLE` checks and seals it"
    )


def _check_signature(bundle_folder: Path, seal: Seal) -> None:
    if seal.signer is None and seal.signature is None:
        return
    if seal.signer is None or seal.signature is None:
        what = "a signature and no signer" if seal.signer is None else f"been signed by {seal.signer}, and no signature"
        raise _refusal(bundle_folder, f"{SEAL} has {what}: it was edited")
    if not is_signed(seal.signer, seal.signature, seal.message):
        raise _refusal(bundle_folder, f"the signature in {SEAL} is not that of {seal.signer}")


def _untrusted(seal: Seal) -> str:
    return "its seal is not signed" if seal.signer is None else f"it is signed by {seal.signer}, who is not trusted"


def _what_changed(bundle_folder: Path, name: str, seal: Seal) -> str:
    if not name.endswith(".safetensors"):
        return f"{name} does not match its hash"
    try:
        changed = first_difference(tensor_hashes(bundle_folder), seal.tensors)
    except IsthmusError as error:
        return str(error)
    return (
        f"{name}: {changed[0]}"
        if changed
        else f"{name} does not match its hash, though its tensors do: its header changed"
    )


def _refusal(bundle_folder: Path, reason: str) -> GateRefused:
    return GateRefused(
        f"{bundle_folder} is refused: {reason}. "
        "Repeat `isthmus handoff RUN` or `isthmus verify BUNDLE`, or copy the bundle again from where it was sealed"
    )

"""`isthmus inspect` and `isthmus key`: what they say of bundles in every state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from isthmus.cli import cli
from isthmus.errors import IsthmusError
from isthmus.formats.files.bundle import write_bundle
from isthmus.model.model import Model
from isthmus.parity.coverage import check_coverage
from isthmus.parity.manifest import add_file, write_manifest
from isthmus.parity.seal import write_seal
from isthmus.parity.signing import public_key
from isthmus.recipe.read import load_recipe
from isthmus.records import Check, HandoffRecord, LedgerRow, ParityVerdict
from isthmus.run import Figure, RunFolder
from isthmus.tools.inspect import compare, find_bundle, inspect
from tests.support.bundles import TinyTokenizer, passed
from tests.support.flow_recipe import RECIPE
from tests.support.small import tiny_architecture

ARCHITECTURE = tiny_architecture()
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A w8a8 bundle with its manifest."""
    state = Model(ARCHITECTURE).initialise(0).state_dict()
    write_bundle(tmp_path / "b", "w8a8", state, ARCHITECTURE, TinyTokenizer(0, 1))
    entries, _ = check_coverage(state, tmp_path / "b")
    write_manifest(tmp_path / "b", coverage=entries, architecture=ARCHITECTURE, parent="a" * 16)
    return tmp_path / "b"


def judge(folder: Path, outcome: str) -> None:
    """Write a verdict with a ledger of twelve rows, the last the worst."""
    figure = Figure.measured(0.5, "nats/token", "a test", rehearsed=False)
    limit = Figure(value=0.1, unit="nats/token", kind="declared", source="a test")
    what = {"layer": "modules", "figure": figure, "limit": limit, "detail": "", "module": "model.layers.1.mlp"}
    verdict = ParityVerdict(
        verdict=outcome,  # pyright: ignore[reportArgumentType]
        target="cpu",
        rehearsed=False,
        checks=[Check(name="replay", outcome="pass" if outcome == "pass" else "fail", **what)],
        ledger=[
            LedgerRow(module=f"model.layers.{i}.mlp", kind="mlp", quantisation=0.01, chip=i / 100, floor=None)
            for i in range(12)
        ],
        culprit=None if outcome == "pass" else "model.layers.1.mlp",
        operator=None if outcome == "pass" else "experts.3.down_proj",
        isthmus="0",
        torch="0",
        started=0.0,
        ended=1.0,
    )
    add_file(folder, "verdict.json", verdict.model_dump_json().encode())


def asked(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def test_a_sealed_bundle_says_what_it_is(bundle, tmp_path):
    judge(bundle, "pass")
    key = tmp_path / "gate.pem"
    code, public = asked("key", "new", key)
    assert code == 0 and public.strip() == public_key(key)
    seal = write_seal(bundle, **passed(), sign_key=key)
    found = inspect(bundle, [public.strip()])
    assert (found.state, found.seal, found.content, found.parent) == ("sealed", seal.id, seal.content, "a" * 16)
    stored = load_file(bundle / "model.safetensors")
    assert found.tensors == {
        "BF16": sum(tensor.dtype.itemsize == 2 for tensor in stored.values()),
        "I8": sum(tensor.dtype.itemsize == 1 for tensor in stored.values()),
        "F32": sum(tensor.dtype.itemsize == 4 for tensor in stored.values()),
    }
    assert found.bytes == sum(path.stat().st_size for path in bundle.iterdir())
    assert [row.module for row in found.ledger][:2] == ["model.layers.11.mlp", "model.layers.10.mlp"]
    assert len(found.ledger) == 8 and found.coverage["quantised"] == found.tensors["I8"]
    assert found.lineage["checkpoint_sha256"] == "c" * 64 and found.lineage["source_sha256"] == found.source
    assert public.strip() in found.signature and "who is trusted" in found.signature
    code, page = asked("inspect", bundle)
    assert code == 0
    for part in ("sealed", "w8a8", seal.id, "a" * 16, "replay", "model.layers.11.mlp", public.strip(), "not asked"):
        assert part in page
    code, text = asked("inspect", bundle, "--json")
    assert code == 0 and json.loads(text) == {**inspect(bundle).model_dump(mode="json")}


def test_an_unsealed_a_tampered_and_a_refused_bundle_are_called_so(bundle):
    code, page = asked("inspect", bundle)
    assert code == 0 and "unsealed" in page and "no parity gate has passed" in page
    write_seal(bundle, **passed())
    content = bytearray((bundle / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(content)
    code, page = asked("inspect", bundle)
    assert code == 1 and "tampered" in page and "does not match its hash" in page
    judge(bundle, "refuse")
    code, page = asked("inspect", bundle)
    assert code == 1 and "refused" in page and "model.layers.1.mlp / experts.3.down_proj" in page


def test_who_trusts_someone_gets_an_exit_code(bundle, tmp_path):
    write_seal(bundle, **passed())
    (tmp_path / "keys").write_text(asked("key", "new", tmp_path / "gate.pem")[1])
    code, page = asked("inspect", bundle, "--trust", tmp_path / "keys")
    assert code == 1 and "untrusted" in page and "is not signed" in page


def test_a_manifest_that_cannot_be_read_is_said(bundle):
    (bundle / "manifest.json").write_text("{")
    found = inspect(bundle)
    assert found.manifest is None and "manifest.json cannot be read" in found.problems[0]
    assert "cannot be read" in asked("inspect", bundle)[1]


@pytest.mark.parametrize("with_manifest", [True, False])
def test_the_difference_of_two_bundles(bundle, tmp_path, with_manifest):
    other = tmp_path / "other"
    state = Model(ARCHITECTURE).initialise(0).state_dict()
    state[NORM] = state[NORM] * 2
    write_bundle(other, "w8a8", state, ARCHITECTURE, TinyTokenizer(0, 1))
    tensors = load_file(other / "model.safetensors")
    tensors["extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, other / "model.safetensors")
    if with_manifest:
        write_manifest(other)
    found = compare(bundle, other)
    assert (found.changed, found.only_here, found.only_there) == ([NORM], ["model.norm.weight"], ["extra"])
    assert found.same == len(tensors) - 2
    _, page = asked("inspect", bundle, "--diff", other)
    assert NORM in page and "only there" in page
    assert json.loads(asked("inspect", bundle, "--diff", other, "--json")[1])["diff"]["changed"] == [NORM]
    assert compare(bundle, bundle).changed == []


def test_the_bundle_of_a_run_is_found_by_the_run_and_by_its_folder_of_bundles(bundle, tmp_path):
    run = RunFolder.create(tmp_path / "run", load_recipe(RECIPE))
    with pytest.raises(IsthmusError, match="isthmus handoff"):
        find_bundle(run.path)
    shutil.copytree(bundle, run.path / "bundle" / "w8a8")
    record = HandoffRecord(
        recipe_sha256=run.recipe.digest(),
        started=0.0,
        ended=1.0,
        source_pool="home",
        target_pool="away",
        format="w8a8",
        verdict="pass",
        checks=[],
        bundles={"w8a8": "bundle/w8a8"},
        seal_id=None,
        figures={},
    )
    run.write_record("parity", record)
    for named in (run.path, run.path / "bundle", run.path / "bundle" / "w8a8"):
        code, page = asked("inspect", named)
        assert code == 0 and str(run.path / "bundle" / "w8a8") in page


def test_architecture_and_parameters_are_named(bundle):
    code, page = asked("inspect", bundle)
    total = sum(value.numel() for value in Model(ARCHITECTURE).parameters())
    assert code == 0 and "deepseek_v3" in page and f"{total:,}, of which a token uses" in page


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(IsthmusError, match="is not a bundle"):
        inspect(tmp_path)

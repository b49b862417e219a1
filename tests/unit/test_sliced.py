"""Slices compute what their layers compute in the whole, and show which layer of an engine is wrong."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from isthmus.errors import IsthmusError
from isthmus.formats.files.bundle import read_bundle
from isthmus.formats.files.sliced import read_slice, write_slice
from isthmus.parity.capture import capture
from isthmus.parity.coverage import check_coverage
from isthmus.parity.manifest import write_manifest
from isthmus.progress import Watch
from isthmus.tools import slice as slicing
from isthmus.tools.verify import EngineAt, slices_of, verify_engine
from tests.support.engine_bundle import write_small_bundle

QUIET = Watch(quiet=True)
PLAIN = {"layers": None, "each": True, "bare": False, "tokens": 512}


@pytest.fixture(scope="module", params=["w8a8", "bf16", "modelslim_dynamic"])
def bundle(request, tmp_path_factory) -> Path:
    return captured(tmp_path_factory.mktemp("whole") / request.param, request.param)


def captured(folder: Path, format_name: str) -> Path:
    model, _ = write_small_bundle(folder, format_name)
    state = model.state_dict()
    entries, _ = check_coverage(state, folder)
    generator = torch.Generator().manual_seed(0)
    capture(folder, state, torch.randint(300, (8, 24), generator=generator).tolist())
    write_manifest(folder, coverage=entries, architecture=model.architecture)
    return folder


@torch.no_grad()
def test_a_slice_gives_what_its_layer_gives_in_the_whole(bundle, tmp_path):
    written = slicing.execute(bundle, tmp_path / "slices", QUIET, **PLAIN)
    whole = read_bundle(bundle).build()
    sequences = json.loads((bundle / "golden" / "replay.json").read_text())["sequences"]
    rows = [prompt + completion for prompt, completion in sequences]
    assert len(written) == whole.architecture.num_hidden_layers >= 2
    for layer, folder in enumerate(written):
        one, model = read_slice(folder), read_bundle(folder).build()
        assert one.layers == (layer, layer + 1) and one.lengths == [len(row) for row in rows]
        for ids, row in zip(one.sequences(), rows, strict=True):
            x = whole.model.embed_tokens(torch.tensor([row]))
            rotation = whole.model.rotary(torch.arange(len(row))[None])
            mask = torch.full((len(row), len(row)), float("-inf")).triu(1)[None, None]
            for before in range(layer):
                x = whole.model.layers[before](x, rotation, mask)
            x = whole.model.layers[layer](x.bfloat16().float(), rotation, mask)
            torch.testing.assert_close(model(torch.tensor([ids])), whole.logits(x), rtol=0, atol=1e-5)


def test_a_range_and_a_bare_slice(bundle, tmp_path):
    slicing.execute(bundle, tmp_path / "both", QUIET, **PLAIN | {"each": False, "layers": "0:2", "bare": True})
    found = read_bundle(tmp_path / "both")
    assert found.architecture.num_hidden_layers == 2 and read_slice(tmp_path / "both").name == "model.layers.0 to 1"
    tokens = torch.tensor([[5, 7, 2, 9]])
    with torch.no_grad():
        whole = read_bundle(bundle)
        if whole.architecture.num_hidden_layers == 2:
            assert found.build()(tokens).equal(whole.build()(tokens))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"each": False}, "--each"),
        ({"each": False, "layers": "7"}, "not within the layers"),
        ({"each": False, "layers": "1:1"}, "not within the layers"),
        ({"each": False, "layers": "first"}, "write 3 for layer 3"),
    ],
)
def test_layers_that_are_not_there_are_refused(bundle, tmp_path, asked, told):
    with pytest.raises(IsthmusError, match=told):
        slicing.execute(bundle, tmp_path / "out", QUIET, **PLAIN | asked)


def test_more_places_than_token_ids_and_slices_of_other_weights_are_refused(bundle, tmp_path):
    one = read_bundle(bundle)
    with pytest.raises(IsthmusError, match="as many token ids"):
        write_slice(tmp_path / "out", one, range(1), torch.zeros(301, one.architecture.hidden_size), [301])
    slicing.execute(bundle, tmp_path / "slices", QUIET, **PLAIN)
    write_small_bundle(tmp_path / "other", one.format, seed=9)
    with pytest.raises(IsthmusError, match="slice of other weights"):
        slices_of(tmp_path / "other", tmp_path / "slices")
    with pytest.raises(IsthmusError, match="holds no slices"):
        slices_of(bundle, tmp_path)


SERVE = f"{sys.executable} -m isthmus.engines.local --bundle {{bundle}} --port {{port}}"
FAULTY = """
import pathlib, subprocess, sys
from isthmus.formats.files.bundle import read_bundle, with_other_weights
folder, port = pathlib.Path(sys.argv[1]), sys.argv[2]
one = read_bundle(folder)
name = "model.layers.{layer}.self_attn.o_proj.weight_scale"
changed = one.tensors[name].clone()
changed[3] *= 1e-6
with_other_weights(pathlib.Path(sys.argv[3]), folder, one.tensors | {{name: changed}})
command = [sys.executable, "-m", "isthmus.engines.local", "--bundle", sys.argv[3], "--port", port]
sys.exit(subprocess.call(command))
"""


@pytest.mark.slow
def test_an_engine_that_loses_a_channel_of_one_layer_is_told_which(tmp_path):
    bundle = captured(tmp_path / "w8a8", "w8a8")
    slices = tmp_path / "slices"
    slicing.execute(bundle, slices, QUIET, **PLAIN)
    wrong = tmp_path / "layer.py"
    wrong.write_text(FAULTY.format(layer=0))
    shell = tmp_path / "serve.sh"
    faulty = f"{sys.executable} {wrong} $1 $2 {tmp_path / 'faulty'}"
    shell.write_text(f"case $1 in *layer-001) exec {faulty};; *) exec {SERVE.format(bundle='$1', port='$2')};; esac\n")
    command = f"sh {shlex.quote(str(shell))} {{bundle}} {{port}}"
    found = verify_engine(bundle, EngineAt(None, command=command), slices=slices)
    assert found.culprit == "model.layers.1"
    engine = [check for check in found.checks if check.layer == "engine"]
    assert {check.module for check in engine if check.outcome != "pass"} == {"model.layers.1"}
    assert any(check.name.startswith("model.layers.0") for check in engine)


def test_slices_need_a_command(bundle, tmp_path):
    with pytest.raises(IsthmusError, match="--serve-command"):
        verify_engine(bundle, EngineAt("http://127.0.0.1:9"), slices=tmp_path)

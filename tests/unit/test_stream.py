"""The streaming writer against the safetensors library, and bundles written from states that are read when asked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import file_hashes, read_bundle, write_bundle
from isthmus.formats.files.published import Checkpoint, StoredTensors
from isthmus.formats.files.stream import KINDS, TensorWriter
from isthmus.formats.parts.int8 import quantise_rows, quantise_weight
from isthmus.model.config import hf_config
from isthmus.model.model import Model
from tests.support.bundles import TinyTokenizer, published
from tests.support.small import architecture
from tests.support.small_dense import dense_architecture, randomised

TYPES = st.sampled_from(list(KINDS.values()))
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters='"\\'), min_size=1, max_size=6)


def layout_of(tensors: dict[str, torch.Tensor]):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(TYPES, SHAPES), min_size=1, max_size=12), st.randoms())
def test_the_bytes_are_those_of_the_library_in_whatever_order_tensors_come(tmp_path_factory, kinds, chance):
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in kinds.items()}
    order = list(tensors)
    chance.shuffle(order)
    folder = tmp_path_factory.mktemp("stream")
    with TensorWriter(folder, layout_of(tensors), 10**9, "these") as writer:
        for name in order:
            writer.write(name, tensors[name])
        writer.finish()
    written = (folder / "model.safetensors").read_bytes()
    assert written == safetensors.torch.save(tensors, metadata={"format": "pt"})
    assert writer.hashes == {"model.safetensors": hashlib.sha256(written).hexdigest()}


def test_shards_are_read_by_the_library_and_their_index_and_hashes_are_right(tmp_path: Path):
    tensors = {f"t{index}": torch.randn(index + 1, 7) for index in range(9)}
    with TensorWriter(tmp_path, layout_of(tensors), 400, "these") as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
        writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    for file in files:
        found = load_file(tmp_path / file)
        assert found.keys() == {name for name, where in index["weight_map"].items() if where == file}
        assert all(torch.equal(found[name], tensors[name]) for name in found)
        assert sum(t.nbytes for t in found.values()) <= 400 or len(found) == 1
    assert writer.hashes == file_hashes(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("other", torch.zeros(2), "these: unexpected other"),
        ("a", torch.zeros(3), r"these: a is float32\[3\] and should be float32\[2\]"),
        ("a", torch.zeros(2, dtype=torch.int8), "these: a is int8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tmp_path: Path, name: str, tensor: torch.Tensor, words: str):
    layout = layout_of({"a": torch.zeros(2), "b": torch.zeros(1)})
    with TensorWriter(tmp_path, layout, 100, "these") as writer, pytest.raises(DamagedFile, match=words):
        writer.write(name, tensor)


def test_a_tensor_that_never_came_or_came_twice_is_named(tmp_path: Path):
    with TensorWriter(tmp_path, layout_of({"a": torch.zeros(2), "b": torch.zeros(1)}), 100, "these") as writer:
        writer.write("a", torch.zeros(2))
        with pytest.raises(DamagedFile, match="unexpected a"):
            writer.write("a", torch.zeros(2))
        with pytest.raises(DamagedFile, match="these: missing b"):
            writer.finish()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([1, 3, 700, 30_000, 300_000]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 10**6),
)
def test_weights_quantised_in_chunks_have_the_bits_of_whole_ones(rows, columns, dtype, seed):
    rows = min(rows, 3) if columns > 10**5 else rows
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)).to(dtype)
    weight[rows // 2] = 0
    values, scale = quantise_weight(weight)
    expected, expected_scale = quantise_rows(weight.float())
    assert values.dtype == torch.int8 and torch.equal(values, expected.to(torch.int8))
    assert torch.equal(scale, expected_scale)


def test_tensors_are_read_as_the_library_reads_them(tmp_path: Path):
    tensors = published(tmp_path / "c", Model(architecture()).initialise(0))
    with StoredTensors(tmp_path / "c") as stored:
        for name, tensor in tensors.items():
            assert torch.equal(stored.read(name), tensor) and stored.size(name) == tensor.nbytes


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["w8a8", "bf16", "fp32"])
def test_a_lazy_state_gives_the_bundle_of_a_whole_one(tmp_path: Path, name: str, threads: int):
    arch = architecture(q_lora_rank=14)
    tensors = published(tmp_path / "c", Model(arch).initialise(1))
    write_bundle(tmp_path / "whole", name, tensors, arch, TinyTokenizer())
    with StoredTensors(tmp_path / "c") as stored:
        state = Checkpoint(stored, arch).state()
        assert set(state) == set(tensors)
        write_bundle(tmp_path / "lazy", name, state, arch, TinyTokenizer(), shard_bytes=20_000, threads=threads)
    whole, lazy = read_bundle(tmp_path / "whole"), read_bundle(tmp_path / "lazy")
    exported = get_format(name).export(tensors, arch)
    assert whole.tensors.keys() == lazy.tensors.keys() == exported.keys()
    for key in exported:
        assert torch.equal(lazy.tensors[key], exported[key]) and torch.equal(whole.tensors[key], exported[key])
    assert json.loads((tmp_path / "lazy" / "checksums.json").read_text()) == file_hashes(tmp_path / "lazy")


def test_a_weight_and_its_scale_lie_in_one_file(tmp_path: Path):
    arch = dense_architecture("qwen2")
    write_bundle(tmp_path / "b", "w8a8", randomised(arch, 0).state_dict(), arch, TinyTokenizer(), 20_000)
    files = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())["weight_map"]
    module = "model.layers.1.mlp.down_proj"
    with safe_open(tmp_path / "b" / files[f"{module}.weight"], framework="pt") as file:
        assert {f"{module}.weight", f"{module}.weight_scale"} <= set(file.keys())


def test_a_fault_in_the_middle_leaves_nothing(tmp_path: Path):
    arch = architecture()
    state = dict(Model(arch).initialise(0).state_dict())
    state["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(3, 3)
    for threads in (1, 2):
        with pytest.raises(
            DamagedFile, match=r"do not fit .* model\.layers\.1\.self_attn\.o_proj\.weight is int8\[3, 3\]"
        ):
            write_bundle(tmp_path / "b", "w8a8", state, arch, TinyTokenizer(), threads=threads)
        assert not list(tmp_path.iterdir())


def test_no_space_on_the_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(IsthmusError, match="no space left"):
        write_bundle(
            tmp_path / "b", "bf16", Model(architecture()).initialise(0).state_dict(), architecture(), TinyTokenizer()
        )
    assert not list(tmp_path.iterdir())


PEAK = """
import sys
from pathlib import Path
import torch
from tests.support.small import architecture
from isthmus.formats.files.bundle import write_bundle
from isthmus.formats.files.published import Checkpoint, StoredTensors
from tests.support.bundles import TinyTokenizer, anonymous_mib

folder, layers = Path(sys.argv[1]), int(sys.argv[2])
arch = architecture(**LARGE, num_hidden_layers=layers)
torch.set_num_threads(1)
before = anonymous_mib()
with StoredTensors(folder) as stored:
    highest = []
    state, note = Checkpoint(stored, arch).state(), lambda done: highest.append(anonymous_mib())
    write_bundle(folder.with_name("b"), "w8a8", state, arch, TinyTokenizer(), threads=2, advance=note)
print(max(highest) - before)
"""
LARGE = {
    "hidden_size": 512,
    "moe_intermediate_size": 1024,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 0,
}


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux says what memory a process has")
def test_memory_does_not_grow_with_the_model(tmp_path: Path):
    """About 56 and 224 MB of weights, in tensors of 1 MB."""
    found = []
    for layers in (2, 8):
        folder = tmp_path / str(layers) / "c"
        folder.parent.mkdir()
        arch = architecture(**LARGE, num_hidden_layers=layers)
        with torch.device("meta"):
            names = {name: tensor.shape for name, tensor in Model(arch).state_dict().items()}
        folder.mkdir()
        layout = {name: (torch.bfloat16, tuple(shape)) for name, shape in names.items()}
        with TensorWriter(folder, layout, 10**9, "these") as writer:
            for name, shape in names.items():
                writer.write(name, torch.full(shape, 0.01, dtype=torch.bfloat16))
            writer.finish()
        config = hf_config(arch, dtype="bfloat16", eos_token_id=5, bos_token_id=3)
        (folder / "config.json").write_text(json.dumps(config))
        code = PEAK.replace("**LARGE", f"**{LARGE!r}")
        done = subprocess.run(
            [sys.executable, "-c", code, folder, str(layers)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, done.stderr
        found.append(float(done.stdout))
    small, large = found
    assert large < small + 30, f"{small:.0f} MiB for 2 layers, {large:.0f} MiB for 8"


def test_a_model_without_memory_has_its_tables_and_does_not_load_the_compiler():
    code = """
import sys
import torch
from tests.support.small import architecture
from isthmus.formats.parts.assemble import unfilled
from isthmus.model.attention import RotaryTable

model, table = unfilled(architecture()), RotaryTable(architecture())
assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
assert torch.equal(model.model.rotary.cos, table.cos) and torch.equal(model.model.rotary.sin, table.sin)
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr

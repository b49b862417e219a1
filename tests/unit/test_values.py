"""What scales, offsets and weights may be: E8M0 against its definition, and what no layout allows is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.cli import cli
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import check_values, read_bundle
from isthmus.formats.files.published import Checkpoint, StoredTensors
from isthmus.formats.parts.values import scale_numbers, scale_problem
from isthmus.model.model import Model
from isthmus.parity.lint import lint_config
from isthmus.trainer.parts import load_published
from tests.support.bundles import published, rehash
from tests.support.small_dense import dense_architecture

WIDE = dense_architecture("llama", vocab_size=300, hidden_size=160, intermediate_size=192)
UP = "model.layers.1.mlp.up_proj.weight"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 and power-of-two scales of its blocks, by loops."""
    scale = torch.empty([-(-size // 128) for size in weight.shape])
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            scale[i, j] = 2.0 ** torch.ceil(torch.log2(weight[place].abs().max() / 448))
            values[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


def e8m0(scale: Tensor) -> Tensor:
    return (torch.log2(scale) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint in DeepSeek's fp8, whose scales are powers of two."""
    folder = tmp_path_factory.mktemp("published") / "fp8"
    published(folder, Model(WIDE).initialise(0))
    Tokenizer.train(["a text of some words"], 300).save(folder)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name].float())
    save_file(tensors, folder / "model.safetensors")
    announce(folder, FP8)
    return folder


def announce(folder: Path, quantisation: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))


def changed(original: Path, folder: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> Path:
    shutil.copytree(original, folder)
    tensors = load_file(original / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    announce(folder, {**FP8, **config})
    return folder


def all_scales(cast: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = cast(tensors[name])

    return change


def one_scale(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}_scale_inv"].view(-1)[1:2] = value

    return change


def convert(source: Path, out: Path, form: str) -> None:
    words = ["convert", str(source), str(out), "--format", form]
    result = CliRunner().invoke(cli, words, standalone_mode=False)
    if result.exception is not None:
        raise result.exception


@pytest.fixture(scope="module")
def made(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of the original in a format, written once."""
    folder = tmp_path_factory.mktemp("made")

    def bundle(form: str) -> Path:
        if not (folder / form).exists():
            convert(original, folder / form, form)
        return folder / form

    return bundle


def test_e8m0_is_read_as_it_is_defined():
    """OCP MX v1.0, 5.4.1: the exponent with a bias of 127, and 255 is no number."""
    bytes_ = torch.arange(255, dtype=torch.uint8)
    expected = torch.tensor([2.0 ** (one - 127) for one in range(255)], dtype=torch.float64)
    for stored in (bytes_, bytes_.view(torch.float8_e8m0fnu)):
        assert torch.equal(scale_numbers(stored).double(), expected)
        assert scale_problem(stored, powers_of_two=True) is None
    assert "not finite" in str(scale_problem(torch.tensor([3, 255], dtype=torch.uint8)))


@pytest.mark.parametrize("form", ["bf16", "fp8", "mxfp8", "w8a8"])
@pytest.mark.parametrize(
    ("cast", "config"),
    [
        (e8m0, {}),
        (lambda scale: e8m0(scale).view(torch.uint8), {"scale_fmt": "ue8m0"}),
        (lambda scale: scale.bfloat16(), {}),
    ],
    ids=["E8M0", "bytes that config.json calls ue8m0", "bf16"],
)
def test_scales_in_each_type_that_is_read_give_the_same_weights(original, made, tmp_path, form, cast, config):
    source = changed(original, tmp_path / "c", all_scales(cast), **config)
    if form == "fp8" and config:
        with pytest.raises(IsthmusError, match="scale_fmt"):
            convert(source, tmp_path / "b", form)
        return
    convert(source, tmp_path / "b", form)
    found, expected = read_bundle(tmp_path / "b").tensors, read_bundle(made(form)).tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (all_scales(lambda scale: e8m0(scale).view(torch.uint8)), {}, "has the type U8.*bytes are E8M0 only where"),
        (all_scales(lambda scale: scale.to(torch.int32)), {}, "has the type I32"),
        (all_scales(lambda scale: scale > 0), {"scale_fmt": "ue8m0"}, "has the type BOOL"),
        (all_scales(lambda scale: scale.to(torch.float8_e4m3fn)), {}, "has the type F8_E4M3"),
        (one_scale(0.0), {}, "1 of 4 scales that are not positive, 0 among them"),
        (one_scale(-0.5), {}, "1 of 4 scales that are not positive, -0.5 among them"),
        (one_scale(float("nan")), {}, r"1 NaN, the first at \[0, 1\]"),
        (one_scale(float("inf")), {}, "1 infinite"),
        (one_scale(0.3), {"scale_fmt": "ue8m0"}, "no powers of two, and scale_fmt is ue8m0"),
    ],
)
def test_scales_that_are_none_are_refused_by_name_before_anything_is_written(original, tmp_path, change, config, words):
    source = changed(original, tmp_path / "c", change, **config)
    with pytest.raises(IsthmusError, match=rf"_proj\.weight_scale_inv .*{words}"):
        convert(source, tmp_path / "b", "w8a8")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"scale_fmt": "e5m2"}, "scale_fmt is 'e5m2'"),
        ({"fmt": "e5m2"}, "fp8 weights are 'e5m2'"),
        ({"weight_block_size": [128, 0]}, r"weight_block_size is \[128, 0\]"),
        ({"weight_block_size": ["128", 128]}, "weight_block_size is"),
        ({"modules_to_not_convert": ["model.layers.1"]}, r"model\.layers\.1 is not converted"),
    ],
)
def test_what_config_json_says_of_fp8_is_held_to(original, tmp_path, config, words):
    with pytest.raises(IsthmusError, match=words):
        convert(changed(original, tmp_path / "c", lambda _: None, **config), tmp_path / "b", "w8a8")


def test_only_matrices_are_fp8(original: Path, tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
        tensors["model.norm.weight_scale_inv"] = torch.ones(2)

    with pytest.raises(IsthmusError, match=r"model\.norm\.weight is fp8, and only matrices are stored in it"):
        convert(changed(original, tmp_path / "c", change), tmp_path / "b", "w8a8")


def into(name: str, place: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        wide = tensors[name].float()
        wide[place] = value
        tensors[name] = wide.to(tensors[name].dtype)

    return change


@pytest.mark.parametrize(
    ("name", "place", "value", "words"),
    [
        (UP, (3, 5), float("nan"), r"1 NaN, the first at \[3, 5\]"),
        ("model.embed_tokens.weight", (7, 0), float("-inf"), r"1 infinite, the first at \[7, 0\]"),
        ("model.norm.weight", (2,), float("nan"), r"1 NaN, the first at \[2\]"),
    ],
    ids=["fp8", "embedding", "norm"],
)
def test_a_number_that_is_not_finite_is_the_sources_in_convert_capture_and_train(
    original, made, tmp_path, name, place, value, words
):
    source = changed(original, tmp_path / "c", into(name, place, value))
    match = rf"{name} holds 1 numbers .*{words}.*The source itself"
    with pytest.raises(DamagedFile, match=match):
        convert(source, tmp_path / "b", "w8a8")
    words = ["capture", str(made("w8a8")), "--source", str(source), "--synthetic"]
    captured = CliRunner().invoke(cli, words, standalone_mode=False)
    assert isinstance(captured.exception, DamagedFile) and name in str(captured.exception)
    model = Model(WIDE).initialise(1)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(DamagedFile, match=match):
        load_published(model, source)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with StoredTensors(source) as stored, pytest.raises(DamagedFile, match=name):
        [rows for key in [name] for rows in [Checkpoint(stored, WIDE).state()[key]]]


@pytest.mark.parametrize(
    ("form", "part", "value"),
    [
        ("w8a8", "weight_scale", 0.0),
        ("w8a8", "weight_scale", -1.0),
        ("mxfp8", "weight_scale", 255),
        ("fp8", "weight_scale_inv", float("nan")),
    ],
)
def test_a_bundle_with_a_scale_that_is_none_passes_no_gate_and_is_not_served(made, tmp_path, form, part, value):
    shutil.copytree(made(form), tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    name = f"{UP.removesuffix('weight')}{part}"
    tensors[name].view(-1)[:1].fill_(value)
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    rehash(tmp_path / "b")
    (found,) = [check for check in lint_config(tmp_path / "b", WIDE) if check.outcome == "fail"]
    assert found.module == UP.removesuffix(".weight") and name in found.detail
    with pytest.raises(DamagedFile, match=name):
        check_values(read_bundle(tmp_path / "b"))


def test_numbers_that_fp16_cannot_hold_are_refused_by_name():
    weight = torch.tensor([[1.0, 7e4]])
    assert get_format("bf16").export_one(UP, weight, WIDE)
    with pytest.raises(IsthmusError, match=r"embed_tokens\.weight holds numbers up to 70000"):
        get_format("modelslim_fp16").export_one("model.embed_tokens.weight", weight, WIDE)

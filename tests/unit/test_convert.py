"""`isthmus convert` from the outside: what it writes, says, and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from isthmus.cli import cli
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import GateRefused, IsthmusError
from isthmus.formats import fp8, get_format
from isthmus.formats.files.bundle import read_bundle
from isthmus.formats.parts.names import dequantise_blocks
from isthmus.model.model import Model
from isthmus.parity.capture import GoldenSet
from isthmus.parity.coverage import check_coverage
from isthmus.parity.seal import verify_seal
from isthmus.parity.served import check_served
from isthmus.recipe.architecture import ModelSection
from isthmus.tools.convert import CONVERSION
from tests.support.bundles import published
from tests.support.small import architecture
from tests.support.small_dense import dense_architecture

DENSE = dense_architecture("llama", vocab_size=300)
DEEPSEEK = architecture(vocab_size=300, q_lora_rank=14)
WIDE = architecture(vocab_size=300, q_lora_rank=32, hidden_size=160, moe_intermediate_size=32, intermediate_size=96)


def shaken(arch: ModelSection, seed: int) -> Model:
    """A model in which some channels are much larger than others."""
    model = Model(arch).initialise(seed).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(1.5).exp_())
    return model


def checkpoint(folder: Path, model: Model, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    tensors = published(folder, model, dtype)
    Tokenizer.train(["a calibration text of some words"], 300).save(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7], "temperature": 0.6}))
    return tensors


def convert(*arguments: object) -> str:
    """What the command prints; its error is raised."""
    return invoke("convert", *arguments)


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [*map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return " ".join(result.output.split())


def calibration_file(folder: Path, *rows: object) -> Path:
    path = folder / "calibration.jsonl"
    generator = torch.Generator().manual_seed(0)
    drawn = [{"tokens": torch.randint(300, (50,), generator=generator).tolist()} for _ in range(3)]
    path.write_text("\n".join(map(json.dumps, rows or drawn)) + "\n")
    return path


def test_a_float_checkpoint_becomes_an_unsealed_bundle(tmp_path: Path):
    tensors = checkpoint(tmp_path / "c", Model(DEEPSEEK).initialise(0))
    said = convert(tmp_path / "c", tmp_path / "b", "--format", "w8a8", "--shard-gb", 0.00002)
    assert "not sealed" in said and "isthmus verify" in said and "MB/s" in said
    bundle = read_bundle(tmp_path / "b")
    exported = get_format("w8a8").export(tensors, DEEPSEEK)
    assert bundle.format == "w8a8" and bundle.tensors.keys() == exported.keys()
    assert all(torch.equal(bundle.tensors[name], exported[name]) for name in exported)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "c" / "tokenizer.json").read_bytes()
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 3, "eos_token_id": [5, 7]}, "ends as the source says; no sampling defaults"
    with pytest.raises(GateRefused, match="not sealed"):
        verify_seal(tmp_path / "b")


def test_an_fp8_checkpoint_is_dequantised_on_the_way(tmp_path: Path):
    tensors = checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    stored = {}
    for file in sorted((tmp_path / "c").glob("*.safetensors")):
        mine = load_file(file)
        for name in list(mine):
            if name.endswith("_proj.weight"):
                mine[f"{name}_scale_inv"] = torch.rand([-(-size // 16) for size in mine[name].shape]) + 0.5
                mine[name] = mine[name].to(torch.float8_e4m3fn)
        save_file(mine, file)
        stored |= mine
    (tmp_path / "c" / "model.safetensors.index.json").unlink()
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    quantisation = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    convert(tmp_path / "c", tmp_path / "b", "--format", "w8a8")
    name = "model.layers.1.mlp.up_proj.weight"
    plain = dequantise_blocks(stored[name], stored[f"{name}_scale_inv"], (16, 16))
    expected = get_format("w8a8").export_one(name, plain, DENSE)
    found = read_bundle(tmp_path / "b").tensors
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    merged = json.loads((tmp_path / "b" / CONVERSION).read_text())["merged"]
    assert merged[f"{name}_scale_inv"] == name
    assert len(merged) == sum(key.endswith("_proj.weight") for key in tensors)


def test_every_tensor_of_the_source_is_accounted_for(tmp_path: Path):
    tensors = checkpoint(tmp_path / "c", Model(DEEPSEEK).initialise(0))
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    said = convert(tmp_path / "c", tmp_path / "b", "--format", "bf16")
    found = json.loads((tmp_path / "b" / CONVERSION).read_text())
    assert "not carried" in said and "MTP layer: num_nextn_predict_layers = 0" in said
    assert set(found["dropped"]) == {name for name in tensors if name.startswith("model.layers.3.")}
    assert set(read_bundle(tmp_path / "b").tensors) | set(found["dropped"]) | set(found["merged"]) == set(tensors)


def test_every_file_beside_the_weights_is_carried_or_left_out_for_a_reason(tmp_path: Path):
    """llama.cpp 26193: the vocabulary of Kimi K2, its code, and what that imports; mlx-examples 312: qwen.tiktoken."""
    checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    needed = {
        "LICENSE", "additional_chat_templates/tool_use.jinja", "encoding_k3.py", "merges.txt",
        "preprocessor_config.json", "qwen.tiktoken", "tekken.json", "tiktoken.model", "tokenization_kimi.py",
        "tokenizer.json", "tokenizer_config.json", "vocab.json",
    }  # fmt: skip
    others = {
        "README.md",
        "pytorch_model.bin",
        "modeling_kimi.py",
        "configuration_kimi.py",
        ".gitattributes",
        "seal.json",
    }
    for name in sorted((needed | others) - {"tokenizer.json", "tokenizer_config.json"}):
        (tmp_path / "c" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "c" / name).write_text(name)
    (tmp_path / "c" / "original").mkdir()
    names = {path.name for path in (tmp_path / "c").iterdir()} - {"additional_chat_templates"}
    said = convert(tmp_path / "c", tmp_path / "b", "--format", "bf16")
    told = json.loads((tmp_path / "b" / CONVERSION).read_text())
    assert set(told["carried_files"]) == needed and "carried beside the weights: LICENSE" in said
    assert {name for name in told["carried_files"] if "/" not in name} | {
        name.rstrip("/") for name in told["files_left_out"]
    } == names
    assert (
        told["files_left_out"]["pytorch_model.bin"] == "weights in another layout"
        and "original/" in told["files_left_out"]
    )
    assert all((tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes() for name in needed)
    assert not any((tmp_path / "b" / name).exists() for name in others)
    read_bundle(tmp_path / "b")


def test_a_bundle_whose_tokenizer_could_not_be_served_is_not_sealed(tmp_path: Path):
    checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    (tmp_path / "c" / "tokenizer.json").unlink()
    (tmp_path / "c" / "tiktoken.model").write_text("YQ== 0\n")
    (tmp_path / "c" / "tokenization_x.py").write_text("pat_str = compute()")
    with pytest.raises(IsthmusError, match="no code beside it has the pattern"):
        invoke("handoff", tmp_path / "c", "--format", "bf16", "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    convert(tmp_path / "c", tmp_path / "b", "--format", "bf16")
    invoke("capture", tmp_path / "b", "--source", tmp_path / "c", "--synthetic", "--max-mb", 1)
    with pytest.raises(GateRefused, match=r"the tokenizer can be served.*`isthmus serve` cannot use it"):
        invoke("verify", tmp_path / "b")
    assert not (tmp_path / "b" / "seal.json").exists()


@pytest.mark.parametrize(
    ("change", "outcome", "words"),
    [
        (lambda folder: None, "pass", "a chat template, 3 ends"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "fail", "cannot be read by the tokenizers"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "caution", "there is none"),
        (
            lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 300}'),
            "fail",
            "the token 300, and the model has 300",
        ),
    ],
)
def test_what_a_server_reads_beside_the_weights_is_checked(tmp_path: Path, change, outcome: str, words: str):
    checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    change(tmp_path / "c")
    found = check_served(tmp_path / "c")
    assert (found.outcome, found.layer) == (outcome, "files") and words in found.detail
    assert check_served(tmp_path / "c", elsewhere=True).outcome in (outcome, "caution")


def test_balancing_and_gptq_go_into_the_bundle_and_bring_it_nearer(tmp_path: Path):
    model = shaken(DENSE, 1)
    checkpoint(tmp_path / "c", model, torch.float32)
    file = calibration_file(tmp_path)
    tokens = torch.randint(300, (4, 50), generator=torch.Generator().manual_seed(1))
    costs = {}
    for options in ((), ("--balance",), ("--balance", "--rounding", "gptq")):
        calibrate = ("--calibrate", file) if options else ()
        convert(tmp_path / "c", tmp_path / "b", "--format", "w8a8", *calibrate, *options)
        found = read_bundle(tmp_path / "b").build()(tokens)
        costs[options] = ((found - model(tokens)).norm() / model(tokens).norm()).item()
    plain, balanced, both = costs.values()
    assert balanced < 0.8 * plain and both < balanced
    said = json.loads((tmp_path / "b" / CONVERSION).read_text())
    assert said["calibration_tokens"] == 150 and said["rounding"] == "gptq" and said["balance_alpha"] == 0.5


@pytest.mark.parametrize("options", [("--balance",), ("--rounding", "gptq"), ("--balance", "--rounding", "gptq")])
@pytest.mark.parametrize(("arch", "name"), [(DENSE, "w8a8"), (DEEPSEEK, "w8a8"), (DENSE, "modelslim_dynamic")])
def test_what_was_balanced_or_rounded_by_inputs_is_captured_verified_and_sealed(tmp_path: Path, arch, name, options):
    checkpoint(tmp_path / "c", shaken(arch, 1), torch.float32)
    file = calibration_file(tmp_path)
    convert(tmp_path / "c", tmp_path / "b", "--format", name, "--calibrate", file, *options)
    invoke("capture", tmp_path / "b", "--source", tmp_path / "c", "--synthetic", "--max-mb", 1)
    said = invoke("verify", tmp_path / "b", "--max-mean-kl", 0.5)
    assert "sealed as" in said and verify_seal(tmp_path / "b")


def test_a_balanced_bundle_of_other_weights_is_refused(tmp_path: Path):
    model = shaken(DENSE, 1)
    checkpoint(tmp_path / "c", model, torch.float32)
    file = calibration_file(tmp_path)
    options = ("--format", "w8a8", "--calibrate", file, "--balance", "--rounding", "gptq")
    convert(tmp_path / "c", tmp_path / "b", *options)
    model.get_parameter("model.layers.1.mlp.down_proj.weight")[3].neg_()
    checkpoint(tmp_path / "d", model, torch.float32)
    with pytest.raises(GateRefused, match=r"layers\.1\.mlp\.down_proj.*of the output of row 3"):
        invoke("capture", tmp_path / "b", "--source", tmp_path / "d", "--synthetic", "--max-mb", 1)
    (tmp_path / "b" / "conversion" / "balance.safetensors").unlink()
    with pytest.raises(GateRefused, match=r"balance\.safetensors is missing"):
        invoke("capture", tmp_path / "b", "--source", tmp_path / "c", "--synthetic", "--max-mb", 1)


def test_experts_that_saw_nothing_are_said(tmp_path: Path):
    checkpoint(tmp_path / "c", Model(DEEPSEEK).initialise(0))
    file = calibration_file(tmp_path, {"tokens": [1, 2]})
    said = convert(tmp_path / "c", tmp_path / "b", "--format", "w8a8", "--calibrate", file, "--rounding", "gptq")
    found = json.loads((tmp_path / "b" / CONVERSION).read_text())
    assert "modules of experts saw no token" in said and found["calibration_unseen"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "w8a9"], "did you mean 'w8a8'"),
        (["--format", "w8a8", "--balance"], "--balance needs to see what the model computes: give --calibrate"),
        (["--format", "w8a8", "--rounding", "gptq"], "--rounding gptq needs to see"),
        (["--format", "bf16", "--balance", "--calibrate", "x"], "--balance is for quantised formats"),
        (["--format", "bf16", "--rounding", "gptq", "--calibrate", "x"], "gptq is for int8 weights"),
        (["--format", "w8a8", "--calibrate", "x"], "uses no calibration; leave --calibrate out"),
        (["--format", "w8a8", "--calibrate-tokens", "5"], "give that as well"),
        (["--format", "w8a8", "--balance", "--calibrate", "absent.jsonl"], "no prompts file at absent.jsonl"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path, arguments, words):
    checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    with pytest.raises(IsthmusError, match=words):
        convert(tmp_path / "c", tmp_path / "b", *arguments)
    assert not (tmp_path / "b").exists()


def test_folders_that_are_not_meant_are_left_alone(tmp_path: Path):
    checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(IsthmusError, match="exists and is no bundle; it is not overwritten"):
        convert(tmp_path / "c", tmp_path / "mine", "--format", "bf16")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    for out in (tmp_path / "c", tmp_path / "c" / "b", tmp_path):
        with pytest.raises(IsthmusError, match="lie in each other"):
            convert(tmp_path / "c", out, "--format", "bf16")
    with pytest.raises(IsthmusError, match="no checkpoint folder"):
        convert(tmp_path / "absent", tmp_path / "b", "--format", "bf16")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    with pytest.raises(IsthmusError, match="is a run folder: `isthmus handoff"):
        convert(tmp_path / "run", tmp_path / "b", "--format", "bf16")


def test_a_bundle_is_a_source_and_is_replaced_but_not_if_it_is_damaged_or_quantised(tmp_path: Path):
    checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    for _ in range(2):
        convert(tmp_path / "c", tmp_path / "bf16", "--format", "bf16")
    convert(tmp_path / "bf16", tmp_path / "w8a8", "--format", "w8a8")
    assert read_bundle(tmp_path / "w8a8").format == "w8a8"
    with pytest.raises(IsthmusError, match=r"compressed-tensors.*use the unquantised checkpoint"):
        convert(tmp_path / "w8a8", tmp_path / "again", "--format", "bf16")
    weights = tmp_path / "bf16" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(GateRefused, match=r"model\.safetensors does not match its hash"):
        convert(tmp_path / "bf16", tmp_path / "again", "--format", "w8a8")


def test_calibration_text_goes_through_the_tokenizer_and_stops_at_the_limit(tmp_path: Path):
    checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    text = {"prompt": "a calibration ", "completion": "text of words", "id": 7}
    file = calibration_file(tmp_path, text, {"tokens": [1, 2, 3]})
    asked = ("--format", "w8a8_static", "--calibrate", file)
    convert(tmp_path / "c", tmp_path / "all", *asked)
    convert(tmp_path / "c", tmp_path / "some", *asked, "--calibrate-tokens", "5")
    told = [json.loads((tmp_path / name / CONVERSION).read_bytes())["calibration_tokens"] for name in ("all", "some")]
    words = sum(len(Tokenizer.load(tmp_path / "c").encode(text[key])) for key in ("prompt", "completion"))
    assert told == [words + 3, 5]


@pytest.mark.parametrize("row", [{"tokens": [1.0]}, {"tokens": [9999]}, {"completion": "a"}, [1]])
def test_a_wrong_line_of_the_calibration_is_named(tmp_path: Path, row):
    checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    file = calibration_file(tmp_path, {"tokens": [1]}, row)
    with pytest.raises(IsthmusError, match=r"calibration\.jsonl:2: "):
        convert(tmp_path / "c", tmp_path / "out", "--format", "w8a8_static", "--calibrate", file)
    assert not (tmp_path / "out").exists()


def test_capture_reads_the_same_file_as_convert(tmp_path: Path):
    checkpoint(tmp_path / "c", Model(DENSE).initialise(0))
    text = {"prompt": "a calibration ", "completion": "text\u2028of words", "id": 7}
    file = calibration_file(tmp_path, {"tokens": [1, 2, 3]}, text)
    convert(tmp_path / "c", tmp_path / "b", "--format", "w8a8_static", "--calibrate", file)
    asked = ["capture", tmp_path / "b", "--source", tmp_path / "c", "--prompts", file]
    invoke(*asked)
    tokenizer = Tokenizer.load(tmp_path / "c")
    words = tokenizer.encode(text["prompt"]) + tokenizer.encode(text["completion"])
    expected = [([1], [2, 3]), (words[: len(words) // 2], words[len(words) // 2 :])]
    assert GoldenSet(tmp_path / "b").listed.sequences == expected
    calibration_file(tmp_path, {"tokens": [1, 2]}, {"tokens": [1.9, 2]})
    with pytest.raises(IsthmusError, match=r"calibration\.jsonl:2: `tokens` must hold integers alone"):
        invoke(*asked)


def fp8_checkpoint(folder: Path, round_scale) -> dict[str, torch.Tensor]:
    """A checkpoint in DeepSeek's fp8 whose scales were passed through `round_scale` before the weights were rounded."""
    tensors = checkpoint(folder, Model(WIDE).initialise(0))
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        mine = load_file(file)
        for name in list(mine):
            if fp8.is_quantised(name):
                padded = torch.nn.functional.pad(mine[name].float(), (0, -mine[name].shape[1] % 128))
                amax = padded.abs().unflatten(1, (-1, 128)).amax(2)
                rows = [group.amax(0) for group in amax.split(128)]
                scale = round_scale(torch.stack(rows) / 448)
                wide = scale.repeat_interleave(128, 0)[: len(padded)].repeat_interleave(128, 1)
                mine[name] = (mine[name].float() / wide[:, : mine[name].shape[1]]).to(torch.float8_e4m3fn)
                mine[f"{name}_scale_inv"] = scale
        save_file(mine, file)
        stored |= mine
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    quantisation = get_format("fp8").quantization_config(WIDE)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    assert len(tensors) < len(stored)
    return stored


def next_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    return torch.exp2(torch.ceil(torch.log2(scale)))


def loosely(scale: torch.Tensor) -> torch.Tensor:
    return scale * 1.3


def weights_in(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The numbers that e4m3 weights stand for, by both layouts' published rules."""
    found = {}
    for name, values in tensors.items():
        if f"{name}_scale_inv" in tensors:
            found[name] = dequantise_blocks(values, tensors[f"{name}_scale_inv"], (128, 128))
        elif f"{name}_scale" in tensors:
            powers = torch.exp2(tensors[f"{name}_scale"].double() - 127)
            found[name] = (values.double() * powers.repeat_interleave(32, 1)).float()
    return found


@pytest.mark.parametrize("target", ["mxfp8", "fp8"])
def test_fp8_blocks_cross_without_a_second_rounding(tmp_path: Path, target: str):
    source = fp8_checkpoint(tmp_path / "c", next_power_of_two if target == "mxfp8" else loosely)
    convert(tmp_path / "c", tmp_path / "b", "--format", target)
    wanted, found = weights_in(source), weights_in(read_bundle(tmp_path / "b").tensors)
    assert len(found) > 20 and all(torch.equal(found[name], wanted[name]) for name in found)
    plain = {name: wanted.get(name, tensor) for name, tensor in source.items() if not name.endswith("_scale_inv")}
    _, checks = check_coverage(plain, read_bundle(tmp_path / "b"))
    assert [check for check in checks if check.outcome != "pass"] == []


def test_fp8_blocks_that_mxfp8_cannot_hold_are_refused_unless_requantised(tmp_path: Path):
    fp8_checkpoint(tmp_path / "c", loosely)
    with pytest.raises(IsthmusError, match=r"\.weight: \d+ of its \d+ block scales are no powers of two.*--requantise"):
        convert(tmp_path / "c", tmp_path / "b", "--format", "mxfp8")
    assert not (tmp_path / "b").exists()
    convert(tmp_path / "c", tmp_path / "b", "--format", "mxfp8", "--requantise")
    assert json.loads((tmp_path / "b" / CONVERSION).read_text())["requantised"] is True
    with pytest.raises(IsthmusError, match="--requantise is for fp8 checkpoints that become mxfp8"):
        convert(tmp_path / "c", tmp_path / "d", "--format", "w8a8", "--requantise")


def test_fp8_with_another_rule_of_activation_scales_does_not_become_plain_fp8(tmp_path: Path):
    fp8_checkpoint(tmp_path / "c", next_power_of_two)
    path = tmp_path / "c" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    path.write_text(json.dumps(config))
    with pytest.raises(IsthmusError, match="scale_fmt = 'ue8m0'"):
        convert(tmp_path / "c", tmp_path / "b", "--format", "fp8")
    assert not (tmp_path / "b").exists()

"""Published checkpoints: what transformers writes is read and the reverse; fp8; every fault is named."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.formats.files.published import INDEX, StoredTensors, weight_files
from isthmus.formats.parts.names import dequantise_blocks
from isthmus.model.model import Model
from isthmus.parity.seal import verify_seal, write_seal
from isthmus.recipe.architecture import ModelSection, architecture_from_config, parse_architecture
from isthmus.run import sha256_file
from isthmus.trainer.parts import load_published
from tests.support.against_transformers import in_transformers
from tests.support.against_transformers import randomised as randomised_deepseek
from tests.support.bundles import passed
from tests.support.small import architecture
from tests.support.small_dense import FAMILIES, LLAMA3_ROPE, dense_architecture, randomised, theirs

TOKENS = torch.randint(80, (2, 30), generator=torch.Generator().manual_seed(0))
MODELS = {
    "qwen2": randomised(dense_architecture("qwen2"), 1),
    "qwen2 tied": randomised(dense_architecture("qwen2", tie_word_embeddings=True, num_key_value_heads=1), 2),
    "llama": randomised(dense_architecture("llama", rope_scaling=LLAMA3_ROPE, head_dim=6), 3),
    "llama with biases": randomised(dense_architecture("llama", attention_bias=True), 4),
    "deepseek_v3": randomised_deepseek(architecture(q_lora_rank=14), 5),
    **{name: randomised(family, seed) for seed, (name, family) in enumerate(FAMILIES.items(), start=6)},
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


class TinyTokenizer:
    bos_id, ends = 3, (5,)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def architecture_of(folder: Path, **changes) -> ModelSection:
    return parse_architecture(architecture_from_config(json.loads((folder / "config.json").read_text())) | changes)


def their_model(model: Model) -> torch.nn.Module:
    return in_transformers(model) if model.architecture.model_type == "deepseek_v3" else theirs(model)


@every_model
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_what_transformers_writes_is_read(tmp_path: Path, model: Model, shard: str):
    other = their_model(model)
    other.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / INDEX).is_file() == (shard == "20KB")
    ours = Model(architecture_of(tmp_path, num_nextn_predict_layers=0))
    assert load_published(ours, tmp_path) == []
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(TOKENS), other(TOKENS).logits, atol=1e-4, rtol=0)


@every_model
@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_reads_what_we_write(tmp_path: Path, model: Model, name: str, shard_bytes: int):
    write_bundle(tmp_path / "b", name, model.state_dict(), model.architecture, TinyTokenizer(), shard_bytes)
    assert (len(weight_files(tmp_path / "b")) > 1) == (shard_bytes == 20_000)
    other, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(".layers.3." in key for key in info["unexpected_keys"]), "only the MTP layer, which transformers lacks"
    with torch.no_grad():
        found = read_bundle(tmp_path / "b").build()(TOKENS)
        torch.testing.assert_close(other.eval()(TOKENS).logits, found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen2", "qwen2 tied", "llama with biases", "qwen3", "mistral"])
def test_transformers_reads_our_w8a8(tmp_path: Path, name: str):
    """It decompresses the weights; activations in float are then the only difference."""
    model = MODELS[name]
    write_bundle(tmp_path / "b", "w8a8", model.state_dict(), model.architecture, TinyTokenizer())
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32, attn_implementation="eager")
    stored = read_bundle(tmp_path / "b").tensors
    plain = {
        key: tensor.float() * stored[f"{key}_scale"] if tensor.dtype == torch.int8 else tensor.float()
        for key, tensor in stored.items()
        if not key.endswith("_scale")
    }
    assert stored["model.layers.0.self_attn.k_proj.weight"].dtype == torch.int8
    biases = [tensor.dtype for key, tensor in stored.items() if key.endswith("k_proj.bias")]
    assert set(biases) <= {torch.bfloat16} and bool(biases) == ("qwen3" not in name and "mistral" not in name)
    if model.architecture.tie_word_embeddings:
        plain["lm_head.weight"] = plain["model.embed_tokens.weight"]
    reference = Model(model.architecture).eval()
    reference.load_state_dict(plain)
    with torch.no_grad():
        emulated, found = read_bundle(tmp_path / "b").build()(TOKENS), other.eval()(TOKENS).logits
        expected = reference(TOKENS)
    scale = expected.std()
    assert (emulated - expected).abs().mean() < 0.05 * scale, "int8 activations cost little"
    assert (found - expected).abs().mean() < 0.05 * scale


def test_a_sharded_bundle_can_be_sealed_and_a_changed_shard_is_named(tmp_path: Path):
    model, folder = MODELS["qwen2"], tmp_path / "b"
    write_bundle(folder, "bf16", model.state_dict(), model.architecture, TinyTokenizer(), 20_000)
    seal = write_seal(folder, **passed("0"))
    assert seal.tensors.keys() == model.state_dict().keys()
    assert verify_seal(folder).id == seal.id
    shard = weight_files(folder)[1]
    tensors = load_file(shard)
    name = min(tensors)
    tensors[name][0] += 1
    save_file(tensors, shard)
    with pytest.raises(IsthmusError, match=f"the tensor {name} does not match its hash"):
        verify_seal(folder)
    with pytest.raises(DamagedFile, match=shard.name):
        read_bundle(folder)


def test_a_bundle_whose_config_is_no_architecture_says_which_file_and_key(tmp_path: Path):
    model, folder = MODELS["qwen2"], tmp_path / "b"
    for change, words in ({"model_type": "mamba"}, "'mamba' is not read"), ({"vocab_size": 0}, r"model\.vocab_size"):
        write_bundle(folder, "bf16", model.state_dict(), model.architecture, TinyTokenizer())
        change_config(folder, **change)
        hashes = json.loads((folder / "checksums.json").read_text())
        hashes["config.json"] = sha256_file(folder / "config.json")
        (folder / "checksums.json").write_text(json.dumps(hashes))
        with pytest.raises(IsthmusError, match=rf"config\.json: (.|\n)*{words}"):
            read_bundle(folder)


def quantised(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """fp8 and the scales of its blocks, by loops over the blocks."""
    rows, columns = (-(-size // block) for size in weight.shape)
    values, scale = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            place = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = weight[place].abs().max() / 448
            values[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


def dequantised(values: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    """In float64, number by number."""
    plain = values.to(torch.float64)
    result = torch.empty_like(plain)
    for i in range(plain.shape[0]):
        for j in range(plain.shape[1]):
            result[i, j] = plain[i, j] * float(scale[i // block, j // block])
    return result


@pytest.mark.parametrize("shape", [(128, 128), (576, 130), (1, 257), (127, 1), (300, 64)])
def test_blocks_are_dequantised_as_by_a_loop(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(sum(shape))
    spread = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).pow(4)
    values, scale = quantised(spread)
    found = dequantise_blocks(values, scale, (128, 128))
    torch.testing.assert_close(found.double(), dequantised(values, scale), rtol=1e-6, atol=0)
    assert (found - spread).abs().max() <= 448 * scale.max() / 16


FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek's layout: two shards and an index, matrices in fp8, the MTP layer with its copies, the rest in bf16."""
    model = randomised_deepseek(
        architecture(hidden_size=192, kv_lora_rank=130, moe_intermediate_size=136, num_hidden_layers=2), 7
    )
    folder = tmp_path_factory.mktemp("published") / "fp8"
    write_bundle(folder, "bf16", model.state_dict(), model.architecture, TinyTokenizer(), 10**9)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj" in name and "eh_proj" not in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensor.float())
        else:
            tensors[name] = tensor
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, folder / file)
    weight_map = {name: file for file, mine in parts.items() for name in mine}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    change_config(folder, quantization_config=FP8_CONFIG)
    return folder


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}


def test_an_fp8_checkpoint_is_read_with_its_mtp_layer(fp8_checkpoint: Path):
    model = Model(architecture_of(fp8_checkpoint))
    assert load_published(model, fp8_checkpoint) == []
    stored, state = stored_tensors(fp8_checkpoint), model.state_dict()
    assert any(name.startswith("model.layers.2.") and name.endswith("_scale_inv") for name in stored)
    for name, tensor in state.items():
        scale = stored.get(f"{name}_scale_inv")
        wide = stored[name].double()
        if scale is not None:
            assert stored[name].dtype == torch.float8_e4m3fn
            grown = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: wide.shape[0], : wide.shape[1]]
            wide = wide * grown.double()
        torch.testing.assert_close(tensor.double(), wide, rtol=1e-6, atol=0, msg=name)
    assert torch.isfinite(model(TOKENS)).all()


def test_an_mtp_layer_that_the_recipe_does_without_is_named(fp8_checkpoint: Path):
    model = Model(architecture_of(fp8_checkpoint, num_nextn_predict_layers=0))
    (left_out,) = load_published(model, fp8_checkpoint)
    count = sum(name.startswith("model.layers.2.") for name in stored_tensors(fp8_checkpoint))
    assert left_out == f"{count} tensors of the MTP layer: num_nextn_predict_layers = 0"
    assert torch.isfinite(model(TOKENS)).all()


def test_a_checkpoint_without_the_mtp_layer_says_what_to_set(tmp_path: Path):
    in_transformers(MODELS["deepseek_v3"]).save_pretrained(tmp_path)
    change_config(tmp_path, num_nextn_predict_layers=1)
    with pytest.raises(IsthmusError, match=r"no tensor of the MTP layer.*set num_nextn_predict_layers = 0"):
        load_published(Model(architecture_of(tmp_path)), tmp_path)
    load_published(Model(architecture_of(tmp_path, num_nextn_predict_layers=0)), tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_text_model_within_one_that_sees_is_read_and_the_rest_is_named(tmp_path: Path, shards: int):
    """Kimi K2.5's layout: `text_config`, `language_model.` in front of the names, and the part that sees beside it."""
    folder, model = tmp_path / "b", MODELS["deepseek_v3"]
    write_bundle(folder, "fp32", model.state_dict(), model.architecture, TinyTokenizer())
    tensors = {f"language_model.{name}": tensor for name, tensor in stored_tensors(folder).items()}
    tensors |= {"vision_tower.patch_embed.weight": torch.zeros(3, 3), "mm_projector.bias": torch.zeros(3)}
    (folder / "model.safetensors").unlink()
    parts = {f"model-{part}.safetensors": sorted(tensors)[part::shards] for part in range(shards)}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}))
    found = Model(architecture_of(folder))
    assert load_published(found, folder) == ["2 tensors beside the text model: only the text model is read"]
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A qwen2 checkpoint of several files."""
    theirs(MODELS["qwen2"]).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def rewrite(folder: Path, change) -> None:
    """Store the changed tensors of a folder as one file."""
    tensors = stored_tensors(folder)
    change(tensors)
    for path in (*weight_files(folder), folder / INDEX):
        path.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    """The error of loading a folder; the model must be as it was."""
    model = Model(architecture_of(folder)).initialise(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(IsthmusError) as caught:
        load_published(model, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


def test_missing_extra_and_misshapen_tensors_are_all_named(sharded: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(41)
        tensors["lm_head.weight"] = torch.zeros(89, 40, dtype=torch.int8)

    rewrite(sharded, change)
    words = refusal(sharded)
    assert "missing model.layers.1.self_attn.k_proj.bias" in words
    assert "unexpected model.layers.7.mlp.up_proj.weight" in words
    assert "model.norm.weight is [41] and should be [40]" in words
    assert "lm_head.weight is quantised (I8)" in words


def test_a_missing_shard_is_named_with_what_it_would_hold(sharded: Path):
    second = weight_files(sharded)[1]
    count = len(load_file(second))
    second.unlink()
    assert f"lacks {second.name}, named in {INDEX} for {count} tensors" in refusal(sharded)


def test_a_truncated_shard_is_named(sharded: Path):
    second = weight_files(sharded)[1]
    second.write_bytes(second.read_bytes()[:-9])
    assert f"{second} is not a whole safetensors file" in refusal(sharded)


def test_an_index_that_differs_from_its_files_is_refused(sharded: Path):
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(index["weight_map"].values())
    first, last = next(file for file in files if files.count(file) > 1), files[-1]
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][moved] = last
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"{last} does not hold {moved}" in refusal(sharded)
    del index["weight_map"][moved]
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"{moved} is in {first}, not in {INDEX}" in refusal(sharded)
    index["weight_map"][moved] = f"../sharded/{first}"
    (sharded / INDEX).write_text(json.dumps(index))
    assert "a file in the same folder" in refusal(sharded)
    (sharded / INDEX).write_text("{}")
    assert "is no index" in refusal(sharded)


def test_shards_without_an_index_are_read_and_must_not_overlap(sharded: Path):
    (sharded / INDEX).unlink()
    load_published(Model(architecture_of(sharded)), sharded)
    shutil.copy(weight_files(sharded)[0], sharded / "zz.safetensors")
    assert "both" in refusal(sharded) and "hold" in refusal(sharded)


def test_a_folder_without_weights_or_config_is_refused(sharded: Path):
    for path in (*weight_files(sharded), sharded / INDEX):
        path.unlink()
    assert "missing model.embed_tokens.weight" in refusal(sharded)
    model = Model(architecture_of(sharded))
    (sharded / "config.json").unlink()
    with pytest.raises(IsthmusError, match=r"has no config\.json"):
        load_published(model, sharded)


def copied(fp8_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp8_checkpoint, tmp_path / "copy"))


def test_faults_of_fp8_are_named(fp8_checkpoint: Path, tmp_path: Path):
    first, second, third = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{first}_scale_inv"]
        tensors[f"{second}_scale_inv"] = torch.zeros(9, 9)
        tensors[third] = tensors[third].to(torch.bfloat16)

    folder = copied(fp8_checkpoint, tmp_path)
    rewrite(folder, change)
    words = refusal(folder)
    assert f"{first} is fp8, and {first}_scale_inv is missing" in words
    assert f"{second}_scale_inv is [9, 9] and should be [1, 2]" in words
    assert f"unexpected {third}_scale_inv" in words


def test_another_quantisation_is_refused(fp8_checkpoint: Path, tmp_path: Path):
    folder = copied(fp8_checkpoint, tmp_path)
    change_config(folder, quantization_config=None)
    assert "is fp8, and config.json has no quantization_config of fp8" in refusal(folder)
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "announces quantisation 'gptq'" in refusal(folder)


@pytest.mark.parametrize(
    ("copy", "original"),
    [("embed_tokens", "model.embed_tokens.weight"), ("shared_head.head", "lm_head.weight")],
)
def test_a_copy_in_the_mtp_layer_must_equal_what_it_copies(fp8_checkpoint, tmp_path, copy: str, original: str):
    folder, name = copied(fp8_checkpoint, tmp_path), f"model.layers.2.{copy}.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 3] += 1

    rewrite(folder, change)
    assert f"{name} differs from {original}" in refusal(folder)


def test_a_tied_head_may_be_stored_and_must_then_be_the_embedding(tmp_path: Path):
    theirs(MODELS["qwen2 tied"]).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    model = Model(architecture_of(tmp_path))
    load_published(model, tmp_path)
    torch.testing.assert_close(model(TOKENS), MODELS["qwen2 tied"](TOKENS))
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(tmp_path)


def test_frequencies_stored_by_old_llama_checkpoints_are_left_out_with_a_word(tmp_path: Path):
    theirs(MODELS["llama"]).save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.ones(3)}))
    model = Model(architecture_of(tmp_path))
    (left_out,) = load_published(model, tmp_path)
    assert "rotary_emb.inv_freq" in left_out
    torch.testing.assert_close(model(TOKENS), MODELS["llama"](TOKENS))


def test_tensors_are_read_one_at_a_time(sharded: Path):
    with StoredTensors(sharded) as stored:
        name = "model.layers.1.mlp.up_proj.weight"
        assert name in stored and "model.layers.1.mlp.up_proj.bias" not in stored
        assert (stored.shape(name), stored.kind(name)) == ((56, 40), "F32")
        assert torch.equal(stored.read(name), MODELS["qwen2"].state_dict()[name])


def test_loading_holds_no_more_than_a_few_stored_tensors_at_a_time(fp8_checkpoint: Path, monkeypatch):
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, whole = 0, len(stored_tensors(fp8_checkpoint))
    read = StoredTensors.read

    def counted(self: StoredTensors, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(StoredTensors, "read", counted)
    load_published(Model(architecture_of(fp8_checkpoint)), fp8_checkpoint)
    assert 1 <= most <= 3 < whole, "a weight, its scales, and the one before"

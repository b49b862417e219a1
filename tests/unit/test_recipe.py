"""The recipe: what it refuses, what it suggests, and what its hash says."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from isthmus.errors import IsthmusError
from isthmus.recipe.architecture import DeepseekSection, DenseSection
from isthmus.recipe.read import load_recipe, override_serve, parse_recipe, preset_names
from isthmus.recipe.schema import Recipe, ServeSection
from isthmus.recipe.section import RecipeError

TEXT = """
name = "small"

[model]
preset = "r-nano"

[model.rope_scaling]
factor = 4.0
original_max_position_embeddings = 64

[pools.home]
chip = "cpu"

[pools.away]
chip = "cpu"
rehearsed = true

[place]
train = ["home"]
rollout = ["away", "home"]
serve = ["away"]

[[step]]
name = "taught"
kind = "sft"
steps = 10

[step.optimizer]
name = "adamw"
learning_rate = 1e-3

[[step]]
name = "reinforced"
kind = "rl"
from = "taught"
steps = 5

[step.optimizer]
name = "adamw"
learning_rate = 1e-4

[step.options]
clip_low = 0.2
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.toml"
    file.write_text(TEXT, encoding="utf-8")
    return file


def tree() -> dict[str, Any]:
    return tomllib.loads(TEXT)


def leaves(node: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in leaves(value, (*at, key))]
    if isinstance(node, list) and node and isinstance(node[0], dict):
        return [leaf for number, one in enumerate(node) for leaf in leaves(one, (*at, number))]
    return [at]


def shuffled(node: Any, order: Any) -> Any:
    if isinstance(node, list):
        return [shuffled(one, order) for one in node]
    if not isinstance(node, dict):
        return node
    keys = order.draw(st.permutations(list(node)))
    return {key: shuffled(node[key], order) for key in keys}


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("sed=3", "seed"),
        ("step.taught.batchsize=8", "batch_size"),
        ("step.taught.optimizer.lerning_rate=1", "learning_rate"),
        ("step.reinforced.optimizer.warmup_step=1", "warmup_steps"),
        ("model.num_hiden_layers=2", "num_hidden_layers"),
        ("model.rope_scaling.facter=2", "factor"),
        ("pools.away.rehearsd=true", "rehearsed"),
        ("place.rolout=['home']", "rollout"),
        ("serve.prot=80", "port"),
    ],
)
def test_a_misspelt_key_is_refused_with_a_suggestion(path: Path, misspelt: str, meant: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, (misspelt,))
    assert f"unknown key {misspelt.partition('=')[0]}; did you mean {meant!r}?" in str(caught.value)


def test_a_pool_may_be_called_like_a_key_and_still_gets_its_suggestion(path: Path):
    with pytest.raises(RecipeError, match=r"unknown key pools\.count\.chipp; did you mean 'chip'\?"):
        load_recipe(path, ('pools.count={chip="cpu", chipp="cpu"}',))


def test_a_key_like_no_other_gets_the_list_of_known_keys(path: Path):
    with pytest.raises(RecipeError, match=r"unknown key serve\.zzz; known: .*host.*port"):
        load_recipe(path, ("serve.zzz=1",))


def test_every_problem_is_named_at_once(path: Path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ("step.taught.steps=0", "step.reinforced.stepz=5", "pools.away.count=none"))
    for place in ("step.taught.steps", "step.reinforced.stepz", "pools.away.count"):
        assert place in str(caught.value)


def test_a_missing_section_and_a_missing_key_are_named():
    without = tree()
    del without["step"]
    del without["pools"]["home"]["chip"]
    with pytest.raises(RecipeError, match=r"pools\.home\.chip is missing(.|\n)*step is missing"):
        parse_recipe(without)


def test_overrides_take_numbers_text_lists_and_new_sections(path: Path):
    recipe = load_recipe(
        path,
        (
            "step.taught.steps=7",
            "name=other",
            'place.train=["away", "home"]',
            "pools.third.chip=cpu",
            "step.reinforced.options.x=true",
        ),
    )
    assert (recipe.named("taught").steps, recipe.name, recipe.place.train) == (7, "other", ["away", "home"])
    assert recipe.pools["third"].chip == "cpu"
    assert recipe.named("reinforced").options == {"clip_low": 0.2, "x": True}
    assert load_recipe(path).named("taught").steps == 10, "the file itself is unchanged"


def test_of_two_overrides_of_one_key_the_last_counts(path: Path):
    assert load_recipe(path, ("step.taught.steps=7", "step.taught.steps=8")).named("taught").steps == 8


@pytest.mark.parametrize("override", ["step.taught.steps", "=3", " =3"])
def test_an_override_without_key_or_value_says_how_to_write_it(path: Path, override: str):
    with pytest.raises(RecipeError, match=r"write --set section\.key=value"):
        load_recipe(path, (override,))


def test_a_server_can_be_given_other_keys_of_its_section():
    section = ServeSection(port=9000, temperature=1.0)
    changed = override_serve(section, ("serve.max_batch=4", "serve.on_drift=rollback"), host="::1", port=None)
    assert (changed.max_batch, changed.on_drift, changed.host) == (4, "rollback", "::1")
    assert (changed.port, changed.temperature) == (9000, 1.0), "what is not given stays"
    for override, words in (
        ("step.reinforced.steps=4", r"only be given other keys of \[serve\]"),
        ("serve.max_bach=4", "max_batch"),
        ("serve.max_batch=0", r"serve\.max_batch"),
        ("serve.on_drift=panic", "rollback"),
    ):
        with pytest.raises(RecipeError, match=words):
            override_serve(section, (override,))


def test_an_override_below_a_value_is_refused(path: Path):
    with pytest.raises(RecipeError, match="'name' is a value, not a section"):
        load_recipe(path, ("name.first=x",))


@settings(max_examples=25, deadline=None)
@given(order=st.data())
def test_the_hash_does_not_depend_on_the_order_of_keys(order: st.DataObject):
    assert parse_recipe(shuffled(tree(), order)).digest() == parse_recipe(tree()).digest()


@settings(max_examples=60, deadline=None)
@given(leaf=st.sampled_from(leaves(json.loads(parse_recipe(tree()).canonical()))), amount=st.integers(1, 3))
def test_the_hash_changes_with_every_value(leaf: tuple[str | int, ...], amount: int):
    original = parse_recipe(tree())
    changed = json.loads(original.canonical())
    section = changed
    for key in leaf[:-1]:
        section = section[key]
    section[leaf[-1]] = different(section[leaf[-1]], amount)
    try:
        digest = Recipe.model_validate(changed).digest()
    except ValueError:
        reject()  # this value is not allowed there
    assert digest != original.digest(), f"{leaf} is not part of the hash"


def different(value: Any, amount: int) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return value + 2 * amount
        case float():
            return value * (1 + amount / 8) + 1e-3
        case str():
            return value + "x" * amount
        case list():
            return [*value, *(value[:1] or ["x"]) * amount]
        case None:
            return amount
    raise AssertionError(f"no way to change {value!r}")


def test_defaults_are_part_of_the_hash():
    spelled = tree()
    spelled["step"][0]["batch_size"] = parse_recipe(tree()).named("taught").batch_size
    assert parse_recipe(spelled).digest() == parse_recipe(tree()).digest()
    spelled["step"][0]["batch_size"] += 1
    assert parse_recipe(spelled).digest() != parse_recipe(tree()).digest()


def test_the_text_that_is_hashed_spells_every_key_out():
    spelled = json.loads(parse_recipe(tree()).canonical())
    assert set(spelled) == {field.alias or name for name, field in Recipe.model_fields.items()}
    assert spelled["serve"]["port"] == parse_recipe(tree()).serve.port
    assert spelled["pools"]["home"]["rehearsed"] is False
    assert spelled["step"][0]["optimizer"]["gradient_clip"] == 1.0


def test_a_recipe_cannot_change_after_reading():
    recipe = parse_recipe(tree())
    with pytest.raises(ValueError, match="frozen"):
        recipe.named("taught").steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_a_whole_architecture_and_yields_to_the_recipe(preset: str):
    own = tree()
    own["model"] = {"preset": preset}
    assert parse_recipe(own).model.preset == preset
    own["model"]["max_position_embeddings"] = 77
    assert parse_recipe(own).model.max_position_embeddings == 77


def test_an_unknown_preset_gets_a_suggestion(path: Path):
    with pytest.raises(RecipeError, match="unknown model preset 'r-nanno'; did you mean 'r-nano'"):
        load_recipe(path, ("model.preset=r-nanno",))


PUBLISHED_CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


def from_config(tmp_path: Path, **changes: Any) -> Recipe:
    folder = tmp_path / "checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED_CONFIG | changes), encoding="utf-8")
    own = tree()
    own["model"] = {"from": "checkpoint"}
    return parse_recipe(own, origin=tmp_path / "small.toml")


def test_from_reads_the_architecture_of_a_published_config(tmp_path: Path):
    model = from_config(tmp_path, rope_theta=500.0).model
    assert (model.hidden_size, model.num_hidden_layers, model.first_k_dense_replace) == (64, 4, 2)
    assert (model.rope_theta, model.rope_scaling, model.from_) == (500.0, None, tmp_path / "checkpoint")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_from_reads_plain_rotary_positions_in_either_layout(tmp_path: Path, key: str):
    model = from_config(tmp_path, **{key: {"rope_type": "default", "rope_theta": 700.0}}).model
    assert (model.rope_theta, model.rope_scaling) == (700.0, None)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_from_reads_yarn_in_the_layout_of_either_transformers_generation(tmp_path: Path, key: str):
    kind = {"rope_scaling": "type", "rope_parameters": "rope_type"}[key]
    yarn = {kind: "yarn", "factor": 40, "original_max_position_embeddings": 128, "mscale": 0.7, "mscale_all_dim": 0.5}
    scaling = from_config(tmp_path, **{key: yarn}).model.rope_scaling
    assert scaling is not None
    assert (scaling.factor, scaling.mscale, scaling.mscale_all_dim, scaling.beta_fast) == (40, 0.7, 0.5, 32)


def test_from_refuses_what_it_cannot_honour(tmp_path: Path):
    with pytest.raises(RecipeError, match="'mamba' is not read; read: deepseek_v3, qwen2, qwen3, llama"):
        from_config(tmp_path, model_type="mamba")
    with pytest.raises(RecipeError, match="'linear' is not supported"):
        from_config(tmp_path, rope_scaling={"type": "linear", "factor": 2})
    with pytest.raises(RecipeError, match="scoring_func"):
        from_config(tmp_path, scoring_func="tanh")
    (tmp_path / "checkpoint" / "config.json").write_text("{", encoding="utf-8")
    own = tree()
    own["model"] = {"from": "checkpoint"}
    with pytest.raises(RecipeError, match="not valid JSON"):
        parse_recipe(own, origin=tmp_path / "small.toml")
    own["model"] = {"from": "nowhere"}
    with pytest.raises(RecipeError, match=r"no config\.json"):
        parse_recipe(own, origin=tmp_path / "small.toml")


def test_a_config_that_is_silent_about_mtp_and_yarn_factors_is_read_as_its_library_does(tmp_path: Path):
    """transformers has no MTP layer; DeepSeek's modeling_deepseek.py defaults to mscale 1 and mscale_all_dim 0."""
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 128}
    model = from_config(tmp_path, rope_scaling=yarn).model
    assert model.num_nextn_predict_layers == 0
    assert (model.rope_scaling.mscale, model.rope_scaling.mscale_all_dim) == (1.0, 0.0)
    assert from_config(tmp_path, num_nextn_predict_layers=1).model.num_nextn_predict_layers == 1


@pytest.mark.parametrize("key", ["attention_bias", "moe_layer_freq", "hidden_act", "topk_method", "attention_dropout"])
def test_from_refuses_a_setting_that_would_compute_something_else(tmp_path: Path, key: str):
    value = {"attention_bias": True, "moe_layer_freq": 2, "attention_dropout": 0.1}.get(key, "other")
    with pytest.raises(RecipeError, match=rf"config\.json: {key} = {value!r} is not supported; supported: "):
        from_config(tmp_path, **{key: value})
    with pytest.raises(RecipeError, match=r"rope parameter truncate = False is not supported"):
        from_config(tmp_path, rope_scaling={"type": "yarn", "factor": 40, "truncate": False})


DENSE = {
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def with_model(**model: Any) -> Recipe:
    return parse_recipe({**tree(), "model": model})


def test_a_dense_model_is_chosen_by_its_type_and_keeps_it_in_the_stored_recipe():
    recipe = with_model(**DENSE)
    assert isinstance(recipe.model, DenseSection) and recipe.model.head_size == 16
    assert Recipe.model_validate_json(recipe.canonical()) == recipe
    old = json.loads(parse_recipe(tree()).canonical())
    del old["model"]["model_type"]
    assert isinstance(Recipe.model_validate(old).model, DeepseekSection), "recipes from before model_type"


def test_errors_of_a_dense_model_name_its_own_keys():
    with pytest.raises(RecipeError, match=r"unknown key model\.num_key_value_head; did you mean 'num_key_value_heads'"):
        with_model(**DENSE, num_key_value_head=3)
    with pytest.raises(RecipeError, match=r"unknown key model\.kv_lora_rank; known: .*num_key_value_heads"):
        with_model(**DENSE, kv_lora_rank=3)
    scaling = {"factor": 8.0, "low_freq_facter": 1.0}
    with pytest.raises(
        RecipeError, match=r"unknown key model\.rope_scaling\.low_freq_facter; did you mean 'low_freq_fa"
    ):
        with_model(**DENSE, rope_scaling=scaling)
    with pytest.raises(RecipeError, match=r"model\.vocab_size is missing"):
        with_model(**{key: value for key, value in DENSE.items() if key != "vocab_size"})
    with pytest.raises(RecipeError, match=r"model: num_attention_heads \(4\) must be a multiple"):
        with_model(**DENSE | {"num_key_value_heads": 3})
    with pytest.raises(RecipeError, match=r"model: model_type must be one of deepseek_v3, qwen2, qwen3, llama"):
        with_model(**DENSE | {"model_type": "gemma3"})
    with pytest.raises(RecipeError, match=r"model: .*dictionary"):
        parse_recipe({**tree(), "model": 3})


def test_preset_and_from_exclude_each_other(path: Path):
    with pytest.raises(RecipeError, match="keep one"):
        load_recipe(path, ("model.from=somewhere",))


@pytest.mark.parametrize("stage", ["train", "rollout", "serve"])
def test_a_place_that_names_an_unknown_pool_is_refused(path: Path, stage: str):
    with pytest.raises(RecipeError, match=f"place.{stage} names the pool 'moon'; the recipe has home, away"):
        load_recipe(path, (f'place.{stage}=["home", "moon"]',))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.n_group=3", "must be a multiple of n_group"),
        ("model.num_experts_per_tok=7", "exceeds the 4 reachable experts"),
        ("model.qk_rope_head_dim=7", "must be even"),
        ("step.taught.optimizer.name=muon", "needs matrix_learning_rate"),
        ("step.reinforced.samples_per_prompt=1", "step.reinforced.samples_per_prompt"),
        ("name=Two Words", "name"),
    ],
)
def test_values_that_contradict_each_other_are_refused(path: Path, override: str, words: str):
    with pytest.raises(RecipeError, match=words):
        load_recipe(path, (override,))


def test_unreadable_files_are_explained(tmp_path: Path, path: Path):
    with pytest.raises(RecipeError, match=r"no recipe at .*small\.toml"):
        load_recipe(tmp_path / "smal.toml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    path.write_bytes(b"name = \xff")
    with pytest.raises(IsthmusError, match="not UTF-8"):
        load_recipe(path)
    path.write_text("name = [", encoding="utf-8")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(path)


def test_reading_leaves_the_given_tree_alone():
    given_tree = tree()
    before = copy.deepcopy(given_tree)
    parse_recipe(given_tree)
    assert given_tree == before


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")), ids=lambda file: file.name
)
def test_every_shipped_recipe_is_valid(file: Path):
    assert load_recipe(file).name == file.stem

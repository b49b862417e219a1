"""Pools that are reached by URLs: whatever their engines' make, they take the weights of a step, or are refused before
anything is trained, with the command that starts one that can take part."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from isthmus.chips import get_chip
from isthmus.engines import EngineError, Sampling
from isthmus.engines.elsewhere import open_fleet
from isthmus.engines.remote.transport import Transport
from isthmus.errors import IsthmusError
from isthmus.formats import get_format
from isthmus.formats.updates.wire import digest, pack
from isthmus.pools import get_pool
from isthmus.probes import pilots
from isthmus.probes.contract import Setting
from isthmus.probes.findings import Findings
from isthmus.recipe.read import load_recipe
from isthmus.recipe.section import RecipeError
from isthmus.tools import steps
from tests.support.engine_bundle import small_tokenizer, thinking_model, write_small_bundle
from tests.support.flow_recipe import RECIPE, REINFORCED, TAUGHT
from tests.support.other_servers import FakeSgLang, FakeVllm, serving

PROMPTS = [[0, 2, 60 + number, 61, 4] for number in range(8)]


def pool_of(urls, **more):
    """The pool of a recipe with these engines, as `isthmus run` reads it."""
    keys = {"pools.away.rehearsed": False, "pools.away.engines": urls, "place.train": ["home"], "place.serve": ["home"]}
    keys |= {f"pools.away.{name}": value for name, value in more.items()}
    return get_pool(load_recipe(RECIPE, tuple(f"{name}={_toml(value)}" for name, value in keys.items())), "away")


def _toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, list) else f'"{value}"'


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere") / "bf16"
    write_small_bundle(folder, "bf16")
    return folder


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("makes", [(FakeVllm, FakeVllm), (FakeSgLang,), (FakeVllm, FakeSgLang)])
def test_engines_of_any_make_take_the_weights_through_the_folder_and_serve_that_version(makes, bundle, stack, tmp_path):
    servers = [stack.enter_context(serving(make(bundle))) for make in makes]
    (tmp_path / "exchange").mkdir()
    pool = pool_of([server.url for server in servers], exchange=tmp_path / "exchange")
    told = []
    fleet = open_fleet(pool, bundle, "bf16", lambda name, **facts: told.append((name, facts)))
    assert len(told[0][1]["engines"]) == len(servers)
    for version in (4, 5):
        model = thinking_model(small_tokenizer(), version)
        payload = pack(get_format("bf16").export(model.state_dict(), model.architecture))
        fleet.update(payload, version, digest(payload))
        found = fleet.generate(PROMPTS, Sampling(6))
        assert {one.version for group in found for one in group} == {version}
        assert {server.version for server in servers} == {str(version)}
    assert [name for name, _ in told] == ["engines"]
    assert not any(getattr(server, "paused", False) for server in servers)


def test_a_vllm_that_a_dead_trainer_left_paused_runs_again(bundle, stack, tmp_path):
    server = stack.enter_context(serving(FakeVllm(bundle)))
    server.paused = True
    (tmp_path / "exchange").mkdir()
    open_fleet(pool_of([server.url], exchange=tmp_path / "exchange"), bundle, "bf16", lambda *_, **__: None)
    assert not server.paused


def test_a_vllm_that_is_interrupted_in_a_reload_is_not_left_paused(bundle, stack, tmp_path, monkeypatch):
    server = stack.enter_context(serving(FakeVllm(bundle)))
    (tmp_path / "exchange").mkdir()
    pool = pool_of([server.url], exchange=tmp_path / "exchange")
    fleet = open_fleet(pool, bundle, "bf16", lambda *_, **__: None)
    model = thinking_model(small_tokenizer(), 1)
    payload = pack(get_format("bf16").export(model.state_dict(), model.architecture))
    post = Transport.post

    def interrupted(transport, path, content=None):
        if path == "/collective_rpc":
            raise KeyboardInterrupt
        return post(transport, path, content)

    monkeypatch.setattr(Transport, "post", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fleet.members[0].engine.update(payload, 1, digest(payload))
    assert "/pause" in server.calls and not server.paused


@pytest.mark.parametrize(
    ("change", "more", "reason"),
    [
        ({"dev": False}, {}, "VLLM_SERVER_DEV_MODE=1 in its environment"),
        ({"raw": True}, {}, "--logprobs-mode processed_logprobs"),
        ({"owner": "someone"}, {}, "none whose weights isthmus can exchange"),
        ({"key": "secret"}, {}, "401"),
        ({}, {"exchange": None}, "exchange = FOLDER"),
    ],
)
def test_what_lacks_something_is_refused_with_the_command_that_starts_it_well(
    change, more, reason, bundle, stack, tmp_path
):
    server = stack.enter_context(serving(FakeVllm(bundle, **change)))
    (tmp_path / "exchange").mkdir()
    given = {"exchange": tmp_path / "exchange"} | more
    pool = pool_of([server.url], **{name: value for name, value in given.items() if value is not None})
    with pytest.raises(EngineError) as refused:
        open_fleet(pool, bundle, "bf16", lambda *_, **__: None)
    said = str(refused.value)
    assert reason in said
    assert """--weight-transfer-config '{"backend": "isthmus"}'""" in said
    assert """--additional-config '{"rl_config": {"enabled": true}}'""" in said and "vllm serve" in said
    assert "isthmus.engines.local" in said


def test_an_engine_of_another_model_is_refused(bundle, stack, tmp_path):
    other = tmp_path / "other"
    write_small_bundle(other, "fp32")
    server = stack.enter_context(serving(FakeVllm(other)))
    (tmp_path / "exchange").mkdir()
    with pytest.raises(EngineError, match="another shape or format"):
        open_fleet(pool_of([server.url], exchange=tmp_path / "exchange"), bundle, "bf16", lambda *_, **__: None)


def test_a_key_and_a_folder_that_are_not_there_are_named(bundle, tmp_path):
    url = ["http://127.0.0.1:9"]
    for more, reason in (
        ({"api_key_file": tmp_path / "none"}, "api_key_file cannot be read"),
        ({"exchange": tmp_path / "none"}, "is no folder here"),
    ):
        with pytest.raises(IsthmusError, match=reason):
            open_fleet(pool_of(url, **more), bundle, "bf16", lambda *_, **__: None)
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(IsthmusError, match="must hold the key"):
        open_fleet(pool_of(url, api_key_file=tmp_path / "empty"), bundle, "bf16", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfekey", "api_key_file cannot be read.*utf-8"),
        ("\N{BOM}key".encode(), "no HTTP header carries"),
        ("schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel".encode(), "no HTTP header carries"),
        (b"ke\x00y", "no HTTP header carries"),
    ],
)
def test_a_key_that_no_header_carries_is_refused(content, reason, bundle, tmp_path):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(IsthmusError, match=reason):
        open_fleet(pool_of(["http://127.0.0.1:9"], api_key_file=tmp_path / "key"), bundle, "bf16", lambda *_, **__: 0)


def test_a_vllm_that_loads_other_weights_than_it_read_is_not_tried_again(bundle, stack, tmp_path):
    """A second reload of the served weights changes nothing, as the first one left them."""
    servers = [stack.enter_context(serving(FakeVllm(bundle))) for _ in range(2)]
    servers[1].reload_factor = 1.5
    (tmp_path / "exchange").mkdir()
    pool, told = pool_of([server.url for server in servers], exchange=tmp_path / "exchange"), []
    fleet = open_fleet(pool, bundle, "bf16", lambda name, **facts: told.append(name))
    model = thinking_model(small_tokenizer(), 1)
    payload = pack(get_format("bf16").export(model.state_dict(), model.architecture))
    for version in (1, 2, 3):
        fleet.update(payload, version, digest(payload))
        fleet.generate(PROMPTS[:2], Sampling(2))
        assert [member.url for member in fleet.serving] == [servers[0].url]
    assert told == ["engines", "fallback"]


def test_a_fleet_of_only_such_vllms_serves_nothing(bundle, stack, tmp_path):
    server = stack.enter_context(serving(FakeVllm(bundle)))
    server.reload_factor = 1.5
    (tmp_path / "exchange").mkdir()
    fleet = open_fleet(pool_of([server.url], exchange=tmp_path / "exchange"), bundle, "bf16", lambda *_, **__: None)
    model = thinking_model(small_tokenizer(), 1)
    payload = pack(get_format("bf16").export(model.state_dict(), model.architecture))
    for version, reason in ((1, "changes what vLLM"), (2, "no engine is left")):
        with pytest.raises(EngineError, match=reason):
            fleet.update(payload, version, digest(payload))


@pytest.fixture
def piloted(bundle, tmp_path, monkeypatch):
    """Lets the engines of a pool be examined for a recipe; what they are refused for, if nothing was found of them."""
    monkeypatch.setattr(pilots, "PILOT_SAMPLES", (8, 16))
    monkeypatch.setattr(pilots, "PILOT_TOKENS", 4)
    monkeypatch.setattr(pilots, "write_bundle", lambda *_: None)
    monkeypatch.setattr(pilots, "open_fleet", lambda pool, _, *more, **told: open_fleet(pool, bundle, *more, **told))
    model = thinking_model(small_tokenizer(), 1)

    def examine(pool, *changes) -> str:
        recipe = load_recipe(RECIPE, (f"step.{REINFORCED}.rollout_format=bf16", *changes))
        work = SimpleNamespace(
            model=model,
            recipe=recipe.model_copy(update={"model": model.architecture}),
            tokenizer=None,
            prompts=lambda count: PROMPTS[:count],
        )
        found = Findings(Setting(recipe, pool, get_chip(pool.chip), None, "cpu", tmp_path, tmp_path))
        run = SimpleNamespace(path=tmp_path, event=lambda *_, **__: None)
        with pytest.raises(EngineError) as refused:
            pilots.elsewhere(found, work, run)
        assert not found.evidence
        return str(refused.value)

    return examine


def test_a_pool_with_an_engine_that_takes_no_weights_does_not_qualify(bundle, stack, tmp_path, piloted):
    """The other one does, and could go on alone."""
    servers = [stack.enter_context(serving(FakeVllm(bundle))) for _ in range(2)]
    servers[1].reload_factor = 1.5
    (tmp_path / "exchange").mkdir()
    refused = piloted(pool_of([server.url for server in servers], exchange=tmp_path / "exchange"))
    assert "changes what vLLM" in refused and servers[1].url in refused and "vllm serve" in refused


def test_an_engine_that_cannot_tell_what_a_step_learns_from_does_not_qualify(bundle, stack, tmp_path, piloted):
    server = stack.enter_context(serving(FakeVllm(bundle)))
    (tmp_path / "exchange").mkdir()
    pool = pool_of([server.url], exchange=tmp_path / "exchange")
    refused = piloted(pool, f"step.{REINFORCED}.loss.router_replay=true")
    assert f"step.{REINFORCED}.loss.router_replay" in refused and server.url in refused
    assert "--admin --record-routes" in refused and "vllm serve" not in refused
    refused = piloted(pool, f"step.{REINFORCED}.top_k=5", f"step.{REINFORCED}.loss.keep_sampling_mask=true")
    assert f"step.{REINFORCED}.loss.keep_sampling_mask" in refused and server.url in refused


def _away(url):
    return ["pools.away.rehearsed=false", f"pools.away.engines=['{url}']"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["pools.away.engines=['http://a:1']"], "keep one of the two"),
        (["pools.away.rehearsed=false", "pools.away.engines=['a:1']"], "is not the URL of an engine"),
        (["pools.away.rehearsed=false", "pools.away.engines=['http://a:1', 'http://a:1/']"], "stands twice"),
        (["pools.away.rehearsed=false", "pools.away.engines=['http://a:1']"], "names 'away', which is reached by"),
        (_away("http://h:99999"), r"engines\[0\] is no URL"),
        (_away("http://h:80a"), r"engines\[0\] is no URL"),
        (_away("http://h:0"), "is not the URL of an engine"),
        (_away("http://[::1"), "is no URL"),
        (_away("http://h:1?key=x"), "a query or a fragment"),
        (_away("http://h:1#x"), "a query or a fragment"),
        (_away("http://h:1/a b"), "signs that no URL has"),
        (["pools.home.exchange=x"], "exchange is for engines that run elsewhere"),
    ],
)
def test_a_recipe_in_which_engines_make_no_sense_is_refused(changes, reason):
    with pytest.raises(RecipeError, match=reason):
        load_recipe(RECIPE, tuple(changes))


@pytest.mark.parametrize("url", ["http://me:pa55word@h:1", "http://me:pa55word@h:99999", "http://pa55word@h"])
def test_a_password_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(RecipeError, match="api_key_file") as refused:
        load_recipe(RECIPE, tuple(_away(url)))
    assert "pa55word" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([f"evaluation.after=['{TAUGHT}']", "evaluation.format=bf16"], "write the same format in each"),
        ([f"evaluation.after=['{TAUGHT}']"], None),
    ],
)
def test_what_engines_elsewhere_do_not_do_is_refused_before_a_run(changes, reason):
    here = load_recipe(RECIPE, tuple(changes))
    steps.check(here)
    elsewhere = [*_away("http://a:1"), "place.train=['home']", "place.serve=['home']", "place.rollout=['away']"]
    recipe = load_recipe(RECIPE, (*changes, *elsewhere))
    if reason is None:
        steps.check(recipe)
        return
    with pytest.raises(IsthmusError, match=reason):
        steps.check(recipe)
    steps.check(load_recipe(RECIPE, (*changes, *elsewhere, "place.rollout=['away', 'home']")))


def test_a_step_with_a_model_of_its_own_is_refused_on_engines_elsewhere():
    recipe = load_recipe(
        RECIPE, (*_away("http://a:1"), "place.train=['home']", "place.serve=['home']", "place.rollout=['away']")
    )
    steps.check(recipe)
    other = recipe.model.model_copy(update={"num_hidden_layers": recipe.model.num_hidden_layers + 1})
    first = recipe.step[0].model_copy(update={"model": "other"})
    changed = recipe.model_copy(update={"models": {"other": other}, "step": [first, *recipe.step[1:]]})
    with pytest.raises(IsthmusError, match="a model of its own"):
        steps.check(changed)

"""What an engine says it holds, against what was sent: of our own engine, of vLLM with the plug-in, and of a fleet."""

from __future__ import annotations

import pytest
import torch

from isthmus.engines import account as accounts
from isthmus.engines.account import Account, Sums, compare
from isthmus.engines.local.api.service import load_service
from isthmus.engines.local.api.weights import WeightUpdates
from isthmus.engines.vllm_plugin.checksums import tensor_sum
from isthmus.formats.updates.delta import WeightSet
from isthmus.formats.updates.shared_layout import write_version
from tests.support.engine_bundle import write_small_bundle
from tests.support.toy_engine import checkpoint, standing


@pytest.fixture(params=[1, 2])
def ranks(request, tmp_path):
    """The processes of an engine that took version 1."""
    source = write_version(tmp_path, None, WeightSet.of(1, checkpoint(1)))
    engines = [standing(rank, request.param) for rank in range(request.param)]
    for one in engines:
        one.stage(str(source))
        one.switch()
    return engines


def account(ranks, *, drafts=False):
    return Account.of([one.report() | {"drafts": drafts} for one in ranks])


def wrong(ranks, version=1, seed=1, **options):
    return compare(account(ranks, **options), version, checkpoint(seed)).wrong


def test_a_healthy_engine_has_nothing_wrong_and_all_that_it_reads_is_seen(ranks):
    found = compare(account(ranks), 1, checkpoint(1))
    assert (found.wrong, found.seen, found.unseen) == ({}, len(checkpoint(1)) - 1, 1)


def test_a_version_that_was_not_taken_is_wrong_in_every_tensor(ranks):
    assert wrong(ranks, version=2, seed=2).keys() == checkpoint(2).keys()


def test_of_several_engines_each_is_held_against_what_was_sent_whose_checksums_are_taken_once(tmp_path, monkeypatch):
    source = write_version(tmp_path, None, WeightSet.of(1, checkpoint(1)))
    engines = [standing(0, 1) for _ in range(3)]
    for one in engines:
        one.stage(str(source))
        one.switch()
    engines[1].live.norm.data[0] += 1
    taken = []
    monkeypatch.setattr(accounts, "tensor_sum", lambda tensor: taken.append(tensor.shape) or tensor_sum(tensor))
    sums = Sums(checkpoint(1))
    found = [compare(account([one]), 1, checkpoint(1), sums) for one in engines]
    assert [list(one.wrong) for one in found] == [[], ["norm.weight"], []]
    assert len(taken) == found[0].seen


def test_a_stale_tensor_is_named_and_no_other(ranks):
    sent = checkpoint(1) | {"layer.k_proj.weight": checkpoint(2)["layer.k_proj.weight"]}
    assert compare(account(ranks), 1, sent).wrong == {"layer.k_proj.weight": "has other values than were sent"}


def test_a_transposed_expert_is_named(ranks):
    for one in ranks:
        w13 = one.live.experts.w13
        w13.data[2] = w13.data[2].flip(0)
    assert "layer.experts.2.gate_proj.weight" in wrong(ranks)


def test_a_process_that_stayed_behind_is_found(ranks, tmp_path):
    if len(ranks) == 1:
        pytest.skip("one process alone cannot stay behind another")
    ranks[0].stage(str(write_version(tmp_path, WeightSet.of(1, checkpoint(1)), WeightSet.of(2, checkpoint(2)))))
    ranks[0].switch()
    assert set(wrong(ranks, version=2, seed=2).values()) == {"is of several versions instead of 2"}


def test_ranks_that_should_hold_the_same_and_do_not_are_found(ranks):
    ranks[-1].live.norm.data[0] += 1
    assert "norm.weight" in wrong(ranks)


def test_a_draft_model_that_never_followed_is_named_where_there_is_one(ranks):
    assert wrong(ranks, drafts=True) == {"mtp.weight": "never followed: the model that guesses tokens was not given it"}


def test_a_tensor_of_which_the_engine_says_nothing_is_wrong(ranks):
    sent = checkpoint(1) | {"other.weight": torch.ones(2)}
    assert compare(account(ranks), 1, sent).wrong == {"other.weight": "is not among what the engine holds"}


def test_what_cannot_be_read_is_no_account(ranks):
    report = ranks[0].report() | {"drafts": False}
    with pytest.raises((KeyError, TypeError, ValueError)):
        Account.of([report | {"tensors": {"norm.weight": [{"place": {"offset": 0}, "dtype": "bfloat16"}]}}])


@pytest.mark.parametrize("form", ["fp32", "w8a8"])
def test_our_own_engine_names_what_it_holds_and_what_it_computes_with_otherwise(tmp_path, form):
    write_small_bundle(tmp_path / form, form)
    service = load_service(tmp_path / form, slots=2)
    try:
        updates, model = WeightUpdates(service), service.core.runner.model
        sent = {name: tensor.clone() for name, tensor in service.tensors.items()}

        def wrong():
            return compare(Account.of([updates.checksums()]), service.core.version, sent).wrong

        assert wrong() == {}
        with torch.no_grad():
            model.model.norm.weight[3] += 1
        assert set(wrong()) == {"model.norm.weight"}
    finally:
        service.core.stop()

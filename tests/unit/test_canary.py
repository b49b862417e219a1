"""Canaries: a healthy engine passes, a damaged one is found at once and can be brought back."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from isthmus.engines.local.api.access_log import AccessLog
from isthmus.engines.local.api.canary import Canary, drift_of
from isthmus.engines.local.api.keys import Keyring
from isthmus.engines.local.api.server import CanaryPlan, Server
from isthmus.engines.local.api.service import load_service
from isthmus.engines.local.core.sampler import Draw
from isthmus.engines.local.core.scheduler import Finished
from isthmus.errors import DamagedFile, GateRefused, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import Bundle, open_bundle, read_bundle
from isthmus.formats.files.golden import GOLDEN, Golden, GoldenAnswer, make_golden, read_golden, write_golden
from isthmus.formats.updates.wire import digest, pack
from isthmus.parity.seal import verify_seal, write_seal
from isthmus.progress import Watch
from isthmus.recipe.schema import ServeSection
from isthmus.stages import serve
from tests.support.bundles import passed
from tests.support.engine_bundle import small_tokenizer, thinking_model, write_small_bundle
from tests.support.live_server import InBackground, ask, greedy, live, metric, wait_until

ADMIN = "sesame"
BOUND = 0.1
PROMPTS = [[0, 2, 60, 61, 4], [0, 2, 70, 4], [9] * 20, [5, 6], [77, 78, 79, 80]]


def sealed_bundle(parent, format_name="w8a8"):
    folder = parent / format_name
    _, tokenizer = write_small_bundle(folder, format_name)
    write_golden(folder, make_golden(read_bundle(folder), PROMPTS, tokenizer.ends))
    return folder, write_seal(folder, **passed())


@pytest.fixture(scope="module", params=["w8a8", "fp32"])
def bundle(request, tmp_path_factory):
    return sealed_bundle(tmp_path_factory.mktemp("canary"), request.param)


@pytest.fixture(scope="module")
def w8a8(tmp_path_factory):
    return sealed_bundle(tmp_path_factory.mktemp("canary"))[0]


@pytest.fixture
def service(bundle):
    folder, seal = bundle
    found = load_service(folder, slots=8, seal=seal.id)
    yield found
    found.core.stop()


def damage(service):
    """What a fault in memory would do: the numbers of one layer of the running model are not those that were loaded."""
    service.core.runner.model.model.layers[1].input_layernorm.weight.mul_(1.5)


def golden_of(service) -> Golden:
    assert service.golden is not None
    return service.golden


def test_golden_answers_are_the_same_piece_by_piece(bundle, monkeypatch):
    folder, _ = bundle
    monkeypatch.setattr("isthmus.formats.files.golden.WHOLE_BYTES", 0)
    with open_bundle(folder) as lent:
        monkeypatch.setattr(Bundle, "build", None)
        assert make_golden(lent, PROMPTS, small_tokenizer().ends) == read_golden(folder)


def test_a_golden_answer_ends_at_any_of_the_ends(bundle):
    whole_bundle = read_bundle(bundle[0])
    free = make_golden(whole_bundle, PROMPTS, ()).answers
    ends = {free[0].tokens[4], free[1].tokens[6]}
    for answer, whole in zip(make_golden(whole_bundle, PROMPTS, ends).answers, free, strict=True):
        first = next((at for at, token in enumerate(whole.tokens) if token in ends), len(whole.tokens))
        assert answer.tokens == whole.tokens[: first + 1]


def test_golden_answers_are_those_of_the_model_alone(bundle):
    folder, _ = bundle
    golden, stored = read_golden(folder), read_bundle(folder)
    assert golden is not None and [answer.prompt for answer in golden.answers] == PROMPTS
    model = stored.build()
    for answer in golden.answers:
        with torch.no_grad():
            logits = model(torch.tensor([[*answer.prompt, *answer.tokens]]))[0, len(answer.prompt) - 1 : -1]
        rows = logits.log_softmax(-1)
        assert rows.argmax(-1).tolist() == answer.tokens
        top = rows.topk(2).values
        torch.testing.assert_close(torch.tensor(answer.logprobs), top[:, 0], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(answer.margins), top[:, 0] - top[:, 1], atol=2e-4, rtol=0)


def test_the_seal_covers_the_golden_answers(tmp_path):
    folder, seal = sealed_bundle(tmp_path)
    assert GOLDEN in seal.files and verify_seal(folder, seal.id)
    content = json.loads((folder / GOLDEN).read_text())
    content["answers"][0]["logprobs"][0] -= 1
    (folder / GOLDEN).write_text(json.dumps(content))
    with pytest.raises(GateRefused, match=r"golden\.json does not match"):
        verify_seal(folder)
    (folder / GOLDEN).write_text('{"format": "w8a8", "answers": [{"prompt": [], "tokens": []}]}')
    with pytest.raises(DamagedFile, match="cannot be read"):
        read_golden(folder)


def test_a_healthy_engine_is_within_the_bound(service):
    report = Canary(service, golden_of(service), bound=BOUND).run()
    assert report.outcome == "ok" and report.prompts == len(PROMPTS), report
    assert report.drift is not None and report.drift < BOUND / 2
    assert report.tokens == sum(len(answer.tokens) for answer in golden_of(service).answers)


def test_damage_is_found_by_the_next_canary(service):
    canary = Canary(service, golden_of(service), bound=BOUND)
    canary.run()
    damage(service)
    report = canary.run()
    assert report.outcome == "drift" and report.drift > BOUND and not report.rolled_back, report
    service.core.runner.model.lm_head.weight.fill_(float("nan"))
    report = canary.run()
    assert report.outcome == "drift" and report.drift == math.inf and report.shown()["drift"] == "inf"


def test_exchanged_weights_are_not_compared_with_the_bundles(service, bundle):
    canary = Canary(service, golden_of(service), bound=BOUND)
    model = thinking_model(small_tokenizer(), 1)
    service.exchange(get_format(service.identity.format).export(model.state_dict(), model.architecture), 7, "hash")
    report = canary.run()
    assert (report.outcome, report.drift, report.version) == ("not applicable", None, 7)
    service.restore(read_bundle(bundle[0]))
    assert canary.run().outcome == "ok" and service.core.version == 0


@pytest.mark.parametrize(
    ("tokens", "logprobs", "reason", "expected"),
    [
        ([4, 5, 6], [-0.5, -1.0, -0.1], "length", 0.0),
        ([4, 5, 6], [-0.5, -1.25, -0.2], "length", 0.25),
        ([4, 5, 7], [-0.5, -1.0, -0.14], "length", 0.03),
        ([4, 5, 7], [-0.5, -1.0, -0.53], "length", 0.4),
        ([4, 8, 6], [-0.5, -3.0, -0.1], "length", 2.0),
        ([4, 5], [-0.5, -1.0], "stop", 0.03),
        ([4], [-0.5], "stop", 2.0),
        ([4, 5], [-0.5, float("nan")], "error", math.inf),
    ],
)
def test_drift_is_the_largest_change_and_forgives_near_ties(tokens, logprobs, reason, expected):
    golden = GoldenAnswer(prompt=[1], tokens=[4, 5, 6], logprobs=[-0.5, -1.0, -0.1], margins=[3.0, 2.0, 0.03])
    sample = Finished(0, tokens, logprobs, [], reason, 0, 0, 0.0, 0.0)
    assert drift_of(golden, sample) == pytest.approx(expected)


def test_an_alarm_brings_the_sealed_weights_back(bundle, tmp_path):
    folder, seal = bundle
    service = load_service(folder, slots=8, seal=seal.id)
    plan = CanaryPlan(None, BOUND, sealed_bundle=lambda: read_bundle(folder))
    log = tmp_path / "log"
    with live(Server(service, admin_key=ADMIN, canary=plan, log=AccessLog(log))) as port:
        before = greedy(port)
        assert ask(port, "POST", "/canary/run", key=ADMIN)[2]["last"]["outcome"] == "ok"
        damage(service)
        damaged = greedy(port)
        assert damaged["logprobs"]["token_logprobs"] != before["logprobs"]["token_logprobs"]
        service.core.pause()
        running = InBackground(ask, port, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 80})
        wait_until(lambda: service.core.waiting == 1)
        service.core.resume()
        report = ask(port, "POST", "/canary/run", key=ADMIN)[2]["last"]
        assert (report["outcome"], report["rolled_back"]) == ("ok", True), report
        assert running.result()[0] in (200, 503)
        assert greedy(port) == before, "the answer is the same again, to the last digit"
        assert metric(port, "isthmus:rollbacks_total") == 1 and metric(port, "isthmus:canary_alarm") == 0
        assert ask(port, "GET", "/ready")[0] == 200
        assert ask(port, "GET", "/weight_info", key=ADMIN)[2]["last_update"]["outcome"] == "restored"
    outcomes = [line["outcome"] for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "canary"]
    assert outcomes == ["ok", "drift", "ok"]


def test_what_runs_with_damaged_weights_ends_with_an_error(w8a8):
    service = load_service(w8a8, slots=8)
    plan = CanaryPlan(None, BOUND, sealed_bundle=lambda: read_bundle(w8a8))
    server = Server(service, admin_key=ADMIN, canary=plan)
    with live(server) as port:
        ask(port, "POST", "/pause", key=ADMIN)
        body = {"prompt": "a", "max_tokens": 80, "stream": True}
        running = InBackground(ask, port, "POST", "/v1/completions", body)
        wait_until(lambda: service.core.waiting == 1)
        server.roll_back(lambda: read_bundle(w8a8), "a test")
        status, _, events = running.result()
        assert status == 200 and "sealed ones were brought back" in events and events.endswith("data: [DONE]\n\n")
        assert service.core.paused, "who paused it has not resumed it"
        ask(port, "POST", "/resume", key=ADMIN)
        greedy(port)


def test_without_rollback_the_alarm_stays_until_a_canary_passes(w8a8):
    service = load_service(w8a8, slots=8)
    heard = []
    with live(Server(service, admin_key=ADMIN, canary=CanaryPlan(None, BOUND, tell=heard.append))) as port:
        assert math.isnan(metric(port, "isthmus:canary_drift"))
        damage(service)
        ask(port, "POST", "/canary/run", key=ADMIN)
        assert metric(port, "isthmus:canary_alarm") == 1 and metric(port, "isthmus:canary_drift") > BOUND
        assert ask(port, "GET", "/canary", key=ADMIN)[2]["last"]["outcome"] == "drift"
        assert ask(port, "GET", "/ready")[0] == 200, (
            "an alarm is for people; only a failed rollback turns requests away"
        )
        model = thinking_model(small_tokenizer(), 1)
        payload = pack(get_format("w8a8").export(model.state_dict(), model.architecture))
        assert ask(port, "POST", f"/update_weights?version=1&sha256={digest(payload)}", payload, ADMIN)[0] == 200
        assert ask(port, "POST", "/canary/run", key=ADMIN)[2]["last"]["outcome"] == "not applicable"
        assert metric(port, "isthmus:canary_alarm") == 0 and metric(port, "isthmus:canary_runs_total") == 2
    assert [report.outcome for report in heard] == ["drift", "not applicable"]


def test_a_rollback_that_does_not_help_turns_requests_away(w8a8):
    service = load_service(w8a8, slots=8)
    model = thinking_model(small_tokenizer(), 3)
    other = get_format("w8a8").export(model.state_dict(), model.architecture)
    wrong = dataclasses.replace(read_bundle(w8a8), tensors=other)
    with live(Server(service, admin_key=ADMIN, canary=CanaryPlan(None, BOUND, sealed_bundle=lambda: wrong))) as port:
        damage(service)
        assert ask(port, "POST", "/canary/run", key=ADMIN)[2]["last"]["outcome"] == "drift"
        status, _, state = ask(port, "GET", "/ready")
        assert (status, state["status"]) == (503, "damaged")


def break_one_token(service, token):
    """Of all texts only those with this token are answered by what is not a number."""
    with torch.inference_mode():
        service.core.runner.model.model.embed_tokens.weight[token] = float("nan")


def test_ready_says_the_truth_when_the_weights_in_use_answer_no_number(w8a8):
    """Also where no golden prompt would show it, and until other weights are in use."""
    service = load_service(w8a8, slots=8)
    with live(Server(service, admin_key=ADMIN, canary=CanaryPlan(None, BOUND))) as port:
        token = next(one for one in range(20, 60) if all(one not in prompt for prompt in PROMPTS))
        break_one_token(service, token)
        assert ask(port, "GET", "/ready")[0] == 200
        assert ask(port, "POST", "/v1/completions", {"prompt": [5, token], "max_tokens": 2})[0] == 500
        wait_until(lambda: ask(port, "GET", "/ready")[0] == 503)
        assert ask(port, "GET", "/ready")[2]["status"] == "damaged" and metric(port, "isthmus:canary_alarm") == 1
        model = thinking_model(small_tokenizer(), 1)
        payload = pack(get_format("w8a8").export(model.state_dict(), model.architecture))
        assert ask(port, "POST", f"/update_weights?version=1&sha256={digest(payload)}", payload, ADMIN)[0] == 200
        assert ask(port, "GET", "/ready")[0] == 200


def test_weights_that_answer_no_number_are_rolled_back(w8a8):
    service = load_service(w8a8, slots=8)
    plan = CanaryPlan(None, BOUND, sealed_bundle=lambda: read_bundle(w8a8))
    with live(Server(service, canary=plan)) as port:
        break_one_token(service, 30)
        assert ask(port, "POST", "/v1/completions", {"prompt": [5, 30], "max_tokens": 2})[0] == 500
        wait_until(lambda: metric(port, "isthmus:rollbacks_total") == 1)
        wait_until(lambda: ask(port, "GET", "/ready")[0] == 200)
        assert ask(port, "POST", "/v1/completions", {"prompt": [5, 30], "max_tokens": 2})[0] == 200


def test_a_sample_that_ends_by_its_own_fault_damages_nobody(w8a8, monkeypatch):
    service = load_service(w8a8, slots=8)
    with live(Server(service)) as port:
        looked = []
        whole = service.answers_numbers
        monkeypatch.setattr(service, "answers_numbers", lambda text: looked.append(text) or whole(text))
        monkeypatch.setattr("isthmus.engines.local.core.steps.draw", nothing_drawn)
        assert ask(port, "POST", "/v1/completions", {"prompt": [5, 30], "max_tokens": 2})[0] == 500
        wait_until(lambda: looked)
        assert ask(port, "GET", "/ready")[0] == 200


def nothing_drawn(logits, *_options):
    """A draw whose log-probabilities are not numbers, of logits that are."""
    count = len(logits)
    return Draw(torch.zeros(count, dtype=torch.long), torch.full((count,), float("nan")), torch.zeros_like(logits))


def test_the_schedule_runs_canaries_by_itself(w8a8):
    service = load_service(w8a8, slots=8)
    heard = []
    with live(Server(service, canary=CanaryPlan(0.01, BOUND, tell=heard.append))):
        wait_until(lambda: len(heard) >= 3)
    assert {report.outcome for report in heard} == {"ok"}


def test_a_rollback_is_refused_before_it_could_be_needed(tmp_path):
    write_small_bundle(tmp_path / "plain")
    section = ServeSection(port=0, on_drift="rollback", allow_unsealed=True)
    with pytest.raises(IsthmusError, match="no golden answers"):
        serve.serve_bundle(tmp_path / "plain", Watch(), serve.Serving(section=section, threads=1))


def test_a_bundle_without_golden_answers_says_that_no_canary_runs(tmp_path, capsys):
    write_small_bundle(tmp_path / "plain")
    serving = serve.Serving(section=ServeSection(allow_unsealed=True), threads=1)
    service = serve.open_service(tmp_path / "plain", serving)
    server = serve.open_server(tmp_path / "plain", service, serving, Keyring([]), Watch())
    said = " ".join(capsys.readouterr().out.split())
    assert server.canary is None and "no golden answers" in said and "UNSEALED" in said
    with live(server) as port:
        assert metric(port, "isthmus:unsealed") == 1
        assert ask(port, "POST", "/v1/completions", {"prompt": "a"})[2]["system_fingerprint"] == "unsealed-v0"

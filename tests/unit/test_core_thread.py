"""The thread of the engine: whoever waits for it is answered, however it ends, and one request cannot end it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, TimeoutError

import pytest

from isthmus.engines import EngineError
from isthmus.engines.local.core.core import Core
from isthmus.engines.local.core.scheduler import Finished, Request
from isthmus.recipe.schema import EngineOptions
from tests.support.engine_bundle import ask, finished, run_core, small_model
from tests.support.live_server import wait_until

NO_EOS = -1
PATIENCE_S = 60.0


def started(**options) -> Core:
    core = Core(small_model(1), eos_id=NO_EOS, options=EngineOptions(**options))
    core.start()
    return core


def within(patience_s: float, call, *arguments):
    """The result of a call that must not wait forever."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call, *arguments).result(patience_s)
    except TimeoutError:
        pytest.fail("it waits for a loop that has ended")
    finally:
        pool.shutdown(wait=False)


def answered(core: Core, prompt: list[int], new: int = 3, **options) -> Finished:
    """One sample of a running core."""
    done = threading.Event()
    events: list = []

    def listen(event) -> None:
        events.append(event)
        if isinstance(event, Finished):
            done.set()

    core.submit(Request([prompt], listen, new, **options))
    assert done.wait(PATIENCE_S)
    return finished(events)[0]


@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("command", ["pause", "resume", "swap"])
def test_a_core_that_has_stopped_refuses_commands(command, paused):
    core = started()
    if paused:
        core.pause()
    within(PATIENCE_S, core.stop)
    arguments = (small_model(2), 7) if command == "swap" else ()
    with pytest.raises(EngineError, match="the engine has stopped"):
        within(10, getattr(core, command), *arguments)
    with pytest.raises(EngineError, match="the engine has stopped"):
        core.submit(ask([[1]], 1)[0])
    core.end(ask([[1]], 1)[0])
    within(PATIENCE_S, core.stop)


def test_a_core_that_was_not_started_refuses_to_wait():
    with pytest.raises(EngineError, match="not started"):
        within(10, Core(small_model(1), eos_id=NO_EOS).pause)


def test_what_was_submitted_as_the_loop_ends_is_aborted():
    core = started()
    core.pause()
    request, events = ask([[1, 2]], 4)
    core.step = lambda: core.submit(request)
    within(PATIENCE_S, core.stop)
    assert [end.finish_reason for end in finished(events)] == ["abort"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_was_submitted_as_the_loop_fails_is_aborted():
    core = started()
    first, first_events = ask([[1, 2]], 90)
    request, events = ask([[1, 2]], 4)
    hidden = core.runner.hidden

    def fail(batch):
        core.submit(request)
        core.runner.hidden = hidden
        raise RuntimeError("a chip that fell off")

    core.runner.hidden = fail
    core.submit(first)
    wait_until(lambda: core.failure is not None)
    within(PATIENCE_S, core.stop)
    assert [end.finish_reason for end in finished(first_events)] == ["abort"]
    assert [end.finish_reason for end in finished(events)] == ["abort"]
    with pytest.raises(EngineError, match="fell off"):
        core.submit(ask([[1]], 1)[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_command_that_ends_the_loop_is_an_error_for_who_waits():
    core = started()

    def fail(_model) -> None:
        raise AssertionError("not a layer")

    core.runner.use = fail
    with pytest.raises(EngineError, match="not a layer"):
        within(PATIENCE_S, core.swap, small_model(2), 9)
    assert core.version == 0


def test_weights_that_cannot_be_taken_are_the_callers_error_and_the_old_ones_go_on():
    core = started()
    expected = answered(core, [5, 6], temperature=0.0)
    broken = small_model(2)
    del broken.model.norm
    with pytest.raises(AttributeError):
        within(PATIENCE_S, core.swap, broken, 9)
    assert answered(core, [5, 6], temperature=0.0).tokens == expected.tokens and core.version == 0
    core.stop()


@pytest.mark.parametrize("stream", [True, False])
def test_a_listener_that_raises_ends_its_own_request_alone(stream, caplog):
    core = started()
    core.pause()
    told = []

    def listen(event) -> None:
        told.append(event)
        raise RuntimeError("the event loop is closed")

    core.submit(Request([[1, 2], [3]], listen, 90 if stream else 2, stream=stream, n=2))
    request, events = ask([[4, 5]], 20)
    core.submit(request)
    core.resume()
    assert answered(core, [5, 6], 40).finish_reason == "length"
    core.stop()
    assert len(told) == 1 and "the event loop is closed" in caplog.text
    assert core.failure is None and core.running == core.waiting == core.scheduler.pool.used == 0
    assert [end.finish_reason for end in finished(events)] == ["length"]


def test_a_token_that_is_drawn_from_no_numbers_is_not_streamed():
    model = small_model(1)
    model.lm_head.weight[:] = float("nan")
    core = Core(model, eos_id=NO_EOS)
    request, events = ask([[1, 2]], 4, stream=True)
    run_core(core, request)
    assert [type(event) for event in events] == [Finished] and events[0].finish_reason == "error"


def test_a_prompt_whose_scores_are_no_numbers_is_an_error():
    model = small_model(1)
    model.model.embed_tokens.weight[7] = float("nan")
    core = Core(model, eos_id=NO_EOS, options=EngineOptions(block_size=4))
    (good, good_events), (spoilt, events) = (ask([[token] * 9], 0, prompt_logprobs=1) for token in (5, 7))
    run_core(core, good, spoilt)
    assert [finished(seen)[0].finish_reason for seen in (good_events, events)] == ["length", "error"]


class Failing:
    """A constraint that raises at one of its calls."""

    def __init__(self, where: str):
        self.where, self.done = where, False

    def start(self):
        return self._call("start")

    def mask(self):
        return self._call("mask") and None

    def accept(self, token: int) -> None:
        self._call("accept")

    def _call(self, where: str):
        if where == self.where:
            raise ValueError("no such state")
        return self


@pytest.mark.parametrize("where", ["start", "mask", "accept"])
def test_a_constraint_that_raises_ends_its_own_sample_alone(where, caplog):
    core = started()
    assert answered(core, [1, 2], constraint=Failing(where)).finish_reason == "error"
    assert "no such state" in caplog.text
    assert answered(core, [5, 6]).finish_reason == "length"
    core.stop()
    assert core.failure is None and core.scheduler.pool.used == 0

"""Keys, budgets and rates by themselves, on a clock of their own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.engines.local.api.keys import Keyring, Level, check_exposure
from isthmus.engines.local.api.limits import Bucket, KeyBudget, KeyLimits, Rate, Refused
from isthmus.engines.local.api.protocol import ApiError
from isthmus.errors import IsthmusError


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def key_file(tmp_path, text, mode=0o600):
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    path = key_file(tmp_path, "# people\nalice sk-alice\n\nbob sk-bob\nadmin sk-root\n")
    keys = Keyring.load(path, {"ISTHMUS_API_KEYS": "carol sk-carol, sk-nameless"})
    found = {key.name: key.level for key in keys.keys}
    assert found == {
        "alice": Level.USER,
        "bob": Level.USER,
        "admin": Level.ADMIN,
        "carol": Level.USER,
        "key2": Level.USER,
    }
    admitted = keys.admit("Bearer sk-carol", Level.USER)
    assert admitted is not None and admitted.name == "carol"
    assert "sk-" not in repr(keys.keys), "a key must not show in messages"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_key_file_that_others_may_read_is_refused(tmp_path, mode):
    with pytest.raises(IsthmusError, match="chmod 600"):
        Keyring.load(key_file(tmp_path, "alice sk-alice", mode), {})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("alice sk-a extra", "3 words"),
        ("alice sk-a\nalice sk-b", "same name: 'alice'"),
        ("alice sk-a\nbob sk-a", "same key$"),
        ("alice sk-ä", "printable ASCII"),
    ],
)
def test_wrong_key_files_say_what_is_wrong(tmp_path, text, reason):
    with pytest.raises(IsthmusError, match=reason):
        Keyring.load(key_file(tmp_path, text), {})
    with pytest.raises(IsthmusError, match="cannot be read"):
        Keyring.load(tmp_path / "absent", {})


@pytest.mark.parametrize(
    ("header", "level", "status"),
    [
        ("", Level.USER, 401),
        ("Bearer sk-x", Level.USER, 401),
        ("Bearer ", Level.USER, 401),
        ("Basic sk-alice", Level.USER, 401),
        ("sk-alice", Level.USER, 401),
        ("Bearer sk-alice", Level.ADMIN, 403),
        ("Bearer sk-alic", Level.ADMIN, 401),
        ("bearer sk-alice", Level.USER, None),
        ("Bearer sk-root", Level.USER, None),
        ("Bearer sk-root", Level.ADMIN, None),
        ("", Level.PUBLIC, None),
        ("Bearer wrong", Level.PUBLIC, None),
    ],
)
def test_each_level_admits_its_keys(header, level, status):
    keys = Keyring.load(None, {"ISTHMUS_API_KEYS": "alice sk-alice", "ISTHMUS_ADMIN_KEY": "sk-root"})
    if status is None:
        keys.admit(header, level)
        return
    with pytest.raises(ApiError) as refused:
        keys.admit(header, level)
    assert refused.value.status == status


def test_without_user_keys_the_server_stays_on_this_machine():
    none, some = Keyring([]), Keyring.load(None, {"ISTHMUS_API_KEYS": "alice sk-alice"})
    only_admin = Keyring.load(None, {"ISTHMUS_ADMIN_KEY": "sk-root"})
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        check_exposure(host, none, allow_open=False)
    for host in ("0.0.0.0", "::", "192.168.1.4", "some.name"):
        check_exposure(host, some, allow_open=False)
        check_exposure(host, none, allow_open=True)
        for keys in (none, only_admin):
            with pytest.raises(IsthmusError, match="--allow-open"):
                check_exposure(host, keys, allow_open=False)


@given(st.integers(1, 600), st.lists(st.tuples(st.floats(0, 90), st.integers(1, 50)), max_size=40))
def test_a_bucket_never_gives_more_than_a_minutes_worth_and_its_rate(per_minute, asked):
    clock = Clock()
    bucket, began, taken = Bucket(per_minute, clock), clock.now, 0
    for wait, amount in asked:
        clock.now += wait
        if amount <= per_minute and not bucket.seconds_until(amount):
            bucket.take(amount)
            taken += amount
        assert taken <= per_minute + (clock.now - began) * per_minute / 60 + 1e-6


@given(st.integers(1, 600), st.integers(1, 2000))
def test_after_the_time_that_a_bucket_names_it_gives(per_minute, overdraft):
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    bucket.take(overdraft)
    wait = bucket.seconds_until(1)
    clock.now += wait * 0.99
    assert wait == 0 or bucket.seconds_until(1) > 0
    clock.now += wait * 0.01 + 1e-6
    assert bucket.seconds_until(1) == 0


def test_a_budget_counts_requests_tokens_and_what_runs():
    clock = Clock()
    budget = KeyBudget(KeyLimits(requests_per_minute=2, tokens_per_minute=100, concurrent=2), clock)
    budget.enter()
    budget.take_prompts(60)
    budget.take_generated(50)
    assert budget.headers() == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m6s",
    }
    with pytest.raises(Refused) as refused:
        budget.take_prompts(10)
    assert (refused.value.status, refused.value.reason) == (429, "tokens_per_minute")
    assert refused.value.headers["Retry-After"] == "12", "20 tokens at 100 per minute"
    assert refused.value.body()["error"]["type"] == "rate_limit_error"
    budget.enter()
    for reason in ("concurrent_requests", "requests_per_minute"):
        with pytest.raises(Refused) as refused:
            budget.enter()
        assert refused.value.reason == reason
        budget.leave()
    clock.now += 120
    budget.enter()
    budget.take_prompts(1000)


def test_a_rate_is_what_happened_per_second_and_fades():
    clock = Clock()
    rate = Rate(clock)
    assert rate.seconds_for(5) == 1.0
    for _ in range(600):
        clock.now += 0.1
        rate.add(2)
    assert rate.per_second() == pytest.approx(20, rel=0.01)
    assert rate.seconds_for(100) == pytest.approx(5, rel=0.01)
    clock.now += 30
    assert rate.per_second() == pytest.approx(20 / 2.718, rel=0.1)

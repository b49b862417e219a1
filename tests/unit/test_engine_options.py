"""The options of the local engine: declared once, for the recipe, the command line of its process and its core."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.engines.local.__main__ import command_parser
from isthmus.engines.local.core.options import DEFAULT_OPTIONS, flags, read_flags
from isthmus.errors import IsthmusError
from isthmus.recipe.schema import EngineOptions, ServeSection

COUNT = st.integers(1, 10**6)
OPTIONS = st.builds(
    EngineOptions,
    block_size=COUNT,
    cache_tokens=st.none() | COUNT,
    chunk_tokens=COUNT,
    prefix_cache=st.booleans(),
    speculate=st.booleans(),
    batch_invariant=st.booleans(),
)


def parsed(*arguments: str) -> EngineOptions:
    return read_flags(command_parser().parse_args(["--bundle", "nowhere", *arguments]))


@given(OPTIONS)
def test_flags_say_what_the_options_are(options: EngineOptions):
    assert parsed(*flags(options)) == options


def test_without_flags_the_engine_has_the_recipe_s_defaults():
    assert flags(DEFAULT_OPTIONS) == [] and parsed() == DEFAULT_OPTIONS
    served = ServeSection().model_dump(include=set(EngineOptions.model_fields))
    assert served == DEFAULT_OPTIONS.model_dump() and len(served) == 7


def test_the_flags_are_those_that_were_documented():
    arguments = "--block-size 8 --cache-tokens 64 --chunk-tokens 32 --no-prefix-cache --speculate --batch-invariant"
    arguments += " --record-routes"
    assert parsed(*arguments.split()) == EngineOptions(
        block_size=8,
        cache_tokens=64,
        chunk_tokens=32,
        prefix_cache=False,
        speculate=True,
        batch_invariant=True,
        record_routes=True,
    )


@pytest.mark.parametrize("flag", ["--block-size", "--cache-tokens", "--chunk-tokens"])
def test_a_number_that_cannot_be_is_refused(flag: str):
    with pytest.raises(IsthmusError, match=f"{flag[2:].replace('-', '_')}: Input should be greater than 0"):
        parsed(flag, "0")

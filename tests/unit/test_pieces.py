"""A model that is in memory piece by piece computes what the whole model computes, and holds nothing in between."""

import contextlib
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.formats import format_names, get_format
from isthmus.formats.files.bundle import Bundle
from isthmus.formats.parts import pieces
from isthmus.formats.parts.assemble import EMBEDDING, HEAD
from isthmus.formats.parts.pieces import at_hand, streamed
from isthmus.model.model import Model
from isthmus.model.moe import Trace
from isthmus.parity.target import DTYPES, build_target, make_twin, stream_target, stream_twin
from tests.support.calibrated import calibrate
from tests.support.small import architecture
from tests.support.small_dense import dense_architecture, randomised

TOKENS = torch.randint(60, (3, 7), generator=torch.Generator().manual_seed(0))
ARCHITECTURES = {
    "deepseek": architecture(q_lora_rank=32, swiglu_limit=2.0, initializer_range=0.1, vocab_size=96, hidden_size=64),
    "qwen2": dense_architecture("qwen2"),
    "llama": dense_architecture("llama", tie_word_embeddings=True),
}


def stored(name: str, family: str) -> Bundle:
    found = ARCHITECTURES[family]
    state = randomised(found, 1).state_dict() if family != "deepseek" else Model(found).initialise(1).state_dict()
    chosen = get_format(name)
    calibration = calibrate(state, found, TOKENS) if chosen.needs_calibration else None
    return Bundle(None, name, found, chosen.export(state, found, calibration))  # pyright: ignore[reportArgumentType]


@torch.inference_mode()
def computed(model: Model) -> list[Tensor]:
    """Logits, what routers chose, and the states for multi-token prediction."""
    trace = Trace()
    hidden = model.hidden(TOKENS, trace=trace)
    found = [hidden, model.logits(hidden), *(one.weights for one in trace.routings)]
    if model.mtp_layer is not None:
        positions, mask = torch.arange(7).expand(3, 7), torch.full((7, 7), float("-inf")).triu(1)[None, None]
        found.append(model.mtp_next(hidden, TOKENS.roll(-1, dims=1), positions, mask))
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("family", list(ARCHITECTURES))
@pytest.mark.parametrize("name", format_names())
def test_pieces_compute_what_the_whole_computes(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = stored(name, family)
    whole = computed(bundle.build())
    assert same(computed(bundle.stream()), whole)
    monkeypatch.setattr(pieces, "WHOLE_EXPERTS", 0)
    assert same(computed(bundle.stream(lend_experts=False)), whole)
    one_by_one = computed(bundle.stream())
    for found, wanted in zip(one_by_one, whole, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["w8a8", "fp8", "bf16"])
def test_targets_and_healthy_twins_are_made_piece_by_piece_too(name: str, dtype: str) -> None:
    bundle = stored(name, "deepseek")
    assert same(
        computed(stream_target(bundle, "cpu", DTYPES[dtype])), computed(build_target(bundle, "cpu", DTYPES[dtype]))
    )
    twins = (stream_twin(bundle, DTYPES[dtype], seed=3), make_twin(bundle.build(), DTYPES[dtype], seed=3))
    assert same(*map(computed, twins))
    assert not same(computed(stream_twin(bundle, DTYPES[dtype], seed=4)), computed(twins[1]))


class Watched(Mapping[str, Tensor]):
    """Tensors that say when they are read."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors, self.read = tensors, []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.tensors[name]

    def rows(self, name: str, rows: range) -> Tensor:
        self.read += [f"{name}[{row}]" for row in rows]
        return self.tensors[name][rows.start : rows.stop]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def bytes_held(model: Model) -> int:
    held = (*model.parameters(), *model.buffers())
    return sum(one.nbytes for one in held if not one.is_meta) - model.model.rotary.cos.nbytes * 2


def test_only_what_is_used_is_read_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "WHOLE_EXPERTS", 0)
    bundle = stored("w8a8", "deepseek")
    watched = Watched(bundle.tensors)
    model = streamed(bundle.architecture, watched, get_format("w8a8").build)
    assert watched.read == ["model.norm.weight"] and bytes_held(model) == 64 * 4
    with at_hand(model, "model.layers.2.mlp"):
        assert {name.split(".")[2] for name in watched.read[1:]} == {"2"}
        assert not any(".experts.3." in name for name in watched.read)
        model.get_submodule("model.layers.2.mlp.experts").parts(3)  # pyright: ignore[reportCallIssue]
        assert any(".experts.3." in name for name in watched.read)
        held = bytes_held(model)
        with at_hand(model, "model.layers.2.self_attn"):
            assert bytes_held(model) == held > 64 * 4
        assert bytes_held(model) == held
    assert bytes_held(model) == 64 * 4
    watched.read.clear()
    with torch.inference_mode():
        model.model.embed_tokens(torch.tensor([[5, 9, 5]]))
    assert watched.read == [f"{EMBEDDING}[5]", f"{EMBEDDING}[9]"]


def test_a_large_head_is_multiplied_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = stored("bf16", "deepseek")
    watched = Watched(bundle.tensors)
    monkeypatch.setattr(pieces, "ROWS_BYTES", 4 * 64 * 20)
    model = streamed(bundle.architecture, watched, get_format("bf16").build)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = model.logits(hidden)
    torch.testing.assert_close(found, bundle.build().logits(hidden), atol=1e-5, rtol=1e-5)
    assert [name for name in watched.read if name.startswith(HEAD)] == [f"{HEAD}[{row}]" for row in range(96)]


def test_a_layer_that_fails_is_given_back() -> None:
    model = stored("bf16", "qwen2").stream()
    with contextlib.suppress(RuntimeError):
        model.model.layers[0](torch.zeros(1, 2, 3), None, None)
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").is_meta


def test_a_mode_that_watches_a_target_does_not_see_how_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "WHOLE_EXPERTS", 0)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            dtypes = {one.dtype for one in args if isinstance(one, Tensor)}
            assert torch.int8 not in dtypes, func
            return func(*args, **(kwargs or {}))

    model = stored("w8a8", "deepseek").stream()
    with torch.inference_mode(), Seen():
        model(TOKENS)

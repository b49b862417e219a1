"""A slice of a model is a model: its layers compute what they compute in the whole."""

import pytest
import torch

from isthmus.errors import IsthmusError
from isthmus.formats.parts.slices import cut_architecture, tensors_of_layers
from isthmus.model.model import Model
from isthmus.recipe.architecture import parse_architecture
from tests.support.small import architecture
from tests.support.small_dense import dense_architecture, randomised

TOKENS = torch.arange(12).view(2, 6)


def cut(model: Model, layers: range) -> Model:
    small = Model(cut_architecture(model.architecture, layers))
    state = model.state_dict()
    small.load_state_dict({new: state[old] for new, old in tensors_of_layers(state, layers).items()}, strict=True)
    return small


@pytest.mark.parametrize("first_dense", [0, 1, 2, 3])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_slices_one_after_the_other_are_the_whole_model(first_dense: int, at: int) -> None:
    model = Model(architecture(first_k_dense_replace=first_dense)).initialise(1)
    with torch.inference_mode():
        x = model.model.embed_tokens(TOKENS)
        rotation = model.model.rotary(torch.arange(6).expand(2, 6))
        for part in (range(at), range(at, 3)):
            for layer in cut(model, part).model.layers if part else ():
                x = layer(x, rotation, torch.full((6, 6), float("-inf")).triu(1)[None, None])
        assert torch.equal(x, model.hidden(TOKENS))


def test_the_layer_for_multi_token_prediction_can_stand_alone_or_with_others() -> None:
    model = Model(architecture()).initialise(1)
    positions, mask = torch.arange(6).expand(2, 6), torch.full((6, 6), float("-inf")).triu(1)[None, None]
    hidden = torch.randn(2, 6, 48)
    with torch.inference_mode():
        wanted = model.mtp_next(hidden, TOKENS, positions, mask)
        for layers in (range(3, 4), range(2, 4), range(4)):
            assert torch.equal(cut(model, layers).mtp_next(hidden, TOKENS, positions, mask), wanted)
    assert cut(model, range(2, 3)).mtp_layer is None


def test_a_dense_model_is_cut() -> None:
    model = randomised(dense_architecture("qwen2", num_hidden_layers=3), seed=1)
    state, names = model.state_dict(), tensors_of_layers(model.state_dict(), range(1, 2))
    assert names["model.layers.0.self_attn.q_proj.bias"] == "model.layers.1.self_attn.q_proj.bias"
    assert set(names) == set(Model(cut_architecture(model.architecture, range(1, 2))).state_dict())
    assert {old for old in state if ".layers." not in old} <= set(names)


def test_the_architecture_of_a_slice_is_a_valid_one() -> None:
    found = cut_architecture(architecture(first_k_dense_replace=2), range(1, 3))
    assert parse_architecture(found.model_dump(mode="json", by_alias=True)) == found
    assert (found.num_hidden_layers, found.first_k_dense_replace, found.num_nextn_predict_layers) == (2, 1, 0)


@pytest.mark.parametrize("layers", [range(0), range(3, 5), range(-1, 1), range(0, 4, 2)])
def test_layers_that_are_not_there_are_refused(layers: range) -> None:
    with pytest.raises(IsthmusError, match="4 that there are"):
        cut_architecture(architecture(), layers)

"""What an engine shows of the real model through a slice: rounding passes, faults do not, and the budget is no part."""

from pathlib import Path

import pytest
import torch

from isthmus.data.tokenizer import Tokenizer
from isthmus.formats import get_format
from isthmus.formats.files.bundle import Bundle, read_bundle, write_bundle
from isthmus.formats.files.sliced import read_slice, write_slice
from isthmus.formats.parts.slices import cut_architecture, tensors_of_layers
from isthmus.parity.engine import judge_distance
from isthmus.parity.target import DTYPES, make_twin
from isthmus.parity.tokens import GoldenSequence
from isthmus.parity.twins import Calibration, score_tokens
from isthmus.tools.slice import layer_inputs
from tests.support.real_model import trained_state

pytestmark = pytest.mark.real
TEXT = (
    "The isthmus is a narrow strip of land with sea on both sides, and it joins two larger pieces of land. Canals cut "
    "through some of them, because a ship that cannot cross has to go around a whole continent. In 1914 the first ship "
    "passed from one ocean to the other in ten hours. Before that the journey took weeks, and storms sank many a ship "
    "on the way. Engineers had tried to dig the canal for thirty years; fever and landslides stopped them twice."
)
DEPTH, LAYER = 3, 2


@pytest.fixture(scope="module")
def sliced(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[GoldenSequence]]:
    """The last of the first layers in W8A8, on what reaches it."""
    folder, tokenizer = tmp_path_factory.mktemp("slice"), Tokenizer.load(smollm2)
    architecture, whole = trained_state(smollm2)
    layers = range(DEPTH)
    state = {name: whole[kept] for name, kept in tensors_of_layers(whole, layers).items()}
    write_bundle(folder / "first", "w8a8", state, cut_architecture(architecture, layers), tokenizer)
    bundle, ids = read_bundle(folder / "first"), tokenizer.encode(TEXT)
    rows = [ids[start : start + 30] for start in range(0, 90, 30)]
    inputs = layer_inputs(bundle.build(), rows, {LAYER})[LAYER]
    write_slice(folder / "slice", bundle, range(LAYER, LAYER + 1), inputs, [len(row) for row in rows])
    asked = [GoldenSequence(row[:1], row[1:]) for row in read_slice(folder / "slice").sequences()]
    return read_bundle(folder / "slice"), asked


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_healthy_engines_pass_and_faults_of_a_layer_do_not(sliced, arithmetic) -> None:
    bundle, asked = sliced
    calibration = Calibration.of(bundle.build, arithmetic, asked)

    def outcome(tensors: dict[str, torch.Tensor], seed: int) -> str:
        engine = make_twin(get_format("w8a8").build(bundle.architecture, tensors), DTYPES[arithmetic], seed)
        return judge_distance(calibration.beyond(score_tokens(engine, asked).logprobs[0]))

    assert [outcome(dict(bundle.tensors), seed) for seed in (50, 51, 52)] == ["pass"] * 3
    name = "model.layers.0.mlp.down_proj.weight_scale"
    floored = bundle.tensors | {name: bundle.tensors[name].log2().floor().exp2()}
    assert outcome(floored, 60) == "fail"
    if arithmetic == "fp32":
        assert outcome(bundle.tensors | {name: 1.05 * bundle.tensors[name]}, 61) == "fail"

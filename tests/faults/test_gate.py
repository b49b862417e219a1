"""The gate refuses planted faults and names the right module, and lets healthy twins pass."""

from __future__ import annotations

import pytest

from tests.support.gate_models import random_model
from tests.support.gate_run import KINDS, Case, TargetDevice, ask, draw_plant, prepare, right_module

MODELS = {"w8a8": 27, "bf16": 6}
"""Two small models that can have all faults between them, and the formats in which they cross."""
DEVICE = TargetDevice(11)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    return [
        prepare(random_model(seed), name, tmp_path_factory.mktemp(name) / "bundle") for name, seed in MODELS.items()
    ]


@pytest.mark.parametrize(("kind", "fault"), [(kind, fault) for kind, faults in KINDS.items() for fault in faults])
def test_a_planted_fault_is_refused_and_its_module_named(cases, kind, fault):
    case, plant = next((case, plant) for case in cases if (plant := draw_plant(case, kind, fault, seed=1)) is not None)
    said = ask(case, kind, plant, DEVICE)
    assert said.refused, plant.detail
    if kind != "config" and not plant.several:
        assert right_module(plant, said), f"{plant.detail}: {said}"


@pytest.mark.parametrize("device", [TargetDevice(1), TargetDevice(2), TargetDevice(3, "fp32")], ids=str)
@pytest.mark.parametrize("which", range(len(MODELS)), ids=list(MODELS))
def test_a_healthy_twin_passes(cases, which, device):
    said = ask(cases[which], "healthy", None, device)
    assert not said.refused, said

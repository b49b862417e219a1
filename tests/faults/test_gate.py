"""The gate refuses planted faults and names the right module, and lets healthy twins pass."""

from __future__ import annotations

import pytest
from gate_models import random_model
from gate_run import KINDS, Case, TargetDevice, ask, draw_plant, prepare, right_module

MODELS = {"w8a8": 30, "bf16": 6}
DEVICE = TargetDevice(11)


@pytest.fixture(scope="module", params=MODELS, ids=str)
def case(request, tmp_path_factory) -> Case:
    name = request.param
    return prepare(random_model(MODELS[name]), name, tmp_path_factory.mktemp(name) / "bundle")


@pytest.mark.parametrize(("kind", "fault"), [(kind, fault) for kind, faults in KINDS.items() for fault in faults])
def test_a_planted_fault_is_refused_and_its_module_named(case, kind, fault):
    plant = draw_plant(case, kind, fault, seed=1)
    if plant is None:
        pytest.skip("this model cannot have it")
    said = ask(case, kind, plant, DEVICE)
    assert said.refused, plant.detail
    if kind != "config" and not plant.several:
        assert right_module(plant, said), f"{plant.detail}: {said}"


@pytest.mark.parametrize("device", [TargetDevice(1), TargetDevice(2), TargetDevice(3, "fp32")])
def test_a_healthy_twin_passes(case, device):
    said = ask(case, "healthy", None, device)
    assert not said.refused, said

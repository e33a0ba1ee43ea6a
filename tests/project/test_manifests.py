"""The files that start a cluster, against the schemas and linters of those who read them."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.node_provider import IN_CLUSTER_CA_CERT_PATH, IN_CLUSTER_TOKEN_PATH
from referencing import Registry, Resource
from typer.testing import CliRunner

from actors.private import private_folder
from launch.cli import app

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
KUBERAY = ROOT / "launch" / "kuberay"
KUBERNETES = "1.37.0"
SCRIPTS = [ROOT / "launch/slurm/grpo_ray.sbatch", ROOT / "launch/plain/start_ray.sh", ROOT / "launch/install.sh"]


def documents() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.name}:{document['kind']}", document)
        for path in sorted(KUBERAY.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]


@pytest.fixture(scope="module")
def registry() -> Registry[Any]:
    folder = files("kubernetes_validate").joinpath(
        "kubernetes-json-schema", f"v{'.'.join(KUBERNETES.split('.'))}-local-strict"
    )
    return Registry().with_resource(
        "/api/_definitions.json", Resource.from_contents(json.loads(folder.joinpath("_definitions.json").read_text()))
    )


def strict(node: Any) -> Any:
    """As the API server's strict field validation: a field that the schema does not know is an error."""
    if isinstance(node, list):
        return [strict(n) for n in node]
    if not isinstance(node, dict):
        return node
    if "x-kubernetes-definition" in node:
        return {"$ref": f"/api/_definitions.json#/$defs/{node['x-kubernetes-definition']}"}
    out = {key: strict(value) for key, value in node.items()}
    return out | {"additionalProperties": False} if isinstance(node.get("properties"), dict) else out


def validate(document: dict[str, Any], registry: Registry[Any]) -> None:
    if document["apiVersion"] == "ray.io/v1":
        schemas = yaml.safe_load((Path(__file__).parents[1] / "data" / "kuberay_crds.yaml").read_text())
        schema = strict(schemas[document["kind"]])
        jsonschema.Draft202012Validator(schema, registry=registry).validate(document["spec"])
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize(("name", "document"), documents(), ids=[name for name, _ in documents()])
def test_every_manifest_is_what_its_schema_says(name: str, document: dict[str, Any], registry: Registry[Any]) -> None:
    validate(document, registry)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "enableInTreeAutoscalling"), True),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "image"), 3),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMount"), []),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "1"),
    ],
)
def test_the_schemas_notice_a_mistake(path: tuple[str | int, ...], value: object, registry: Registry[Any]) -> None:
    document = copy.deepcopy(dict(documents())["raycluster.yaml:RayCluster"])
    node: Any = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(document, registry)


def clusters() -> list[dict[str, Any]]:
    found = [d for _, d in documents() if d["apiVersion"] == "ray.io/v1"]
    return [d["spec"].get("rayClusterSpec", d["spec"]) for d in found]


@pytest.mark.parametrize("spec", clusters())
def test_every_node_is_protected_unprivileged_and_writes_where_all_see_it(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == ray.__version__
    templates = [spec["headGroupSpec"]["template"], *(g["template"] for g in spec.get("workerGroupSpecs", []))]
    for template in templates:
        pod = template["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        env = {e["name"]: e["value"] for e in container["env"]}
        assert env["GRPO_RAY_HOME"] in [m["mountPath"] for m in container["volumeMounts"]]
        mounted = {m["name"] for m in container["volumeMounts"]}
        assert mounted == {v["name"] for v in pod["volumes"]} - {"kubernetes-api"}
        # By digest, or never another than what is on the node.
        by_digest = re.fullmatch(r"grpo-ray@sha256:[0-9a-f]{64}", container["image"]) is not None
        assert by_digest != (container["imagePullPolicy"] == "Never")
    claims = {d["metadata"]["name"] for _, d in documents() if d["kind"] == "PersistentVolumeClaim"}
    named = {
        v["persistentVolumeClaim"]["claimName"]
        for t in templates
        for v in t["spec"]["volumes"]
        if "persistentVolumeClaim" in v
    }
    assert named <= claims


@pytest.mark.parametrize("spec", clusters())
def test_no_container_of_ours_gets_a_token_for_kubernetes(spec: dict[str, Any]) -> None:
    for group in [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]:
        pod = group["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        secrets = {v["name"] for v in pod["volumes"] if "projected" in v or "secret" in v}
        assert not secrets & {m["name"] for c in pod["containers"] for m in c["volumeMounts"]}
    if spec.get("enableInTreeAutoscaling"):
        (mount,) = spec["autoscalerOptions"]["volumeMounts"]
        assert mount["mountPath"] == os.path.dirname(IN_CLUSTER_TOKEN_PATH) == os.path.dirname(IN_CLUSTER_CA_CERT_PATH)
        (volume,) = [v for v in spec["headGroupSpec"]["template"]["spec"]["volumes"] if v["name"] == mount["name"]]
        sources = {kind: source for each in volume["projected"]["sources"] for kind, source in each.items()}
        assert sources["serviceAccountToken"]["path"] == os.path.basename(IN_CLUSTER_TOKEN_PATH)
        assert sources["configMap"]["items"][0]["path"] == os.path.basename(IN_CLUSTER_CA_CERT_PATH)


@pytest.mark.parametrize("file", ["raycluster.yaml", "rayjob.yaml"])
def test_pods_of_others_reach_no_port_but_what_an_operator_a_submitter_and_prometheus_need(file: str) -> None:
    found = dict(documents())
    policy = found[f"{file}:NetworkPolicy"]["spec"]
    cluster = next(d for name, d in found.items() if name in (f"{file}:RayCluster", f"{file}:RayJob"))
    spec = cluster["spec"].get("rayClusterSpec", cluster["spec"])
    ours = policy["podSelector"]["matchLabels"]
    for group in [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]:
        labels = group["template"].get("metadata", {}).get("labels", {})
        # KubeRay gives the first to every pod of a cluster.
        assert ours.items() <= {"ray.io/cluster": cluster["metadata"]["name"], **labels}.items()
    assert "Ingress" in policy["policyTypes"]
    for rule in policy["ingress"]:
        if rule["from"] == [{"podSelector": {"matchLabels": ours}}]:
            continue
        assert all(selector for selector in rule["from"])
        assert {p["port"] for p in rule["ports"]} <= {8265, 52365, 8080}
    blocks = [to["ipBlock"] for rule in policy.get("egress", []) for to in rule["to"] if "ipBlock" in to]
    assert all(b["cidr"] == "169.254.20.10/32" or b["except"] == ["169.254.0.0/16"] for b in blocks)


def test_rays_own_autoscaler_reads_from_the_cluster_what_it_may_bring() -> None:
    document = copy.deepcopy(dict(documents())["raycluster.yaml:RayCluster"])
    document["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(document)
    groups = config["available_node_types"]
    head, gpu, cpu = groups["headgroup"], groups["gpu"], groups["cpu"]
    assert head["resources"]["CPU"] == 0
    assert (gpu["min_workers"], gpu["max_workers"], gpu["resources"]["GPU"], gpu["resources"]["CPU"]) == (1, 8, 8, 128)
    assert (cpu["min_workers"], cpu["max_workers"], cpu["resources"]["CPU"]) == (0, 8, 8)
    assert config["idle_timeout_minutes"] == 5


@pytest.mark.parametrize("spec", clusters())
def test_a_pod_with_gpus_has_those_of_a_whole_node(spec: dict[str, Any]) -> None:
    """NCCL takes pods for nodes: with one GPU a pod nothing goes over NVLink."""
    for group in spec.get("workerGroupSpecs", []):
        (container,) = group["template"]["spec"]["containers"]
        asked, most = (container["resources"][kind].get("nvidia.com/gpu") for kind in ("requests", "limits"))
        assert asked == most
        assert asked in (None, "8")


def test_the_job_runs_a_command_that_exists() -> None:
    entrypoint = dict(documents())["rayjob.yaml:RayJob"]["spec"]["entrypoint"]
    command = re.search(r"grpo-ray (\w+)", entrypoint)
    assert command
    assert CliRunner().invoke(app, [command[1], "--help"]).exit_code == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shell_scripts_pass_shellcheck(script: Path) -> None:
    result = subprocess.run(
        [BIN / "shellcheck", "--severity=warning", "--shell=bash", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def shims(folder: Path, **scripts: str) -> Path:
    folder.mkdir()
    for name, text in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return folder


PYTHON = f'[ "$3" != launch.batch ] || {{ shift 3; exec grpo-ray "$@"; }}; exec {sys.executable} "$@"'
SRUN = """
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""
SCONTROL = """
case "$*" in
    "show hostnames"*) printf 'n1\\nn2\\nn3\\n';;
    "show node"*) echo "NodeName=$4 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=$4";;
    *) echo "scontrol $*" >>"$TOLD";;
esac
"""
RAY = """
echo "ray $* token=$(stat -c %a:%s "$RAY_AUTH_TOKEN_PATH") mode=$RAY_AUTH_MODE" >>"$TOLD"
case $1 in health-check) [ "$(grep -c health-check "$TOLD")" -ge 2 ];; start) exec sleep 60;; esac
"""
GRPO_RAY = """
trap 'echo checkpoint >>"$TOLD"; exit 143' TERM
echo "grpo-ray $* at $RAY_ADDRESS" >>"$TOLD"
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize(
    ("number", "state", "requeue", "asked"),
    [
        (signal.SIGTERM, "RUNNING", "yes", ["scontrol requeue 7"]),
        (signal.SIGTERM, "RUNNING", "no", []),
        (signal.SIGUSR1, "RUNNING", "yes", []),
        # Slurm ends the job.
        (signal.SIGTERM, "COMPLETING", "yes", []),
    ],
)
def test_a_slurm_job_starts_ray_on_all_nodes_and_ends_its_run_gracefully_before_its_time_is_up(
    tmp_path: Path, number: int, state: str, requeue: str, asked: list[str]
) -> None:
    """Slurm itself and Ray are replaced by scripts that write down what they are asked to do; end_to_end/test_slurm.py has the
    real ones."""
    told = tmp_path / "told"
    told.touch()
    squeue = f"echo {state}"
    path = shims(
        tmp_path / "bin", srun=SRUN, ray=RAY, grpo_ray=GRPO_RAY, scontrol=SCONTROL, python=PYTHON, squeue=squeue
    )
    (temporary := tmp_path / "t").mkdir()
    private = private_folder()
    env = {"PATH": f"{path}:/usr/bin:/bin", "TOLD": str(told), "HOME": str(tmp_path), "SLURM_SUBMIT_DIR": str(tmp_path)}
    env |= {"TMPDIR": str(temporary), "GRPO_RAY_REQUEUE": requeue, "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}
    env |= {"SLURM_JOB_NODELIST": "n[1-3]", "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen([SCRIPTS[0], "train", "smoke", "name=a b"], env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not all(word in told.read_text() for word in ("grpo-ray", "--address=10.0.0.1:6379 --disable")):
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(number)
    _, errors = job.communicate(timeout=300)
    lines = told.read_text().splitlines()
    assert job.returncode == 143, errors
    assert [line for line in lines if line.startswith("scontrol")] == asked
    assert state != "RUNNING" or lines.count("checkpoint") == 1
    assert "grpo-ray train smoke name=a b at 10.0.0.1:6379" in lines
    starts = [line for line in lines if line.startswith("ray start")]
    assert [("--head" in s, "--address=10.0.0.1:6379" in s) for s in starts] == [(True, False), (False, True)]
    assert all("token=600:64 mode=token" in line for line in lines if line.startswith("ray "))
    assert all(f"--temp-dir={private}/ray" in start for start in starts)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert [p for p in (*tmp_path.iterdir(), *temporary.iterdir()) if "token" in p.name or "grpo-ray." in p.name] == []


def test_a_head_by_hand_makes_a_private_token_and_a_worker_without_one_is_told(tmp_path: Path) -> None:
    told = tmp_path / "told"
    path = shims(tmp_path / "bin", ray='echo "$RAY_AUTH_MODE $*" >>"$TOLD"', python=PYTHON)
    script = tmp_path / "launch" / "plain" / "start_ray.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPTS[1], script)
    env = {"PATH": f"{path}:/usr/bin:/bin", "TOLD": str(told), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def start(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, *args], env=env, capture_output=True, text=True, check=False, timeout=300)

    assert "the token is missing: copy it" in start("worker", "n1:6379").stderr
    assert start("worker").returncode == 1
    assert start("head", "--num-cpus=3").returncode == 0
    token = tmp_path / ".ray" / "auth_token"
    first = token.read_text()
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert oct(os.stat(token).st_mode)[-3:] == "600"
    assert start("head").returncode == 0
    assert token.read_text() == first
    assert start("worker", "n1:6379").returncode == 0
    lines = told.read_text().splitlines()
    place = f"--temp-dir={private_folder()}/ray"
    assert lines[0] == f"token start --head --dashboard-host=127.0.0.1 {place} --disable-usage-stats --num-cpus=3"
    assert lines[-1] == f"token start --address=n1:6379 {place} --disable-usage-stats"

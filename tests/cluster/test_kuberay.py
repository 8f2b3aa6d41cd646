"""Pins that Kubernetes takes the manifests: schemas of KubeRay, Kueue and Kubernetes, and what those do not see.

The second part follows the checks of KubeRay's own controller (`ValidateRayClusterSpec`, `ValidateRayJobSpec`).
"""

from __future__ import annotations

import copy
import gzip
import json
import re
import shlex
from decimal import Decimal

import jsonschema
import kubernetes_validate
import pytest
import ray
from clusters import KUBERAY, SCHEMAS, documents, kustomized, strict
from commandlines import parsed
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler._private.kuberay.utils import parse_quantity

from ddil_ray.config import load_config

KUBERNETES = "1.34"
LAYERS = ["base", "job", "kueue"]


@pytest.fixture(scope="module")
def check():
    """Holds a document against the schema of its kind."""
    job = strict(json.loads(gzip.decompress((SCHEMAS / "rayjob.json.gz").read_bytes()))["schema"])
    cluster = copy.deepcopy(job)
    cluster["properties"]["spec"] = job["properties"]["spec"]["properties"]["rayClusterSpec"]
    schemas = {"RayJob": job, "RayCluster": cluster, **strict(json.loads((SCHEMAS / "kueue.json").read_text()))}
    kinds = {kind: jsonschema.Draft202012Validator(schema) for kind, schema in schemas.items()}

    def held(document):
        if document["kind"] in kinds:
            kinds[document["kind"]].validate(document)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)

    return held


def cluster_spec(name):
    """The spec of the Ray cluster of a layer, as it is applied."""
    if name == "base":
        return documents(KUBERAY / "base" / "raycluster.yaml")[0]["spec"]
    return kustomized(name)["RayJob"]["spec"]["rayClusterSpec"]


def groups(spec):
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pods(spec):
    return [group["template"] for group in groups(spec)]


SOURCES = [
    (path.relative_to(KUBERAY), i)
    for path in sorted(KUBERAY.rglob("*.yaml"))
    if path.name not in {"kustomization.yaml", "run.yaml"}
    for i in range(len(documents(path)))
]


@pytest.mark.parametrize(("path", "i"), SOURCES, ids=lambda value: str(value))
def test_every_document_has_its_schema(check, path, i):
    document = documents(KUBERAY / path)[i]
    if document["kind"] == "RayJob":  # its kustomization fills in the cluster
        document["spec"]["rayClusterSpec"] = cluster_spec("base")
    check(document)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_applied_has_its_schema(check, name):
    applied = kustomized(name)
    assert set(applied) == {"ConfigMap", "NetworkPolicy", "RayCluster" if name == "base" else "RayJob"}
    for document in applied.values():
        check(document)


BROKEN = [
    (("spec", "rayClusterSpec", "workerGroupSpecs", 1, "maxReplica"), 3),
    (("spec", "rayClusterSpec", "workerGroupSpecs", 1, "replicas"), "many"),
    (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "securityContext", "runAsNonroot"), True),
    (("spec", "rayClusterSpec", "autoscalerOptions", "version"), "v3"),
    (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
    (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limit"), {}),
    (("spec", "submitterPodTemplate", "spec", "containers", 0, "volumeMounts", 0, "path"), "/x"),
    (("spec", "shutdownAfterJobFinishes"), "yes"),
]


@pytest.mark.parametrize(("where", "value"), BROKEN, ids=lambda value: str(value).rpartition(", ")[2])
def test_the_schema_sees_mistakes(check, where, value):
    (document,) = documents(KUBERAY / "job" / "rayjob.yaml")
    document["spec"]["rayClusterSpec"] = copy.deepcopy(cluster_spec("base"))
    *folders, last = where
    inner = document
    for folder in folders:
        inner = inner[folder]
    inner[last] = value
    with pytest.raises(jsonschema.ValidationError):
        check(document)


@pytest.mark.parametrize("name", LAYERS)
def test_groups_have_sizes_that_kuberay_takes(name):
    spec = cluster_spec(name)
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert not group.get("suspend")
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", LAYERS)
def test_a_node_has_its_resources_from_one_place_and_its_labels_from_the_group(name):
    for group in groups(cluster_spec(name)):
        parameters = set(group["rayStartParams"])
        assert "labels" not in parameters
        assert not (group.get("resources") and parameters & {"num-cpus", "num-gpus", "memory", "resources"})


@pytest.mark.parametrize("name", LAYERS)
def test_pods_ask_for_what_they_may_use_at_most(name):
    for pod in pods(cluster_spec(name)):
        for container in pod["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert set(container["resources"]["limits"]) >= {"cpu", "memory"}


def test_the_autoscaler_is_the_one_that_knows_labels_and_pods_are_not_used_twice():
    spec = cluster_spec("base")
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    for pod in pods(spec):
        assert pod["spec"].get("restartPolicy", "Never") == "Never"
        names = [variable["name"] for variable in pod["spec"]["containers"][0].get("env", [])]
        assert "RAY_enable_autoscaler_v2" not in names


def test_rays_autoscaler_reads_pools_of_the_same_size_and_labels():
    """By its own code, as it runs beside the head."""
    cluster = {"metadata": {"name": "ddil-ray", "namespace": "default"}, "spec": cluster_spec("base")}
    found = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert found["headgroup"]["resources"]["CPU"] == 0
    for group in cluster["spec"]["workerGroupSpecs"]:
        kind = found[group["groupName"]]
        assert (kind["min_workers"], kind["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
        assert kind["labels"] == group["labels"]
        assert kind["resources"]["GPU"] == int(
            group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        )


@pytest.mark.parametrize("name", LAYERS)
def test_nobody_is_let_in_without_the_token_and_the_versions_are_those_installed(name):
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token", "secretName": "ddil-ray-token"}  # pragma: allowlist secret
    assert spec["rayVersion"] == ray.__version__
    assert tuple(map(int, spec["rayVersion"].split(".")[:2])) >= (2, 52)


@pytest.mark.parametrize("name", LAYERS)
def test_the_head_has_no_work(name):
    head = cluster_spec(name)["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


def all_pods(name):
    found = pods(cluster_spec(name))
    return found if name == "base" else [*found, kustomized(name)["RayJob"]["spec"]["submitterPodTemplate"]]


@pytest.mark.parametrize("name", LAYERS)
def test_every_pod_keeps_the_restricted_standard_and_can_write_where_ray_must(name):
    for pod in all_pods(name):
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        assert all({"emptyDir", "configMap"} & set(volume) for volume in pod["spec"]["volumes"])
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/home/ray", "/tmp"}
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in pod["spec"]["volumes"]}
    for pod in all_pods(name)[1:]:  # the autoscaler beside the head asks Kubernetes for pods
        assert pod["spec"]["automountServiceAccountToken"] is False
    if name != "kueue":
        security = cluster_spec(name)["autoscalerOptions"]["securityContext"]
        assert security["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("name", LAYERS)
def test_all_pods_and_no_others_are_those_of_the_network_policy(name):
    (policy,) = documents(KUBERAY / "base" / "networkpolicy.yaml")
    labels = policy["spec"]["podSelector"]["matchLabels"]
    for pod in all_pods(name):
        assert pod["metadata"]["labels"].items() >= labels.items()


def test_the_network_policy_lets_pods_reach_each_other_and_little_else():
    (policy,) = documents(KUBERAY / "base" / "networkpolicy.yaml")
    spec = policy["spec"]
    ours = [{"podSelector": spec["podSelector"]}]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert {"from": ours} in spec["ingress"]
    assert {"to": ours} in spec["egress"]
    assert all(rule.get("ports") for rule in [*spec["ingress"], *spec["egress"]] if ours not in rule.values())
    outside = [rule for rule in spec["egress"] if "ipBlock" in rule["to"][0]]
    assert 80 not in {port["port"] for rule in outside for port in rule["ports"]}  # where metadata services are


def test_whoever_asks_or_scrapes_the_head_finds_the_port():
    ports = {p["name"]: p["containerPort"] for p in pods(cluster_spec("base"))[0]["spec"]["containers"][0]["ports"]}
    assert ports == {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}


@pytest.mark.parametrize("name", ["job", "kueue"])
def test_a_job_is_one_that_kuberay_takes(name):
    job = kustomized(name)["RayJob"]
    spec = job["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    assert len(job["metadata"]["name"]) <= 47
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"]  # else it may not be suspended, nor does its cluster go
    assert spec["ttlSecondsAfterFinished"] >= 0
    assert spec["backoffLimit"] == 0
    assert "clusterSelector" not in spec


@pytest.mark.parametrize("name", LAYERS)
def test_all_pods_have_one_image_with_a_version(name):
    kind = "RayCluster" if name == "base" else "RayJob"
    applied = kustomized(name)[kind]["spec"]
    spec = applied if name == "base" else applied["rayClusterSpec"]
    found = {container["image"] for pod in pods(spec) for container in pod["spec"]["containers"]}
    if name != "base":
        found |= {container["image"] for container in applied["submitterPodTemplate"]["spec"]["containers"]}
    (image,) = found
    assert re.fullmatch(r"ddil-ray:\d+\.\d+\.\d+", image)


def test_the_run_of_the_manifests_is_the_one_in_the_config_map_and_loads():
    text = kustomized("job")["ConfigMap"]["data"]["run.yaml"]
    assert text == (KUBERAY / "base" / "run.yaml").read_text()
    config = load_config(str(KUBERAY / "base" / "run.yaml"))
    assert config.tracking.required  # settings of MLflow and storage stand there
    assert config.output.startswith("s3://")
    (volume,) = [v for v in pods(cluster_spec("base"))[0]["spec"]["volumes"] if v["name"] == "run"]
    assert volume["configMap"]["name"] == kustomized("job")["ConfigMap"]["metadata"]["name"]


def test_a_pod_has_the_time_that_a_stopped_job_has_for_its_checkpoint():
    head = pods(cluster_spec("base"))[0]["spec"]
    (wait,) = [v["value"] for v in head["containers"][0]["env"] if v["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert head["terminationGracePeriodSeconds"] > int(wait)


@pytest.mark.parametrize("name", ["job", "kueue"])
def test_a_job_that_is_started_again_goes_on(name):
    """As Kueue starts one that it preempted: with the same entrypoint, in a run folder with checkpoints."""
    entrypoint = kustomized(name)["RayJob"]["spec"]["entrypoint"]
    assert parsed(shlex.split(entrypoint)).params["resume_if_begun"]


def test_kueue_gets_a_job_of_fixed_size_that_waits():
    job = kustomized("kueue")["RayJob"]
    spec = job["spec"]["rayClusterSpec"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ddil-ray"
    assert job["spec"]["suspend"]
    assert spec["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in spec
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_the_quotas_of_the_queue_hold_the_job():
    """By Kueue's rule: a pod takes the first flavor whose labels its node selector allows and whose quota is enough."""
    queues = documents(KUBERAY / "kueue" / "queues.yaml")
    labels = {
        d["metadata"]["name"]: d.get("spec", {}).get("nodeLabels", {}) for d in queues if d["kind"] == "ResourceFlavor"
    }
    (queue,) = [d for d in queues if d["kind"] == "ClusterQueue"]
    (group,) = queue["spec"]["resourceGroups"]
    (local,) = [d for d in queues if d["kind"] == "LocalQueue"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    free = {
        flavor["name"]: {r["name"]: parse_quantity(r["nominalQuota"]) for r in flavor["resources"]}
        for flavor in group["flavors"]
    }
    assert all(set(quota) == set(group["coveredResources"]) for quota in free.values())
    job = kustomized("kueue")["RayJob"]["spec"]
    spec = job["rayClusterSpec"]
    sets = [(spec["headGroupSpec"]["template"], 1), (job["submitterPodTemplate"], 1)]
    sets += [(group["template"], group["replicas"]) for group in spec["workerGroupSpecs"]]
    taken = []
    for pod, count in sets:
        selector, asked = pod["spec"].get("nodeSelector", {}), _requests(pod, count)
        for flavor, quota in free.items():
            allowed = all(selector.get(key, value) == value for key, value in labels[flavor].items())
            if allowed and all(quota[resource] >= amount for resource, amount in asked.items()):
                free[flavor] = {resource: left - asked.get(resource, 0) for resource, left in quota.items()}
                taken.append(flavor)
                break
        else:
            pytest.fail(f"no quota holds {count} of {asked}")
    assert taken == ["ddil-ray-cpu", "ddil-ray-cpu", "ddil-ray-h100", "ddil-ray-l4"]


def _requests(pod, count):
    total: dict[str, Decimal] = {}
    for container in pod["spec"]["containers"]:
        for resource, amount in container["resources"]["requests"].items():
            total[resource] = total.get(resource, Decimal(0)) + count * parse_quantity(amount)
    return total

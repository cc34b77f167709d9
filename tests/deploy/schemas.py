"""Manifests held against the published schemas; where those come from is in schemas/README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

KUBERNETES = "1.32"
_HYPERPOD = json.loads((Path(__file__).parent / "schemas" / "hyperpod_pytorch_job_spec.json").read_text())


def check(document: Mapping[str, Any]) -> None:
    """Raises where a document is not of its kind, in whole and in the pods within it."""
    kind = document["kind"]
    if kind == "JobSet":
        _check_job_set(document)
    elif kind == "HyperPodPyTorchJob":
        jsonschema.validate(document["spec"], _HYPERPOD)
        for replicas in document["spec"]["replicaSpecs"]:
            metadata = {"name": "pod", **replicas["template"]["metadata"]}
            _strict({"apiVersion": "v1", "kind": "Pod", **replicas["template"], "metadata": metadata})
    else:
        _strict(document)


def _check_job_set(document: Mapping[str, Any]) -> None:
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    model = JobsetV1alpha2JobSet.from_dict(dict(document))
    assert model is not None
    # The models drop what they do not know, so that what comes out shows what is not of the kind.
    assert model.to_dict() == document
    for replicated in document["spec"]["replicatedJobs"]:
        metadata = {"name": "job", **replicated["template"].get("metadata", {})}
        _strict({"apiVersion": "batch/v1", "kind": "Job", **replicated["template"], "metadata": metadata})


def _strict(document: Mapping[str, Any]) -> None:
    kubernetes_validate.validate(dict(document), KUBERNETES, strict=True)

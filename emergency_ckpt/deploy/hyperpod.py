"""HyperPod: a JobSet on its healthy nodes, or the kind of its own training operator.

That kind is made for PyTorch, and nothing here was tried on a cluster of HyperPod: the text says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from emergency_ckpt.deploy.jobset import header, pod_labels, render_jobset, supporting
from emergency_ckpt.deploy.manifest import Document, text_of
from emergency_ckpt.deploy.plan import Plan
from emergency_ckpt.deploy.pods import pod_spec

_RESTARTS_BEFORE_ALL = 1


def render_hyperpod(plan: Plan, *, new_token: bool = False) -> str:
    """The documents for `kubectl apply`; with `new_token`, a Secret with a random token among them."""
    if plan.values.hyperpod_kind == "JobSet":
        return render_jobset(plan, new_token=new_token)
    return text_of([*_documents(plan, new_token)])


def _documents(plan: Plan, new_token: bool) -> Iterator[Document]:
    (paragraphs, account), *others = supporting(plan, new_token)
    yield [*header(plan), *_about_operator(), "", *paragraphs], account
    yield from others
    yield ["Its operator resumes the job; there is no list of exit codes, so every failure counts."], _job(plan)


def _about_operator() -> Iterator[str]:
    yield (
        "- The operator behind HyperPodPyTorchJob watches PyTorch's launcher (hyperpodrun, port 8080). "
        "Whether it resumes a container without that, and which variables tell jax its coordinator and "
        "process id, is not known: the program has to find them. deploy_hyperpod_kind=JobSet depends on none "
        "of this."
    )
    yield (
        "- There is no NetworkPolicy here: the operator has to reach the pods, and from where is not known. "
        "Agents serve holders of the token."
    )


def _job(plan: Plan) -> dict[str, Any]:
    values = plan.values
    return {
        "apiVersion": "sagemaker.amazonaws.com/v1",
        "kind": "HyperPodPyTorchJob",
        "metadata": {"name": values.workload, "namespace": values.namespace},
        "spec": {
            "nprocPerNode": "1",
            "runPolicy": {
                "cleanPodPolicy": "None",
                "jobMaxRetryCount": values.max_restarts,
                # When a process is lost the others end as well: restart all, not one.
                "restartPolicy": {
                    "numRestartBeforeFullJobRestart": _RESTARTS_BEFORE_ALL,
                    "evalPeriodSeconds": 3600,
                    "maxFullJobRestarts": values.max_restarts,
                },
            },
            "replicaSpecs": [
                {
                    "name": "pod",
                    "replicas": plan.hosts_per_slice * values.slices,
                    "template": {"metadata": {"labels": pod_labels(plan)}, "spec": pod_spec(plan)},
                }
            ],
        },
    }

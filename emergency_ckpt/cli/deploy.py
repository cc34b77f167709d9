"""`emergency-ckpt deploy`: scripts and manifests that bring a job onto a cluster, from one file and words."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from emergency_ckpt.deploy.plan import TARGETS, Plan, load_plan
from emergency_ckpt.deploy.values import PREFIX, Deployment
from emergency_ckpt.errors import ConfigError

_USAGE = "emergency-ckpt deploy TARGET [--config FILE] [--output FILE] [key=value ...]"
_DESCRIPTION = f"""\
Renders what brings a job onto a cluster, to be read and then run. Nothing is run here, and no cluster is asked.

  xpk       a script around XPK: cluster-create, create, list, delete
  gcluster  a script around Cluster Toolkit, XPK's successor: submit, list, cancel (untried)
  k8s       a JobSet and what it needs, for GKE or EKS
  hyperpod  the same for SageMaker HyperPod, or its training operator's kind (untried)

The flags of the job and the values of the deployment come from one file and key=value words; the latter begin
with {PREFIX}. Begin with a preset: base_config: gke_multislice.yml, spot_s3.yml or hyperpod.yml. --doc explains
all values."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this subcommand; those after the target are parsed in `run`, in any order."""
    parser.usage = _USAGE
    parser.description = _DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="see `deploy TARGET --help`")


def run(args: argparse.Namespace) -> int:
    """Prints or writes what was asked for; returns the exit status."""
    options = _options().parse_intermixed_args(args.rest)
    if options.doc:
        print(_documentation(), end="")
        return 0
    if options.new_token and args.target not in ("k8s", "hyperpod"):
        raise ConfigError(f"--new-token: {args.target} has no place for a Secret; it is for k8s and hyperpod")
    text = _render(load_plan(args.target, options.config, options.words), options.new_token)
    if options.output is None:
        print(text, end="")
    else:
        _write(options.output, text, options.new_token)
        print(f"wrote {options.output}; read it before you run it", file=sys.stderr)
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=_USAGE, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="flags, and values (deploy_…)")
    parser.add_argument("--config", metavar="FILE", help="YAML file with both (default: the words alone)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there, in place of standard output")
    parser.add_argument(
        "--new-token",
        action="store_true",
        help="k8s and hyperpod: also a Secret with a random token, which the file then contains",
    )
    parser.add_argument("--doc", action="store_true", help="explain all values, and render nothing")
    return parser


def _write(path: Path, text: str, is_secret: bool) -> None:
    """Scripts can be run, and what has a token in it is for its owner alone, from the first byte on."""
    mode = 0o600 if is_secret else 0o755 if text.startswith("#!") else 0o644
    try:
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from error


def _render(plan: Plan, new_token: bool) -> str:
    # Templates and YAML are not needed for --help.
    if plan.target == "k8s":
        from emergency_ckpt.deploy.jobset import render_jobset

        return render_jobset(plan, new_token=new_token)
    if plan.target == "hyperpod":
        from emergency_ckpt.deploy.hyperpod import render_hyperpod

        return render_hyperpod(plan, new_token=new_token)
    from emergency_ckpt.deploy.xpk import render_gcluster, render_xpk

    return render_xpk(plan) if plan.target == "xpk" else render_gcluster(plan)


def _documentation() -> str:
    lines: list[str] = []
    for name, field in Deployment.model_fields.items():
        default = (
            "required" if field.is_required() else f"default: {field.get_default(call_default_factory=True)}"
        )
        lines.append(f"{PREFIX}{name} ({default})\n    {field.description}\n")
    return "\n".join(lines)

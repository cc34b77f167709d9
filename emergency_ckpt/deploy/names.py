"""Values as the tools take them: each type has one rule, and the rule is what a refusal says.

Whatever passes here can be written into a manifest or, quoted, into a shell command without changing what that
means.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, Field

_SECRET = re.compile(
    r"(^|_)(token|secret|password|passwd|credentials?|api_key|access_key|secret_access_key|private_key)$"
)
_OF_TEXT = re.compile(r"(^|_)(eos|bos|pad|unk|mask|sep|cls|start|end|image|audio)_token$")
"""Names of what a tokenizer knows, which are no secrets."""
_UNITS = {"Mi": 1, "Gi": 1024}
_MOST_MEBIBYTES = 64 * 1024 * 1024


def _matching(pattern: str, longest: int, rule: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value) or len(value) > longest:
            raise ValueError(f"{rule}, at most {longest} characters")
        return value

    return check


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("a line break or another character that is not printable would end the command")
    return value


def check_path(value: str) -> str:
    """The value, if it can be a place to mount something. Raises ValueError with the rule."""
    parts = value.split("/")[1:]
    if not re.fullmatch(r"(/[A-Za-z0-9][A-Za-z0-9._-]*)+", value) or len(value) > 200:
        raise ValueError(
            "an absolute path other than /, of letters, digits, '.', '_' and '-', without a '/' at its end"
        )
    if any(set(part) == {"."} for part in parts):
        raise ValueError("an absolute path without '.' and '..'")
    return value


def _quantity(value: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(Mi|Gi)", value) or mebibytes(value) > _MOST_MEBIBYTES:
        raise ValueError("a size in whole mebibytes or gibibytes, as in 60000Mi or 64Gi")
    return value


def is_secret(name: str) -> bool:
    """Whether a key or variable of that name holds something that belongs into no command and no manifest."""
    name = name.lower()
    return bool(_SECRET.search(name)) and not _OF_TEXT.search(name)


def mebibytes(quantity: str) -> int:
    """The size that a quantity (`60000Mi`, `64Gi`) names."""
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]


_label = _matching(
    r"[a-z]([-a-z0-9]*[a-z0-9])?",
    63,
    "small letters, digits and '-', with a letter first and no '-' at the end",
)
_short = _matching(
    r"[a-z]([-a-z0-9]*[a-z0-9])?",
    40,
    "small letters, digits and '-', with a letter first and no '-' at the end",
)
_image = _matching(
    r"[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*(:[A-Za-z0-9_][A-Za-z0-9_.-]*)?"
    r"(@sha256:[0-9a-f]{64})?",
    512,
    "an image as a registry names it: REGISTRY/PATH:TAG, the path in small letters",
)
_word = _matching(
    r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?",
    63,
    "letters, digits, '.', '_' and '-', with a letter or digit at both ends",
)
_role = _matching(
    r"arn:[a-z-]+:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]+", 512, "arn:aws:iam::ACCOUNT:role/NAME"
)
_gcp_account = _matching(
    r"[a-z][-a-z0-9]*@[a-z][-a-z0-9.]*\.iam\.gserviceaccount\.com",
    200,
    "NAME@PROJECT.iam.gserviceaccount.com",
)
_bucket = _matching(r"[a-z0-9][a-z0-9._-]*[a-z0-9]", 222, "the name of a bucket alone, without gs:// and path")
_variable = _matching(r"[A-Za-z_][A-Za-z0-9_]*", 128, "letters, digits and '_', no digit first")

Label = Annotated[str, AfterValidator(_label)]
"""A name of Kubernetes (RFC 1035)."""
ShortName = Annotated[str, AfterValidator(_short)]
"""A name that XPK takes as well: it allows 40 characters."""
Image = Annotated[str, AfterValidator(_image)]
Word = Annotated[str, AfterValidator(_word)]
RoleArn = Annotated[str, AfterValidator(_role)]
GcpAccount = Annotated[str, AfterValidator(_gcp_account)]
Bucket = Annotated[str, AfterValidator(_bucket)]
Variable = Annotated[str, AfterValidator(_variable)]
Text = Annotated[str, AfterValidator(_printable)]
CleanPath = Annotated[str, AfterValidator(check_path)]
Quantity = Annotated[str, AfterValidator(_quantity)]
ExitCode = Annotated[int, Field(ge=1, le=255)]

"""Locations of the persistent tier: URLs of object stores, or paths of directories. Text, never a `Path`.

`pathlib` makes "s3:/" of "s3://"; what has been damaged that way is still taken for a URL here, so that it is
refused by name and no directory called "s3:" comes to be.
"""

from __future__ import annotations

import os
import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def is_url(location: str) -> bool:
    """Whether this is meant as a URL; anything else is the path of a directory."""
    return _SCHEME.match(location) is not None


def absolute(location: str) -> str:
    """A path made absolute, as the shell would; a URL without the '/' at its end."""
    if is_url(location):
        scheme, _, rest = location.partition(":")
        return f"{scheme}:{rest.rstrip('/')}"
    return os.path.abspath(os.path.expanduser(location))


def joined(location: str, *names: str) -> str:
    """What lies below a location."""
    return "/".join([location.rstrip("/"), *names]) if is_url(location) else os.path.join(location, *names)

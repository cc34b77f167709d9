"""Loading a configuration the way MaxText's programs are called: a YAML file, then `key=value` words.

    load_config(["train.py", "configs/base.yml", "run_name=r1", "local_checkpoint_period=20"])

What sets a flag, later wins: the schema's default, the file named by `base_config:`, the file itself, the
environment variable `M_<FLAG>`, the command line. MaxText refuses a key that both the environment and the
command line set; here the command line wins, so whatever MaxText accepts means the same.

Keys of other programs are kept aside in `Config.other_keys`. A misspelt flag is an error.

A relative `base_config` is looked for beside the file that names it, in the directories above (MaxText's files
name theirs from the top of its configs), then beside the packaged base.yml. A file that inherits nothing stands
alone: what it does not set has the schema's default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emergency_ckpt.config.describe import is_choice
from emergency_ckpt.config.names import SURE, did_you_mean, likeness, misspelt
from emergency_ckpt.config.schema import FLAGS, Config
from emergency_ckpt.config.values import Given, read_file, read_value
from emergency_ckpt.errors import ConfigError

PACKAGED_BASE = Path(__file__).with_name("base.yml")

_BASE_CONFIG = "base_config"
_ENVIRONMENT_PREFIX = "M_"
_FILE_ENDINGS = (".yml", ".yaml")


def load_config(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Config:
    """The configuration that a command line, the environment and YAML files describe.

    Args:
      argv: `[program, file, key=value, ...]`. The program's name may be missing: a first word that ends in
        .yml or .yaml is the file, one with `=` is an override, anything else is a program name and skipped.
        Where no file is named, the packaged base.yml is used; a name that is not found here is looked for
        beside that. `None` as a bare word unsets a value.
      environ: where `M_<FLAG>` overrides, and JOBSET_NAME as the default of run_name, are looked up;
        `os.environ` if None.

    Raises:
      ConfigError: an unknown or misspelt key, a wrong value, a contradiction, or a file that cannot be read.
    """
    environ = os.environ if environ is None else environ
    file, words = _split(argv)
    given = _read_with_bases(_find(file, [Path()]), ())
    known = {*FLAGS, *given}
    given = _merge(given, _from_environment(environ, known))
    given = _merge(given, _from_words(words, known))
    if environ.get("JOBSET_NAME") and not ("run_name" in given and _flag_value("run_name", given["run_name"])):
        name = environ["JOBSET_NAME"]
        given["run_name"] = Given(name, name, "environment variable JOBSET_NAME")
    return Config(
        **{flag: _flag_value(flag, given[flag]) for flag in FLAGS if flag in given},
        other_keys={key: found.value for key, found in given.items() if key not in FLAGS},
        sources={key: found.source for key, found in given.items()},
    )


def is_given(config: Config, flag: str) -> bool:
    """Whether somebody set it: the packaged base.yml sets everything, to what is the default anyway."""
    source = config.sources.get(flag)
    return source is not None and (
        not source.startswith(f"{PACKAGED_BASE}:")
        or getattr(config, flag) != Config.model_fields[flag].get_default()
    )


def is_file(word: str) -> bool:
    """Whether a word of a command line names a configuration file, and is not `key=value`."""
    return word.endswith(_FILE_ENDINGS) and "=" not in word


def check_words(words: Sequence[str]) -> None:
    """Raises ConfigError for a word that is neither a file nor `key=value`.

    `load_config` passes over what may be the name of a program; commands of this package have none, and a
    mistyped file is to be told.
    """
    for word in words:
        if "=" not in word and not is_file(word) and not word.endswith(".py"):
            raise ConfigError(
                f"command line: {word!r} is neither a configuration file ({', '.join(_FILE_ENDINGS)}) nor of"
                " the form key=value."
            )


def _split(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The file and the `key=value` words of a command line."""
    words = list(argv)
    # MaxText's own callers pass None or "" where a program's name would stand.
    if words and not (words[0] and ("=" in words[0] or is_file(words[0]))):
        words = words[1:]
    if words and is_file(words[0]):
        return words[0], words[1:]
    return str(PACKAGED_BASE), words


def _find(file: str, directories: Sequence[Path]) -> Path:
    """A file in the first of these directories that has it, else beside the packaged base.yml."""
    tried = list(
        dict.fromkeys(
            directory / os.path.expanduser(file) for directory in (*directories, PACKAGED_BASE.parent)
        )
    )
    for path in tried:
        if path.is_file():
            return path
    raise ConfigError(
        f"There is no configuration file {file}. Looked for {', '.join(map(str, tried))}. "
        f"Correct the name, or use {PACKAGED_BASE.name} for the packaged defaults."
    )


def _read_with_bases(path: Path, below: tuple[Path, ...]) -> dict[str, Given]:
    """The keys of a file on top of those of its bases. `below`: the files that led here."""
    resolved = path.resolve()
    if resolved in below:
        chain = " -> ".join(map(str, (*below, resolved)))
        raise ConfigError(f"base_config goes round in a circle: {chain}. Remove one of these lines.")
    own = read_file(path)
    _refuse_misspelt(path, own)
    base = own.pop(_BASE_CONFIG, None)
    if base is None or base.value is None:
        return own
    if not isinstance(base.value, str):
        raise ConfigError(f"base_config in {base.source}: expected a file name, found {base.value!r}.")
    inherited = _find(base.value, [path.parent, *resolved.parents[1:]])
    return {**_read_with_bases(inherited, (*below, resolved)), **own}


def _refuse_misspelt(path: Path, own: Mapping[str, Given]) -> None:
    problems: list[str] = []
    for key, flag in misspelt(own, FLAGS).items():
        line = f"{own[key].source}: {key} is not a flag. Did you mean {flag}?"
        if likeness(key, flag) < SURE:
            line += f" If it is a key of another program, set {flag} in this file too."
        problems.append(line)
    if problems:
        raise ConfigError(f"{path} has misspelt flags:\n" + "\n".join(f"  - {line}" for line in problems))


def _from_environment(environ: Mapping[str, str], known: set[str]) -> dict[str, Given]:
    found: dict[str, Given] = {}
    problems: list[str] = []
    for name in sorted(environ):
        key = name.removeprefix(_ENVIRONMENT_PREFIX).lower()
        if not name.startswith(_ENVIRONMENT_PREFIX) or not key:
            continue
        if name != name.upper():
            if key in FLAGS:
                problems.append(f"environment variable {name}: write it in upper case, {name.upper()}.")
        elif key in known:
            found[key] = read_value(environ[name], f"environment variable {name}")
        else:
            problems.append(
                f"environment variable {name}: there is no flag {key}, nor such a key in the configuration "
                f"files.{did_you_mean(key, known)} Unset it if it belongs to something else."
            )
    _raise_unknown(problems)
    return found


def _from_words(words: Sequence[str], known: set[str]) -> dict[str, Given]:
    found: dict[str, Given] = {}
    problems: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            problems.append(f"command line: {word!r} is not of the form key=value.")
        # Another program's nested keys are written with dots: rl.num_generations=4.
        elif key in known or (key.partition(".")[0] in known - set(FLAGS)):
            found[key] = read_value(text, "command line")
        elif key == _BASE_CONFIG:
            problems.append("command line: base_config belongs into a file; name the file as the first word.")
        else:
            dashes = " Flags are written without dashes." if key.startswith("-") else ""
            problems.append(
                f"command line: there is no flag {key}, nor such a key in the configuration "
                f"files.{dashes}{did_you_mean(key, known)}"
            )
    _raise_unknown(problems)
    return found


def _raise_unknown(problems: list[str]) -> None:
    if problems:
        raise ConfigError("The overrides cannot be used:\n" + "\n".join(f"  - {line}" for line in problems))


def _merge(given: dict[str, Given], overrides: Mapping[str, Given]) -> dict[str, Given]:
    merged = dict(given)
    for key, override in overrides.items():
        head, dot, rest = key.partition(".")
        if key in given or not dot:
            merged[key] = override
        else:
            merged[head] = Given(
                _put(merged[head].value, rest.split("."), override.value), None, override.source
            )
    return merged


def _put(tree: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of nested maps with one value set."""
    if not path:
        return value
    branch = tree if isinstance(tree, Mapping) else {}
    return {**branch, path[0]: _put(branch.get(path[0]), path[1:], value)}


def _flag_value(flag: str, given: Given) -> Any:
    """What the schema gets to check: the text as written for flags that take text, else the YAML value."""
    field = Config.model_fields[flag]
    if given.text is None:
        return given.value
    if is_choice(field):  # `None` is YAML's null, and also how a Python user writes the choice `none`
        return given.text.lower()
    if field.annotation is str:
        return "" if given.value is None else given.text
    return given.value

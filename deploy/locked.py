"""What of requirements.lock one image needs.

The lock holds everything for all extras and for development. An image gets what its extras need,
and nothing whose hash is not in the lock: which packages these are is found with the lock's
versions as constraints, and what is installed are the lock's own entries of them.

    python locked.py versions requirements.lock                 # name==version, for constraints
    python locked.py entries requirements.lock NAME ...         # the entries of these packages
    python locked.py entries requirements.lock found.txt        # of those that a file names

Needs nothing but the standard library, for it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path


def normal(name: str) -> str:
    """A package's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: str) -> dict[str, list[str]]:
    """The lock's entries by name. Some names have several, for different platforms."""
    found: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=\S)", lock):
        if match := re.match(r"([A-Za-z0-9._-]+)==", entry):
            found.setdefault(normal(match[1]), []).append(entry.rstrip())
    return found


def versions(lock: str) -> str:
    """The lock without hashes."""
    heads = (each.partition("\\")[0].strip() for found in locked(lock).values() for each in found)
    return "".join(f"{head}\n" for head in heads)


def entries(lock: str, names: Iterable[str]) -> str:
    """The entries of `names`. Ends the program if one is not in the lock."""
    known, wanted = locked(lock), sorted({normal(name) for name in names})
    missing = [name for name in wanted if name not in known]
    if missing:
        raise SystemExit(f"not in the lock: {', '.join(missing)}; run 'make lock'")
    return "".join(f"{entry}\n" for name in wanted for entry in known[name])


def named(requirements: str) -> set[str]:
    """The packages that a file of requirements names, each with its version."""
    return set(re.findall(r"^([A-Za-z0-9._-]+)==", requirements, re.MULTILINE))


def main(what: str, lock: str, *names: str) -> None:
    text = Path(lock).read_text()
    if what == "versions":
        sys.stdout.write(versions(text))
        return
    wanted: set[str] = set()
    for name in names:
        wanted |= named(Path(name).read_text()) if name.endswith(".txt") else {name}
    sys.stdout.write(entries(text, wanted))


if __name__ == "__main__":
    main(*sys.argv[1:])

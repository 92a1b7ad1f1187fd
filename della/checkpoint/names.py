"""Names of shards, as an index gives them: what may be read as something else than a file of the folder."""

from __future__ import annotations

import re
import unicodedata

from della.checkpoint.strict import AGAIN

# What is no letter of a shard's name: signs of a drive, stream, pattern, variable or URL, and signs that are
# taken for a slash.
SIGNS = set('\\:*?"<>|$%\u2044\u2215\u2216\u29f5\u29f8\u29f9')
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
DEVICE = re.compile(
    r"(con|prn|aux|nul|conin|conout|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE
)
MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 1000


def is_windows_name(name: str) -> bool:
    """Whether Windows takes a name for a file's as it stands: it trims some, and some are devices.

    >>> [is_windows_name(name) for name in ("model.safetensors", "nul", "out.", "a:b")]
    [True, False, False, False]
    """
    signs = set(name) & set('<>:"/\\|?*') or any(letter < " " for letter in name)
    return bool(name) and not signs and name == name.rstrip(" .") and not DEVICE.fullmatch(name)


def why_hostile(file: str, suffix: str) -> str:
    """What is wrong with a shard's name, or "".  Subfolders are fine; all that some system or program could
    read as a way out, as another file or as no file is not."""
    parts = file.split("/")
    outside = any(part in ("", ".", "..") for part in parts) or set(file) & set("\\:\0")
    if outside or not file.endswith(suffix):
        return f"is not a {suffix} file of this folder; {AGAIN}"
    if len(file.encode()) > MOST_PATH_BYTES or any(len(part.encode()) > MOST_NAME_BYTES for part in parts):
        return "is longer than the name of a file can be; rename it here and in the folder"
    # Some systems and programs fold letters that look alike into plain ones: a wide slash is a slash.
    folded = unicodedata.normalize("NFKC", file)
    if (
        folded.count("/") != file.count("/")
        or set(folded + file) & SIGNS
        or any(unicodedata.category(letter) in UNSEEN for letter in file)
        or any(_odd(part) for part in (*parts, *folded.split("/")))
    ):
        return "some systems do not read as a plain file of this folder; rename it here and in the folder"
    return ""


def _odd(part: str) -> bool:
    """Whether some system trims the name, expands it, or takes it for a device."""
    return (
        part in ("", ".", "..")
        or part != part.strip(" ").rstrip(".")
        or bool(part.startswith("~") or DEVICE.fullmatch(part))
    )

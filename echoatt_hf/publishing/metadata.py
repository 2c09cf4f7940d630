"""
What the Hub takes as metadata of a model card. huggingface_hub leaves that to the Hub itself (`ModelCard.validate`), which
cannot be asked offline.
"""

import difflib
import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


__all__ = ["LICENSES", "find_metadata_faults"]

_LICENSES_PAGE = "https://huggingface.co/docs/hub/repositories-licenses"

LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
    """.split()  # noqa: SIM905, a list has 83 lines
)
"""
Names of licences that the Hub knows.

Source: docs/hub/repositories-licenses.md of huggingface/hub-docs, commit 242f4a1e (2026-08-22), the list that the Hub's
documentation shows.
"""


def find_metadata_faults(data: dict) -> list[tuple[str, str]]:
    """
    What the Hub would not take in the metadata of a card.

    Args:
        data (`dict`): the metadata.

    Returns:
        `list` of `tuple`: the value, and what is wrong with it.
    """
    faults = []
    for name, check in _CHECKS.items():
        values = data.get(name)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            fault = check(value) if isinstance(value, str) else "is not a text"
            if fault:
                faults.append((str(value), f"its {name}, which {fault}"))
    return faults


def _check_license(name: str) -> str | None:
    if name in LICENSES:
        return None
    alike = difflib.get_close_matches(re.sub(r"[\s_]+", "-", name.lower()), sorted(LICENSES), n=3)
    hint = f"did you mean {' or '.join(map(repr, alike))}? " if alike else ""
    return (
        f"is none of the names that the Hub knows ({hint}see {_LICENSES_PAGE}; others are 'other' with a license_name)"
    )


def _check_repository(name: str) -> str | None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return "is no name of a repository"
    return None


def _check_language(name: str) -> str | None:
    if re.fullmatch(r"[a-z]{2,3}", name) or name in ("code", "multilingual"):
        return None
    return "is no code of ISO 639 such as 'en', nor 'code' or 'multilingual'"


_CHECKS = {
    "license": _check_license,
    "language": _check_language,
    "base_model": _check_repository,
    "datasets": _check_repository,
    "tags": lambda tag: None,
    "pipeline_tag": lambda tag: None,
    "library_name": lambda name: None,
}

# SPDX-License-Identifier: MIT
"""The cases: a file per family with cases() -> [Case].  A new family: a new file, a line here."""

from . import causal_conv1d, mla_decode, selective_scan, ssd_chunk, state_update

FAMILIES = (state_update, selective_scan, ssd_chunk, causal_conv1d, mla_decode)


def all_cases():
    return [case for family in FAMILIES for case in family.cases()]

# SPDX-License-Identifier: MIT
"""What `ssmk.bench.cuda` measures: a module an operation, with cases(context, only)."""

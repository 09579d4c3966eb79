# SPDX-License-Identifier: MIT
from collections.abc import Callable, Iterable, Mapping
from typing import Any

class Op:
    name: str
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]
    results: tuple[str, ...]
    first: str
    def __init__(
        self, declaration: Callable[..., Any], fields: Iterable[tuple[str, str, int]],
        constants: Mapping[str, int], results: tuple[str, ...], *, fn: int, workspace: int,
        last_error: int, size: int, complete: Callable[[Op, dict[str, Any]], Any],
        allocate: Callable[[Any, int], Any],
    ) -> None: ...
    @property
    def function(self) -> Callable[..., Any]: ...

"""One operation of a captured graph, as the report shows it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GraphNode:
    """One operation: its name, its kind (`Linear`, `add`), the module that it is shown in, and its inputs.

    `inputs` are the positions of earlier operations. `module` says whether the name is that of a module, and `layer` is
    the name of a layer with weights.
    """

    name: str
    kind: str
    group: str
    inputs: tuple[int, ...]
    module: bool = False
    layer: str | None = None

"""The tensors of a recorded run, and the node of a graph that computes each."""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from mpcompile.frontend.recorded_int import RecordedInt, node_or_value

Pending = Callable[[], fx.Node]  # makes the node of a tensor when it is used for the first time


class RecordedTensors:
    """Knows of each tensor of a run whether it is a result of the graph, a parameter or buffer, or a constant.

    Tensors are held weakly, so a recording needs no more memory than the run.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self._graph, self._root = graph, root
        self._nodes = WeakTensorKeyDictionary()  # tensor -> fx.Node or Pending
        self._constants = WeakTensorKeyDictionary()  # tensor -> (name of its buffer, version of the tensor)
        self._constant_count = 0
        self._of_images: set[fx.Node] = set()  # nodes whose values depend on the values of an input
        self._state = [*root.named_parameters(), *root.named_buffers()]  # held, so that no other tensor gets their id
        self._owned: dict[int, str] = {}
        for name, tensor in self._state:
            self._owned.setdefault(id(tensor), name)
        self._parameters = {id(tensor) for tensor in root.parameters()}

    def add_input(self, tensor: Tensor, node: fx.Node) -> None:
        """Makes a placeholder the node of an input."""
        self._nodes[tensor] = node
        self._of_images.add(node)

    def is_recorded(self, tensor: object) -> bool:
        """Whether a tensor is an input, a result of a recorded call, or a view of one of these."""
        if not isinstance(tensor, Tensor):
            return False
        if tensor not in self._nodes and (whole := viewed(tensor)) is not tensor and whole in self._nodes:
            # A view of a constant, which was taken before a recorded call wrote into the constant.
            offset = tensor.storage_offset() - whole.storage_offset()
            shape = (tuple(tensor.shape), tensor.stride(), offset)
            node = self._graph.call_method("as_strided", (self.node_of(whole), *shape))
            node.meta.update(self.node_of(whole).meta)
            self.note_dependence(node)
            self._nodes[tensor] = node
        return tensor in self._nodes

    def owner_of(self, tensor: Tensor) -> str | None:
        """The name of the module's parameter or buffer that a tensor is; None for other tensors."""
        return self._owned.get(id(tensor))

    def is_live(self, value: Any) -> bool:
        """Whether a value holds something that a graph has to compute anew: a recorded tensor, parameter or size."""
        found = False

        def look(leaf: Any) -> Any:
            nonlocal found
            found = found or isinstance(leaf, RecordedInt)
            found = found or (isinstance(leaf, Tensor) and (id(leaf) in self._parameters or self.is_recorded(leaf)))
            return leaf

        map_aggregate(value, look)
        return found

    def depends_on_images(self, value: object) -> bool:
        """Whether a value holds a tensor whose values depend on an input."""
        return any(self.is_recorded(leaf) and self.node_of(leaf) in self._of_images for leaf in tree_leaves(value))

    def note_dependence(self, node: fx.Node) -> None:
        """Notes whether the values of a new node depend on an input: those of a node before it do."""
        if any(one in self._of_images for one in node.all_input_nodes):
            self._of_images.add(node)

    def note_write(self, written: Tensor, node: fx.Node) -> None:
        """Notes that the call of `node` wrote into a tensor, and so into every tensor that shares its memory."""
        if node in self._of_images:
            memory = viewed(written)
            shared = [tensor for tensor in self._nodes if viewed(tensor) is memory]
            self._of_images.update(self.node_of(tensor) for tensor in shared)

    def nodes_in(self, value: Any) -> Any:
        """The arguments of a call with nodes in place of tensors and RecordedInts."""
        return map_aggregate(
            value, lambda leaf: self.node_of(leaf) if isinstance(leaf, Tensor) else node_or_value(leaf)
        )

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; a parameter, buffer or constant gets one of the kind `get_attr`."""
        if self.is_recorded(tensor):
            entry = self._nodes[tensor]
            node: fx.Node = entry if isinstance(entry, fx.Node) else entry()
            self._nodes[tensor] = node
            return node
        return self._graph.get_attr(self.owner_of(tensor) or self._constant(tensor))

    def bind(self, result: Any, node: fx.Node) -> None:
        """Makes `node` the node of a result, or of the tuple, list or dict that contains its tensors."""
        if isinstance(result, Tensor):
            self._nodes[result] = node
        elif isinstance(result, tuple | list):
            for index, part in enumerate(result):
                self._bind_part(part, node, (index,))
        elif isinstance(result, dict):
            for key, part in result.items():
                self._bind_part(part, node, (key,))

    def _bind_part(self, part: Any, node: fx.Node, path: tuple[Any, ...]) -> None:
        if isinstance(part, Tensor):
            self._nodes[part] = lambda: self._fetched(node, path)
        elif isinstance(part, tuple | list):
            for index, inner in enumerate(part):
                self._bind_part(inner, node, (*path, index))

    def _fetched(self, node: fx.Node, path: tuple[Any, ...]) -> fx.Node:
        """The node of one tensor in the result of `node`, created behind it."""
        for key in path:
            with self._graph.inserting_after(node):
                fetched = self._graph.call_function(operator.getitem, (node, key))
            fetched.meta.update(node.meta)
            self.note_dependence(fetched)
            node = fetched
        return node

    def _constant(self, tensor: Tensor) -> str:
        """The name of the buffer of the root that holds a constant of the run, as it is now."""
        known, version = self._constants.get(tensor, (None, None))
        current = version_of(tensor)
        if known is not None and current is not None and version == current:
            return str(known)
        while hasattr(self._root, name := f"_constant{self._constant_count}"):
            self._constant_count += 1
        self._root.register_buffer(name, tensor.detach().clone(), persistent=False)
        self._constants[tensor] = name, current
        return name


def viewed(tensor: Tensor) -> Tensor:
    """The tensor that a view shows a part of; the tensor itself if it is no view."""
    whole: Tensor | None = tensor._base
    return tensor if whole is None else whole


def version_of(tensor: Tensor) -> int | None:
    """The number of writes into a tensor; None in inference mode, where torch does not count them."""
    return None if tensor.is_inference() else tensor._version


def tensors_in(value: object) -> list[Tensor]:
    """The tensors of a value such as the argument `out`."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]

"""Records one run of a module as an fx graph: calls of torch functions, and calls of torch's own layers.

The run is a real one, with real tensors, so Python decides as it always does, and any code that calls torch can be
recorded. A `TorchFunctionMode` sees every call of a torch function. The layers of torch.nn, and modules that the
caller names, are recorded as one call each.

What is recorded:

- A call with an input of the model, a parameter, a size of one of these, or a result of such a call.
- Other calls compute constants. They are run once, and a constant that is used becomes a buffer of the module.
- Sizes are RecordedInts, so arithmetic on the batch size is part of the graph.

What is refused, because a graph would be wrong on other images:

- Python reads a value of a tensor that depends on the images (`if x.max() > 1`, `x.item()`, `x.numpy()`).
- forward writes such a tensor into a buffer or parameter of the module.

Two more faults cannot be seen during the run: values that leave torch and come back (a compiled extension, a tensor
that was cached by an earlier run), and shapes that Python computes from the batch size in floating point. The caller
has to compare the graph with the module on other images and on another batch size (mpcompile/frontend/capture.py).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mpcompile.errors import CaptureError
from mpcompile.frontend.graph_names import free_names
from mpcompile.frontend.leaf_modules import is_leaf
from mpcompile.frontend.recorded_calls import (
    SHAPE_ONLY,
    VALUE_READS,
    appended,
    drop_unused,
    has_size_of_values,
    name_of,
    property_of,
    writes,
)
from mpcompile.frontend.recorded_int import RecordedInt, plain
from mpcompile.frontend.recorded_tensors import RecordedTensors, tensors_in, version_of, viewed
from mpcompile.frontend.source_lines import in_assertion, source_line, with_code
from mpcompile.frontend.submodule import suggestion

SOURCE_LINE = "source_line"  # key of a node's meta: the line of model code that made the call


def record(root: nn.Module, inputs: Mapping[str, Tensor], run: Callable[[], Any], leaves: Collection[str] = ()) -> Any:
    """The graph of one run of a module, and what the run returned.

    Args:
        root: the module. Constants of the run become buffers of it, and its layers become those of the graph: give a
            copy in evaluation mode.
        inputs: the input tensors by name, in the order of the placeholders.
        run: calls the module on these tensors, and returns its outputs.
        leaves: names of modules that are recorded as one call.

    Returns the recorder, to which outputs are added by `finished`, and the outputs of the run.

    Raises CaptureError if the run cannot be recorded, and what `run` raises.
    """
    recorder = Recorder(root, frozenset(leaves))
    for name, tensor in inputs.items():
        recorder.add_input(name, tensor)
    with torch.no_grad(), recorder.module_calls(), recorder:
        outputs = run()
    return recorder, outputs


class Recorder(TorchFunctionMode):
    """Writes each call of a torch function and of a leaf module into `graph` while it is the active mode."""

    def __init__(self, root: nn.Module, leaves: frozenset[str]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._root, self._leaves = root, leaves
        self._tensors = RecordedTensors(self.graph, root)
        self._inputs: list[tuple[Tensor, int | None, fx.Node]] = []  # with the version of each tensor before the run
        self._stack: list[str] = []  # names of the modules that are being called
        self._types = {name: type(module) for name, module in root.named_modules()}

    def add_input(self, name: str, tensor: Tensor) -> None:
        """Adds a placeholder for an input tensor."""
        node = self.graph.placeholder(name)
        self._inputs.append((tensor, version_of(tensor), node))
        self._tensors.add_input(tensor, node)

    def finished(self, outputs: list[Tensor]) -> fx.GraphModule:
        """The graph module that returns these tensors of the run: one tensor, or a tuple of several."""
        nodes = tuple(self._tensors.node_of(tensor) for tensor in outputs)
        self.graph.output(nodes if len(nodes) > 1 else nodes[0])
        self._copy_written_inputs()
        free_names(self._root, self.graph)
        module = fx.GraphModule(self._root, self.graph, type(self._root).__name__)
        drop_unused(module)
        module.graph.lint()
        return module

    def _copy_written_inputs(self) -> None:
        """Lets the graph work on copies of the inputs that the run wrote into: callers use their images again."""
        for tensor, version, node in self._inputs:
            if version is None or tensor._version != version:
                users = list(node.users)
                with self.graph.inserting_after(self._inputs[-1][2]):
                    copy = self.graph.call_method("clone", (node,))
                self._describe(copy)
                for user in users:
                    user.replace_input_with(node, copy)

    # ---- calls of torch functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs a torch function, and records the call if its result is no constant."""
        kwargs = kwargs or {}
        if func is Tensor.__deepcopy__:
            func, args, kwargs = Tensor.clone, args[:1], {}
        if (attribute := property_of(func)) is not None:
            return self._property(func, attribute, args)
        name = name_of(func)
        if func is Tensor.size and self._tensors.is_recorded(args[0]):
            return self._size(args[0], *args[1:], **kwargs)
        if name in ("numel", "nelement") and self._tensors.is_recorded(args[0]):
            return self._integer(args[0].numel(), args[0], "numel")
        run_args, run_kwargs = map_aggregate(args, plain), map_aggregate(kwargs, plain)
        if not self._tensors.is_live((args, kwargs)):
            return func(*run_args, **run_kwargs)
        if name in VALUE_READS:
            if self._tensors.depends_on_images((args, kwargs)) and not in_assertion():
                raise self._refused(
                    f"Python reads a value that depends on the image ({name.strip('_')})",
                    "Make that line independent of the values of the image",
                )
            return func(*run_args, **run_kwargs)
        if has_size_of_values(name, args) and self._tensors.depends_on_images((args, kwargs)):
            raise self._refused(
                f"the size of a result depends on the values of the image ({name.strip('_')})",
                "Keep all positions and mark the chosen ones with a mask",
            )
        written = tensors_in(args[0] if writes(func, kwargs) else kwargs.get("out"))
        for tensor in written:
            self._prepare_write(tensor)
        # Nodes of the arguments first: a call that writes into its argument gives this tensor a new node.
        node_args, node_kwargs = self._tensors.nodes_in(args), self._tensors.nodes_in(kwargs)
        result = func(*run_args, **run_kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)) and name != "__setitem__":
            return result  # a question about shape, type or layout
        node = appended(self.graph, func, tuple(node_args), dict(node_kwargs))
        values = (args[1:], kwargs)  # full_like(x, value) takes more than the shape of x
        self._describe(node, shape_only=name in SHAPE_ONLY and not self._tensors.depends_on_images(values))
        if name != "__setitem__":
            self._tensors.bind(result, node)
        for tensor in written:
            self._tensors.note_write(tensor, node)
        return result

    def _property(self, func: Callable[..., Any], name: str, args: tuple[Any, ...]) -> Any:
        """The value of a property of a tensor."""
        tensor = args[0]
        if name == "shape" and self._tensors.is_recorded(tensor):
            return self._size(tensor)
        value = func(*args)
        if not isinstance(value, Tensor) or not self._tensors.is_live(tensor):
            return value
        if name == "data":  # the same values; an optimiser's view of them
            self._tensors.bind(value, self._tensors.node_of(tensor))
            return value
        node = self.graph.call_function(getattr, (self._tensors.node_of(tensor), name))
        self._describe(node)
        self._tensors.bind(value, node)
        return value

    def _size(self, tensor: Tensor, dim: int | None = None) -> Any:
        """The size of a recorded tensor along one axis, or along all."""
        if dim is not None:
            return self._integer(tensor.size(int(dim)), tensor, "size", int(dim))
        return torch.Size([self._integer(n, tensor, "size", axis) for axis, n in enumerate(tuple(tensor.shape))])

    def _integer(self, value: int, tensor: Tensor, method: str, *args: int) -> RecordedInt:
        """An integer that a method of a recorded tensor returns."""
        of = self._tensors.node_of(tensor)
        return RecordedInt.of(value, self.graph, lambda: self.graph.call_method(method, (of, *args)))

    # ---- calls of modules

    @contextmanager
    def module_calls(self) -> Iterator[None]:
        """Records calls of the root's modules while the context is open.

        `_compiled_call_impl` is what `nn.Module.compile` sets: a module calls it in place of hooks and forward. It is
        set on modules of this root alone, so other threads may run other modules meanwhile.
        """
        named = dict(self._root.named_modules())
        try:
            for name, module in named.items():
                module._compiled_call_impl = self._recorded_call(name, module)
            yield
        finally:
            for module in named.values():
                module._compiled_call_impl = None

    def _recorded_call(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """What is called in place of a module."""
        leaf = name in self._leaves or is_leaf(module)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._stack.append(name)
            try:
                if leaf:
                    with torch._C.DisableTorchFunction():
                        return self._leaf_call(name, module, args, kwargs)
                return module._call_impl(*args, **kwargs)
            finally:
                self._stack.pop()

        return call

    def _leaf_call(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a module whole, and records the call."""
        live = self._tensors.is_live((args, kwargs)) or next(module.parameters(), None) is not None
        node_args, node_kwargs = (self._tensors.nodes_in(args), self._tensors.nodes_in(kwargs)) if live else ((), {})
        result = module._call_impl(*map_aggregate(args, plain), **map_aggregate(kwargs, plain))
        if live:
            node = self.graph.call_module(name, tuple(node_args), dict(node_kwargs))
            self._describe(node)
            self._tensors.bind(result, node)
        return result

    def _describe(self, node: fx.Node, shape_only: bool = False) -> None:
        """Notes on a new node: the modules around it, its line of model code, whether it depends on images."""
        node.meta["nn_module_stack"] = {name: (name, self._types[name]) for name in self._stack}
        node.meta[SOURCE_LINE] = source_line()
        if not shape_only:
            self._tensors.note_dependence(node)

    # ---- what is refused

    def _refused(self, what: str, remedy: str) -> CaptureError:
        """The error for a call that cannot be recorded."""
        owner = self._stack[-1] if self._stack else ""
        part = suggestion(self._root, self._stack)
        return CaptureError(
            f"{type(self._root).__name__} cannot be captured: {what}. At {with_code(source_line())}. {remedy}, or "
            f"{keep_whole(owner)}{f', or {part}' if part else ''}"
        )

    def _prepare_write(self, tensor: Tensor) -> None:
        """Gives a constant that is written into a node of its own. Raises CaptureError for state of the module.

        If it is a view, the tensor that it views gets the node, since the write changes that one and all its views.
        """
        if self._tensors.is_recorded(tensor):
            return
        whole = viewed(tensor)
        name = self._tensors.owner_of(whole)
        if name is not None:
            raise self._refused(f"forward writes into its own {name}", "Write into a copy")
        node = self.graph.call_method("clone", (self._tensors.node_of(whole),))
        self._describe(node)
        self._tensors.bind(whole, node)


def keep_whole(owner: str) -> str:
    """The remedy for a line that cannot be recorded."""
    if owner:
        return f"keep the module around it whole with --leaf {owner}"
    return "move it into a module of its own, and keep that whole with --leaf NAME"

"""Which channel each number of each activation belongs to, followed through the graph.

Every channel of every activation is an atom. The graph is run once on its example, and beside each tensor t go planes:
integer tensors of t's shape that hold, for each number, the atom it belongs to. Each plane varies along some axes only
(the channels, or heads and width of a head); a tensor of tokens and channels that are both mixed later has two.

- Data movement (reshape, transpose, chunk, roll, flatten …) is run on the planes as it is on the tensor, so that what
  it does need not be known.
- An operation that pairs numbers (addition, scaling by a parameter) makes the atoms that it pairs one.
- A layer ends the atoms of its inputs (its weight's input axis holds them) and begins new ones for its outputs.
- A reduction, a norm, a product within a head only make sense if a set of atoms stays together.
- Anything else fixes the atoms it meets where they are, and says why.

What is learnt goes into a Ledger; passes/permute/coupling.py makes groups of it.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from mpcompile.passes.permute.channel_labels import (
    LabelledTensor,
    along,
    columns,
    compressed,
    flows,
    moves_only,
    paired,
    plain,
    reduced,
    varying,
    with_plane,
    wrapped,
)
from mpcompile.passes.permute.constraints import CONSTANT, UNKNOWN, Axis, ChannelConstraints
from mpcompile.passes.permute.operator_sets import (
    ELEMENTWISE,
    MOVES,
    MOVING_MODULES,
    REDUCTIONS,
    SPATIAL,
    SPATIAL_MODULES,
    UNARY_MODULES,
)


class ChannelTracer(fx.Interpreter):
    """Runs a graph on Flows and fills a ledger."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.ledger = ChannelConstraints()
        self._names: dict[int, str] = {}
        for owned in (graph.named_parameters(), graph.named_buffers()):
            for name, value in owned:
                self._names.setdefault(id(value), name)
        self._parameters: dict[str, Tensor] = {}  # the plane of each parameter that was fetched
        self._what = ""

    def run_node(self, n: fx.Node) -> Any:
        """The node's result as a Flow, where it is a tensor."""
        self._what = f"{n.name} ({getattr(n.target, '__name__', n.target)})"
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The image: no channels of ours."""
        return LabelledTensor(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter or buffer: atoms of its own along its last axis that has any."""
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, Tensor):
            return value
        name = self._names.get(id(value))
        dims = [dim for dim, size in enumerate(value.shape) if size > 1]
        if name is None or not dims or not value.is_floating_point():
            return LabelledTensor(value)
        if name not in self._parameters:
            atoms = self.ledger.fresh(value.shape[dims[-1]])
            self.ledger.bind(Axis(name, dims[-1]), atoms, self._what)
            self._parameters[name] = along(self.ledger.axes[Axis(name, dims[-1])], value.shape, dims[-1])
        return LabelledTensor(value, (self._parameters[name],), name)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The order of the outputs is the model's interface."""
        for flow in flows(args):
            for plane in flow.planes:
                self.ledger.fix(plane.numpy(), "its order is that of the model's outputs")
        return super().output(target, args, kwargs)

    # ---- operations

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A function on Flows."""
        if target in (F.linear, F.conv2d, torch.conv2d):
            return self._functional_layer(target, args, kwargs)
        if target is F.layer_norm:
            return self._functional_norm(target, args, kwargs, dim=-1)
        if target is F.group_norm and (args[1] if len(args) > 1 else kwargs["num_groups"]) == 1:
            return self._functional_norm(target, args, kwargs, dim=1)
        if target is F.batch_norm:
            return self._functional_norm(target, args, kwargs, dim=1)
        return self._operation(target.__name__, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A method of a tensor."""

        def call(owner: Any, *rest: Any, **named: Any) -> Any:
            return getattr(owner, target)(*rest, **named)

        return self._operation(str(target), call, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A module on Flows: a layer, a norm, or an operation."""
        module = self.fetch_attr(target)
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            return self._layer(module, target, args[0], dim=-1)
        if isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward:
            return self._layer(module, target, args[0], dim=1)
        if isinstance(module, _BatchNorm):
            return self._norm(module, target, args[0], dim=1)
        if isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
            return self._norm(module, target, args[0], dim=-1)
        if isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward and module.num_groups == 1:
            return self._norm(module, target, args[0], dim=1)
        if isinstance(module, UNARY_MODULES):
            return self._elementwise(module, args, kwargs)
        if isinstance(module, SPATIAL_MODULES):
            return self._spatial(module, args, kwargs)
        if isinstance(module, MOVING_MODULES):
            return self._move(module, args, kwargs)
        if isinstance(module, nn.Softmax):
            return self._softmax(module, args, kwargs, module.dim)
        self._what = f"{target} ({type(module).__name__})"
        return self._unknown(module, args, kwargs)

    def _operation(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of a function or method by its name."""
        if call is operator.getitem and not isinstance(args[0], LabelledTensor):  # one of several results
            return args[0][args[1]]
        given = flows((args, kwargs))
        if not any(flow.planes for flow in given):
            lost = next((flow.lost for flow in given if flow.lost), None)
            return wrapped(call(*plain(args), **plain(kwargs)), lost)
        if call is getattr or name in ("size", "dim", "numel", "stride"):
            return wrapped(call(*plain(args), **plain(kwargs)))
        if name in ELEMENTWISE:
            return self._elementwise(call, args, kwargs)
        if name in MOVES and not flows((args[1:], kwargs)):
            return self._move(call, args, kwargs)
        if name in ("reshape_as", "view_as"):
            return self._move(call, (args[0], *plain(args[1:])), plain(kwargs))
        if name in ("cat", "concat", "stack"):
            return self._cat(call, args, kwargs)
        if name in REDUCTIONS:
            return self._reduce(call, args, kwargs)
        if name in SPATIAL:
            return self._spatial(call, args, kwargs)
        if name == "pad":
            return self._pad(call, args, kwargs)
        if name == "softmax":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return self._softmax(call, args, kwargs, dim)
        if name in ("matmul", "bmm"):
            return self._product(call, args, kwargs)
        if name == "scaled_dot_product_attention":
            return self._attention(call, args, kwargs)
        return self._unknown(call, args, kwargs)

    def _unknown(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Not understood by name: data movement if it proves to be, else what it meets stays where it is."""
        given = flows((args, kwargs))
        if len(given) == 1 and given[0].planes and moves_only(call, args, kwargs, given[0].tensor):
            return self._move(call, args, kwargs)
        for flow in given:
            for plane in flow.planes:
                self.ledger.fix(plane.numpy(), f"{self._what} is not understood")
        return wrapped(call(*plain(args), **plain(kwargs)), f"{self._what} is not understood")

    def _elementwise(self, call: Callable[..., Any], args: Any, kwargs: Any) -> LabelledTensor:
        """Numbers at the same place belong to one channel."""
        result = call(*plain(args), **plain(kwargs))
        planes: list[Tensor] = []
        given = flows((args, kwargs))
        for flow in given:
            for plane in flow.planes:
                spread = plane.expand(result.shape)
                met = [index for index, other in enumerate(planes) if varying(other) & varying(spread)]
                if not met:
                    planes.append(spread)
                else:
                    keep = sorted(varying(spread) | varying(planes[met[0]]))
                    self.ledger.unify(
                        compressed(planes[met[0]], keep).numpy(), compressed(spread, keep).numpy(), self._what
                    )
                    # They are one now: what varies along fewer axes says the same.
                    planes[met[0]] = min(planes[met[0]], spread, key=lambda plane: len(varying(plane)))
                    for index in met[1:]:
                        self.ledger.fix(planes[index].numpy(), f"{self._what} mixes two kinds of channels")
        for plane in planes:
            for flow in given:
                if not self._accounts_for(flow, plane):
                    self.ledger.fix(plane.numpy(), f"{self._what} pairs it with what is no channel")
        return LabelledTensor(result, tuple(planes), lost=next((flow.lost for flow in given if flow.lost), None))

    @staticmethod
    def _accounts_for(flow: LabelledTensor, plane: Tensor) -> bool:
        """Whether a factor is alike for all channels of a plane, or has channels of its own wherever it is not."""
        offset = plane.ndim - flow.tensor.ndim
        dims = varying(plane)
        if any(dim + offset in dims for own in flow.planes for dim in varying(own)):
            return True  # number by number, it has been made one with them
        return not any(dim >= offset and flow.tensor.shape[dim - offset] > 1 for dim in dims)

    def _move(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Data movement, done to the planes too."""
        [flow] = flows((args, kwargs))
        result = call(*plain(args), **plain(kwargs))

        def moved(plane: Tensor) -> Any:
            return call(*with_plane(args, flow, plane), **with_plane(kwargs, flow, plane))

        return paired(result, [moved(plane) for plane in flow.planes])

    def _pad(self, call: Callable[..., Any], args: Any, kwargs: Any) -> LabelledTensor:
        """Padding with a constant is alike for all channels."""
        flow, pad = args[0], kwargs.get("pad", args[1] if len(args) > 1 else None)
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        result = call(*plain(args), **plain(kwargs))
        if mode != "constant":
            padded = [F.pad(p.double(), pad, mode=mode).long() for p in flow.planes]
        else:
            padded = [F.pad(p, pad, value=CONSTANT) for p in flow.planes]
        return LabelledTensor(result, tuple(padded))

    def _cat(self, call: Callable[..., Any], args: Any, kwargs: Any) -> LabelledTensor:
        """Concatenation: what has no channels is marked so."""
        given = flows((args, kwargs))
        if any(len(flow.planes) > 1 for flow in given):
            flow: LabelledTensor = self._unknown(call, args, kwargs)
            return flow

        def atoms(value: LabelledTensor) -> Tensor:
            return value.planes[0] if value.planes else torch.full(value.tensor.shape, UNKNOWN)

        plane = call(*tree_map_only(LabelledTensor, atoms, args), **tree_map_only(LabelledTensor, atoms, kwargs))
        return LabelledTensor(call(*plain(args), **plain(kwargs)), (plane,))

    def _reduce(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A symmetric function along some axes: the atoms along them have to stay among themselves."""
        [flow] = flows(args) if len(flows(args)) == 1 else [None]
        result = call(*plain(args), **plain(kwargs))
        if flow is None or not isinstance(result, Tensor):
            return self._unknown(call, args, kwargs)
        gone, kept = reduced(flow.tensor.shape, call, args, kwargs)
        planes = []
        for plane in flow.planes:
            along_gone = varying(plane) & gone
            if not along_gone:
                for dim in sorted(gone, reverse=True):
                    plane = plane.narrow(dim, 0, 1) if kept else plane.select(dim, 0)
                planes.append(plane)
            elif varying(plane) <= gone:
                self.ledger.keep_together(compressed(plane).reshape(1, -1).numpy())
            else:
                self.ledger.fix(plane.numpy(), f"{self._what} sums over some of its channels")
        return LabelledTensor(result, tuple(planes))

    def _spatial(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Pooling and resizing, which treat every channel alike along the last two axes."""
        given = flows((args, kwargs))
        result = call(*plain(args), **plain(kwargs))
        if len(given) != 1 or not isinstance(result, Tensor):
            return self._unknown(call, args, kwargs)
        planes = []
        for plane in given[0].planes:
            if varying(plane) & {plane.ndim - 1, plane.ndim - 2}:
                self.ledger.fix(plane.numpy(), f"{self._what} pools over its channels")
            else:
                planes.append(plane[..., :1, :1].expand(result.shape))
        return LabelledTensor(result, tuple(planes))

    def _softmax(self, call: Callable[..., Any], args: Any, kwargs: Any, dim: int | None) -> LabelledTensor:
        """Symmetric along one axis, and elementwise otherwise."""
        flow = flows((args, kwargs))[0]
        for plane in flow.planes:
            if dim is None or dim % plane.ndim in varying(plane):
                self.ledger.fix(plane.numpy(), f"{self._what} normalises over its channels")
        return LabelledTensor(call(*plain(args), **plain(kwargs)), flow.planes)

    def _product(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A matrix product of two activations."""
        if len(flows((args, kwargs))) != 2 or len(args) < 2:
            return self._unknown(call, args, kwargs)
        a, b = args[0], args[1]
        result = call(*plain(args), **plain(kwargs))
        planes = [*self._carried(a, -1, -2, result.shape), *self._carried(b, -2, -1, result.shape)]
        return LabelledTensor(result, tuple(planes))

    def _attention(self, call: Callable[..., Any], args: Any, kwargs: Any) -> LabelledTensor:
        """softmax(q kᵀ) v, head by head: the channels of v come out where they went in."""
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        result = call(*plain(args), **plain(kwargs))
        for name in ("query", "key"):
            for plane in named[name].planes:
                self.ledger.fix(plane.numpy(), "queries and keys are multiplied with each other, channel by channel")
        return LabelledTensor(result, tuple(self._carried(named["value"], -2, -1, result.shape)))

    def _carried(self, flow: LabelledTensor, summed: int, carried: int, shape: torch.Size) -> Iterator[Tensor]:
        """The planes of a factor that live on in a product; those along the axis that is summed over do not."""
        for plane in flow.planes:
            dims = varying(plane)
            if summed % plane.ndim in dims:
                self.ledger.fix(plane.numpy(), f"{self._what} multiplies it with another activation")
                continue
            if carried % plane.ndim in dims and len(dims) > 1:  # heads: each is multiplied by itself
                self.ledger.keep_together(columns(plane, carried))
            plane = plane.narrow(summed % plane.ndim, 0, 1)
            yield plane.expand(shape)

    # ---- layers and norms

    def _layer(self, module: nn.Linear | nn.Conv2d, target: str, flow: LabelledTensor, dim: int) -> LabelledTensor:
        """A layer that is called."""
        weight, bias = self._names[id(module.weight)], self._name(module, target, "bias")
        result = module(flow.tensor)
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        return self._applied(flow, result, weight, module.weight.shape, bias, groups, dim)

    def _functional_layer(self, target: Any, args: Any, kwargs: Any) -> LabelledTensor:
        """A layer whose weight the graph fetches."""
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        flow, weight, bias = named["input"], named["weight"], named.get("bias")
        groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
        if not isinstance(weight, LabelledTensor) or weight.parameter is None or not isinstance(flow, LabelledTensor):
            result: LabelledTensor = self._unknown(target, args, kwargs)
            return result
        dim = -1 if target is F.linear else 1
        computed = target(*plain(args), **plain(kwargs))
        name = bias.parameter if isinstance(bias, LabelledTensor) else None
        applied = self._applied(flow, computed, weight.parameter, weight.tensor.shape, name, groups, dim)
        if isinstance(bias, LabelledTensor) and name is None:  # put together of several, as BEiT does
            outputs = self.ledger.axes[Axis(weight.parameter, 0)]
            made = bias.planes[0].numpy() if bias.planes else np.full(len(outputs), UNKNOWN)
            self.ledger.unify(outputs, made, self._what)
        return applied

    def _applied(
        self,
        flow: LabelledTensor,
        result: Tensor,
        weight: str,
        shape: torch.Size,
        bias: str | None,
        groups: int,
        dim: int,
    ) -> LabelledTensor:
        """Ends the atoms along `dim` at the weight's input axis and begins those of its rows."""
        place = dim % result.ndim
        consumed = [plane for plane in flow.planes if dim % plane.ndim in varying(plane)]
        carried = [plane for plane in flow.planes if dim % plane.ndim not in varying(plane)]
        size = flow.tensor.shape[dim]
        for plane in consumed[1:]:
            self.ledger.fix(plane.numpy(), f"{self._what} sums over two kinds of channels")
        if consumed:
            rows = columns(consumed[0], dim)
            for row in rows[1:]:
                self.ledger.unify(rows[0], row, self._what)
            atoms = rows[0]
        else:
            atoms = self.ledger.fresh(size)
            first = "what it reads is no channel that is known" if self.ledger.inputs else "it reads the image itself"
            reads = flow.lost or ("its inputs are places and not channels" if flow.planes else first)
            self.ledger.fix(atoms, reads)
        out = shape[0]
        if groups > 1 and shape[1] == 1 and out == size:  # depthwise: a row a channel
            self.ledger.bind(Axis(weight, 0), atoms, self._what)
            outputs = self.ledger.axes[Axis(weight, 0)]
        else:
            per = out // groups
            for group in range(groups):
                axis = Axis(weight, 1, None if groups == 1 else (group * per, (group + 1) * per))
                self.ledger.bind(axis, atoms[group * shape[1] : (group + 1) * shape[1]], self._what)
                self.ledger.inputs.add(axis)
            if Axis(weight, 0) not in self.ledger.axes:
                self.ledger.bind(Axis(weight, 0), self.ledger.fresh(out), self._what)
            outputs = self.ledger.axes[Axis(weight, 0)]
            if groups > 1:
                self.ledger.keep_together(outputs.reshape(groups, per))
        if bias is not None:
            self.ledger.bind(Axis(bias, 0), outputs, self._what)
        # A plane along other axes lives on: the layer does the same for each of its channels.
        living = tuple(plane.narrow(dim, 0, 1).expand(result.shape) for plane in carried)
        return LabelledTensor(result, (along(outputs, result.shape, place), *living))

    def _norm(self, module: nn.Module, target: str, flow: LabelledTensor, dim: int) -> LabelledTensor:
        """BatchNorm along axis 1, or LayerNorm along the last: parameters a channel."""
        result = module(flow.tensor)
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            unknown: LabelledTensor = self._unknown(module, (flow,), {})
            return unknown
        for plane in flow.planes:
            if dim % plane.ndim not in varying(plane):
                continue
            rows = columns(plane, dim)
            parts = ("weight", "bias", "running_mean", "running_var")
            for name in filter(None, (self._name(module, target, part) for part in parts)):
                for row in rows:
                    self.ledger.bind(Axis(name, 0), row, self._what)
            if not isinstance(module, _BatchNorm):
                self.ledger.keep_together(rows)
        return LabelledTensor(result, flow.planes)

    def _functional_norm(self, target: Any, args: Any, kwargs: Any, dim: int) -> Any:
        """A norm whose parameters the graph fetches."""
        flow, *rest = args
        params = [value for value in flows((rest, kwargs)) if value.planes]
        if dim == -1 and len(args[1] if len(args) > 1 else kwargs["normalized_shape"]) != 1:
            return self._unknown(target, args, kwargs)
        for plane in flow.planes:
            if dim % plane.ndim in varying(plane):
                rows = columns(plane, dim)
                for parameter in params:
                    for row in rows:
                        self.ledger.unify(row, parameter.planes[0].numpy(), self._what)
                if target is not F.batch_norm:
                    self.ledger.keep_together(rows)
        return LabelledTensor(target(*plain(args), **plain(kwargs)), flow.planes)

    def _name(self, module: nn.Module, target: str, part: str) -> str | None:
        """The one name that a module's parameter or buffer goes by, however many it has."""
        value = getattr(module, part, None)
        return None if value is None else self._names.get(id(value), f"{target}.{part}")

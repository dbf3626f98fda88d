"""Guards of a .pt2 program: comparisons such as `L['x'].size()[0] >= 2`, parsed and never run.

torch writes guards into a function and compiles it. They are not needed here: the lifted module is checked on other
batches instead. A guard that is more than a comparison of sizes is a reason not to read the file.
"""

import ast

from mpcompile.frontend.exported.expressions import COMPARISONS, FUNCTIONS, OPERATORS

LONGEST = 5000  # characters
BOOLEANS = (ast.And, ast.Or)


def is_size_guard(guard: object) -> bool:
    """Whether a guard is a comparison of sizes of the inputs, in torch's form."""
    if not isinstance(guard, str) or len(guard) > LONGEST:
        return False
    try:
        return _allowed(ast.parse(guard.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _allowed(node: ast.expr) -> bool:
    """Whether a node of the syntax tree is a comparison, arithmetic on sizes, or a size."""
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return True
        case ast.BoolOp(op=op):
            return isinstance(op, BOOLEANS) and all(map(_allowed, node.values))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not()):
            return _allowed(node.operand)
        case ast.BinOp():
            return isinstance(node.op, OPERATORS) and _allowed(node.left) and _allowed(node.right)
        case ast.Compare():
            return all(isinstance(op, COMPARISONS) for op in node.ops) and all(
                map(_allowed, (node.left, *node.comparators))
            )
        case ast.Call(func=ast.Name(id=function), keywords=[]) if function in FUNCTIONS:
            return all(map(_allowed, node.args))
        case ast.Subscript(value=ast.Call(func=ast.Attribute(attr="size" | "stride"), args=[], keywords=[]) as call):
            is_axis = isinstance(node.slice, ast.Constant) and type(node.slice.value) is int
            return is_axis and isinstance(call.func, ast.Attribute) and _is_input(call.func.value)
        case ast.Subscript():
            return _is_input(node)
    return False


def _is_input(node: ast.expr) -> bool:
    """Whether a node is an argument of the program, such as `L['x']` or `L['args'][0]`."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Constant):
        return False
    inner = node.value
    return isinstance(node.slice.value, str | int) and (
        (isinstance(inner, ast.Name) and inner.id == "L") or _is_input(inner)
    )

"""Sizes of a .pt2 program: integers, or expressions such as `Mul(Integer(2), Symbol('s0', integer=True))`.

torch.export.load evaluates the text of an expression as Python. Here the text is parsed and never evaluated, and it has
to follow this grammar, which covers what torch prints (`sympy.srepr`) and what is written by hand:

    size     = integer | symbol | function "(" size {"," size} ")" | size operator size | "-" size
    symbol   = s0, s77, u3 … | "Symbol('s0', positive=True, integer=True)"
    operator = + - * // / % ** < <= > >= == !=
    function = one of FUNCTIONS

Exponents are small numbers, so that no expression stands for a number that fills the memory.
"""

import ast
import contextlib
import re

from mpcompile.frontend.exported.refusal import ProgramRefused, boolean, integer, mapping, number, shown, union

SYMBOL = re.compile(r"[su]\d{1,6}|z[u]?f\d{1,6}", re.ASCII)
CHARACTERS = re.compile(r"[\w\s+\-*/%()',=<>!.]*", re.ASCII)
LONGEST = 2000  # characters
LARGEST_EXPONENT = 8
ASSUMPTIONS = frozenset({"integer", "positive", "nonnegative", "negative", "nonpositive", "real", "nonzero", "finite"})
POWERS = frozenset({"Pow", "PowByNatural", "FloatPow"})
FUNCTIONS = frozenset(
    """
    Integer Rational Float Add Mul Max Min Abs FloorDiv CleanDiv CeilDiv Mod PythonMod ModularIndexing Where CeilToInt
    FloorToInt TruncToInt TruncToFloat RoundToInt RoundDecimal ToFloat Identity IntTrueDiv FloatTrueDiv Eq Ne Equality
    Unequality Lt Le Gt Ge StrictLessThan LessThan StrictGreaterThan GreaterThan And Or Not
    """.split()  # noqa: SIM905
)
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Div, ast.Mod)
COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)


def require_size_expression(value: object, where: str) -> str:
    """The text of an expression. Raises ProgramRefused if it does not follow the grammar."""
    if isinstance(value, str) and len(value) <= LONGEST and CHARACTERS.fullmatch(value):
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            if _allowed(ast.parse(value.strip(), mode="eval").body):
                return value
    raise ProgramRefused(f"has {shown(value)} as an expression in {where}; it is not a size, and loading would run it")


def _allowed(node: ast.expr) -> bool:
    """Whether a node of the syntax tree, with all nodes in it, follows the grammar."""
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return abs(value) < 2**64
        case ast.Name():
            return bool(SYMBOL.fullmatch(node.id))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            return _allowed(node.operand)
        case ast.BinOp(op=ast.Pow()):
            return _is_power(node.left, node.right)
        case ast.BinOp():
            return isinstance(node.op, OPERATORS) and _allowed(node.left) and _allowed(node.right)
        case ast.Compare():
            return all(isinstance(op, COMPARISONS) for op in node.ops) and all(
                map(_allowed, (node.left, *node.comparators))
            )
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as symbol)]):
            return bool(SYMBOL.fullmatch(symbol)) and all(_is_assumption(word) for word in node.keywords)
        case ast.Call(func=ast.Name(id=function), keywords=[]) if function in POWERS:
            return len(node.args) == 2 and _is_power(*node.args)
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str() as digits)]):
            return bool(re.fullmatch(r"-?\d{1,30}(\.\d{1,30})?", digits)) and all(
                word.arg == "precision" and isinstance(word.value, ast.Constant) and type(word.value.value) is int
                for word in node.keywords
            )
        case ast.Call(func=ast.Name(id=function), keywords=[]) if function in FUNCTIONS:
            return len(node.args) > 0 and all(map(_allowed, node.args))
    return False


def _is_power(base: ast.expr, exponent: ast.expr) -> bool:
    """Whether the base is a symbol and the exponent a small number."""
    is_symbol = isinstance(base, ast.Name) or (
        isinstance(base, ast.Call) and isinstance(base.func, ast.Name) and base.func.id == "Symbol"
    )
    match exponent:
        case ast.Call(func=ast.Name(id="Integer"), args=[ast.Constant() | ast.UnaryOp() as inner], keywords=[]):
            exponent = inner
    negative = isinstance(exponent, ast.UnaryOp) and isinstance(exponent.op, ast.USub)
    value = exponent.operand if negative and isinstance(exponent, ast.UnaryOp) else exponent
    small = isinstance(value, ast.Constant) and type(value.value) is int and value.value <= LARGEST_EXPONENT
    return is_symbol and _allowed(base) and small


def _is_assumption(word: ast.keyword) -> bool:
    """Whether a keyword of Symbol is one of sympy's assumptions with a truth value."""
    return word.arg in ASSUMPTIONS and isinstance(word.value, ast.Constant) and type(word.value.value) is bool


def size_of(value: object, where: str) -> tuple[int | None, bool]:
    """A size, or the hint that stands beside an expression (None without one), and whether the size is symbolic."""
    kind, content = union(value, where)
    if kind == "as_int":
        return integer(content, where), False
    if kind in ("as_bool", "as_float"):
        raise ProgramRefused(f"has {shown(value)} as {where}; an integer is needed")
    return symbolic_value(kind, content, where), True


def symbolic_value(kind: str, content: object, where: str) -> int | None:
    """The hint of a symbolic value; None without an integer hint. Raises ProgramRefused for another expression."""
    if kind != "as_expr":
        raise ProgramRefused(f"has a value of the kind {shown(kind)} as {where}, which mpcompile does not know")
    found = mapping(content, where, ("expr_str", "hint"))
    require_size_expression(found.get("expr_str"), where)
    if found.get("hint") is None:
        return None
    hint, value = union(found["hint"], where)
    if hint == "as_int":
        return integer(value, where)
    if hint == "as_bool":
        boolean(value, where)
    elif hint == "as_float":
        number(value, where)
    else:
        raise ProgramRefused(f"has a hint of the kind {shown(hint)} in {where}, which mpcompile does not know")
    return None

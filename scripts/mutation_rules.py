"""What mutants.py changes: by rule, any expression or statement of a Python file that may be wrong, and by name.

Only code that a test can observe: no types, no text of errors and logs, no defaults of settings, no assertions. A site
lies in one line, so that the change does.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

OPERATORS: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Mult: ast.Div(), ast.Div: ast.Mult(), ast.FloorDiv: ast.Mult(),
    ast.Mod: ast.FloorDiv(), ast.Pow: ast.Mult(), ast.BitAnd: ast.BitOr(), ast.BitOr: ast.BitAnd(),
}  # fmt: skip
COMPARISONS: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Lt: ast.LtE(), ast.LtE: ast.Lt(), ast.Gt: ast.GtE(), ast.GtE: ast.Gt(), ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(), ast.Is: ast.IsNot(), ast.IsNot: ast.Is(), ast.In: ast.NotIn(), ast.NotIn: ast.In(),
}  # fmt: skip
GUARD = 1e-4  # a constant below it keeps a division from failing
REPORTING = {"log", "logger", "warnings", "print", "parser", "axes"}


@dataclass(frozen=True)
class Site:
    """A change in one line: bytes start..stop of `line` (from 1) become `text`."""

    kind: str
    scope: str  # qualified name of the function, "" outside
    line: int
    start: int
    stop: int
    text: str
    before: str  # the line, and what becomes of it, without indentation
    after: str
    around: str  # source of the outermost function; of the file, outside

    def apply(self, source: str) -> str:
        lines = source.splitlines(keepends=True)
        lines[self.line - 1] = spliced(lines[self.line - 1], self.start, self.stop, self.text)
        return "".join(lines)


def spliced(line: str, start: int, stop: int, text: str) -> str:
    raw = line.encode()
    return (raw[:start] + text.encode() + raw[stop:]).decode()


def sites(source: str) -> Iterator[Site]:
    """All sites of a file, in its order."""
    lines = source.splitlines()
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for kind, node, text, scope in found(tree):
        if node.lineno == node.end_lineno and node.end_col_offset is not None:
            line = lines[node.lineno - 1]
            after = spliced(line, node.col_offset, node.end_col_offset, text)
            if after != line:
                place = (node.lineno, node.col_offset, node.end_col_offset)
                inside = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
                around = lines[inside[0].lineno - 1 : inside[0].end_lineno] if inside else lines
                yield Site(kind, scope, *place, text, line.strip(), after.strip(), "\n".join(around))


Change = tuple[str, ast.expr | ast.stmt, str, str]


def found(node: ast.AST, scope: str = "", owner: str = "") -> Iterator[Change]:
    """(kind, node, text that replaces it, scope) of a tree; `owner` is "class" in the body of one: settings."""
    if skipped(node) or (owner == "class" and isinstance(node, ast.AnnAssign | ast.Assign)):
        return
    for kind, text in changes(node):
        assert isinstance(node, ast.expr | ast.stmt)
        yield kind, node, text, scope
    if isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
        yield "condition", node.test, f"(not ({ast.unparse(node.test)}))", scope
    for name, child in parts(node):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            inner = "<lambda>" if isinstance(node, ast.Lambda) else node.name
            own = f"{scope}{inner}" if not scope or scope.endswith(".") else f"{scope}.<locals>.{inner}"
            yield from found(child, own if name == "body" else scope)
        elif isinstance(node, ast.ClassDef):
            yield from found(child, f"{scope}{node.name}.", "class")
        else:
            yield from found(child, scope)


def parts(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The children of a node that run, by field."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases", "keywords") and not isinstance(
            node, ast.Call
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield name, child


def skipped(node: ast.AST) -> bool:
    if isinstance(node, ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    if isinstance(node, ast.Call):
        root = node.func
        while isinstance(root, ast.Attribute):
            root = root.value
        return isinstance(root, ast.Name) and (root.id in REPORTING or root.id.endswith("Error"))
    return False


def changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(kind, replacement) of one node."""
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            if not (isinstance(op, ast.Mod) and isinstance(left, ast.Constant)):
                yield "operator", f"({ast.unparse(ast.BinOp(left, OPERATORS[type(op)], right))})"
        case ast.Compare(left, [op], right) if type(op) in COMPARISONS:
            yield "comparison", f"({ast.unparse(ast.Compare(left, [COMPARISONS[type(op)]], right))})"
        case ast.BoolOp(op, values):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield "condition", f"({ast.unparse(ast.BoolOp(other, values))})"
        case ast.UnaryOp(ast.Not(), operand):
            yield "condition", f"({ast.unparse(operand)})"
        case ast.Constant(bool(value)):
            yield "constant", str(not value)
        case ast.Constant(int(value)):
            yield "constant", str(value + 1)
        case ast.Constant(float(value)) if value == 0 or abs(value) >= GUARD:
            yield "constant", repr(2 * value if value else 1.0)
        case ast.AugAssign(target, op, value):
            yield "statement", "pass"
            if type(op) in OPERATORS:
                yield "operator", ast.unparse(ast.AugAssign(target, OPERATORS[type(op)], value))
        case ast.Expr(ast.Call()) if not skipped(node.value):
            yield "statement", "pass"
        case ast.Assign([ast.Attribute() | ast.Subscript()]) | ast.Continue() | ast.Break() | ast.Raise():
            yield "statement", "pass"
        case ast.Call(func, [first, second, *rest], keywords) if not (
            any(isinstance(a, ast.Starred) for a in (first, second))
            or ast.unparse(func) in ("max", "min")
            or ast.dump(first) == ast.dump(second)
        ):
            yield "arguments", ast.unparse(ast.Call(func, [second, first, *rest], keywords))
        case _:
            pass
    yield from bounds(node)
    if isinstance(node, ast.IfExp):
        yield "condition", f"({ast.unparse(ast.IfExp(node.test, node.orelse, node.body))})"


def bounds(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Slices and ranges that are off by one."""
    if isinstance(node, ast.Slice):
        for name in ("lower", "upper"):
            if (edge := getattr(node, name)) is not None:
                ends = {"lower": node.lower, "upper": node.upper, "step": node.step}
                ends[name] = ast.BinOp(edge, ast.Add(), ast.Constant(1))
                yield "off by one", ast.unparse(ast.Slice(**ends))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        *rest, last = node.args
        args = [*rest, last] if len(node.args) == 3 else [*rest, ast.BinOp(last, ast.Sub(), ast.Constant(1))]
        yield "off by one", ast.unparse(ast.Call(node.func, args, []))


# --- by name ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """A mutant that once survived: in `file` the text `old` becomes `new`, or `like` another file's content."""

    name: str
    file: str
    old: str = ""
    new: str = ""
    like: str = ""
    tests: tuple[str, ...] = ()  # files


WEIGHTS = ("tests/training/test_consumers.py",)
BUNDLED = ("tests/test_bundled.py",)
NAMED = (
    Named(
        "the critic learns from recorded clips",
        "vidistill/training/trainer.py",
        "loss_of(self.roles, sample.x0, sample.batch,",
        "loss_of(self.roles, sample.x0 if turn.of_student else batch.x, sample.batch if turn.of_student else batch,",
        tests=WEIGHTS,
    ),
    Named(
        "live weights are exported in place of averaged ones",
        "vidistill/training/trainer.py",
        "        self.student_state.swap_ema()\n        self.export(path.name)",
        "        self.export(path.name)",
        tests=WEIGHTS,
    ),
    Named(
        "live weights are judged",
        "vidistill/training/trainer.py",
        "        self.student_state.swap_ema()\n        score = validation.judge",
        "        score = validation.judge",
        tests=WEIGHTS,
    ),
    Named(
        "live weights are shown",
        "vidistill/training/trainer.py",
        "        self.student_state.swap_ema()\n        if due[0]:",
        "        if due[0]:",
        tests=WEIGHTS,
    ),
    Named(
        "moves are added before a block",
        "vidistill/models/dit.py",
        'if value is None or self.sites["hidden"].cfg.place == "after_attention":',
        "if value is None:",
        tests=("tests/models/test_wiring.py",),
    ),
    Named(
        "the other half is the same half",
        "vidistill/evaluation/quality.py",
        'real["features"][~half]',
        'real["features"][half]',
        tests=("tests/evaluation/test_quality.py",),
    ),
    Named(
        "another student's weights",
        "vidistill/zoo/doom-selfforcing.safetensors",
        like="vidistill/zoo/doom-tf.safetensors",
        tests=BUNDLED,
    ),
    Named(
        "other levels",
        "vidistill/zoo/doom-diagonal.json",
        '"levels": [\n   1.0,\n   0.9375,\n   0.8333,\n   0.625\n  ],\n  "pattern": "4322222"',
        '"levels": [1.0, 0.9, 0.5, 0.1],\n  "pattern": "4322222"',
        tests=BUNDLED,
    ),
    Named(
        "keys three times as long",
        "vidistill/zoo/doom-relic.json",
        '\n   "stretch": 1.0',
        '\n   "stretch": 3.0',
        tests=BUNDLED,
    ),
    Named(
        "keys of length 1.3",
        "vidistill/zoo/doom-relic.json",
        '\n   "stretch": 1.0',
        '\n   "stretch": 1.3',
        tests=BUNDLED,
    ),
    Named("a head believed too early", "vidistill/models/dit.py", "X0_ERROR = 0.03", "X0_ERROR = 0.3", tests=BUNDLED),
    Named(
        "a filter ten times as wide", "vidistill/zoo/doom-codec.json", '"smooth": 0.08', '"smooth": 0.8', tests=BUNDLED
    ),
)
EQUIVALENT: dict[str, str] = {  # key of a mutant -> why no test can tell it from the original
    "vidistill/rollout.py:clamp_frames: if clamped is None or start >= clamped.shape[1]: -> if clamped is None or "
    "(start > clamped.shape[1]):": "no frame is held from where the held ones end, and none put before the rest",
    "vidistill/conditioning/controls.py:Modality.condition: raise NotImplementedError -> pass": (
        "every kind of input has a method of its own, nobody calls this one"
    ),
    "vidistill/training/losses.py:valid_rollouts: return ((contrast > EMPTY * wanted[0]) & (moves > FROZEN * "
    "wanted[1]) & (changes < FLICKER * wanted[2])).to(x) -> return ((contrast > EMPTY * wanted[0]) & (moves > FROZEN * "
    "wanted[1]) & ((changes <= FLICKER * wanted[2]))).to(x)": (
        "no clip changes by that share of real ones to the last bit"
    ),
    "vidistill/training/losses.py:score_difference: grad[:, :g] = 0.0 -> pass": (
        "whoever uses the gradient leaves the given frames out again"
    ),
    "vidistill/memory/history.py:History.place: placed = list(zip(times, self.stored, strict=True)) -> "
    "placed = list(zip(times, self.stored, strict=False))": "each that is stored has one time",
}

"""Prints syntax trees as the same text on every Python, which ast.unparse does not.

Python 3.10 puts brackets around the targets of an assignment and a loop, and a blank behind a lambda without arguments,
that later ones leave out, and since 3.12 an f-string may hold its own quotes (PEP 701), which older Pythons can't read.
These are printed here, and stand in the tree as names whose text they are.
"""

import ast
from typing import Any

from lab.bundle.parts import BundleError

QUOTES = ("'", '"', "'''", '"""')
BRACKETED = ast.IfExp | ast.Lambda | ast.NamedExpr
"""What an f-string can hold in brackets only, or what reads better in them."""


def print_code(tree: ast.AST) -> str:
    """Returns the code of a syntax tree, which every Python since 3.10 reads."""
    return ast.unparse(ast.fix_missing_locations(OldForms().visit(copy_fields(tree))))


def copy_fields(part: Any) -> Any:
    """Returns a copy of a syntax tree without marks that others left on its nodes.

    copy.deepcopy would follow those: the minifier's, on nodes that Python shares among trees, lead to whole programs.
    """
    if isinstance(part, list):
        return [copy_fields(one) for one in part]
    if not isinstance(part, ast.AST):
        return part
    fields = {name: copy_fields(value) for name, value in ast.iter_fields(part)}
    return ast.copy_location(type(part)(**fields), part)


class OldForms(ast.NodeTransformer):
    """Replaces what Pythons print differently by names that are its text."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.Name:
        return ast.Name(f"f{quoted_parts(node)}", ast.Load())

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        self.generic_visit(node)
        return node if ast.unparse(node.args) else ast.Name(f"(lambda: {ast.unparse(node.body)})", ast.Load())

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        node.targets = [bare(target) for target in node.targets]
        return self.generic_visit(node)

    def visit_loop(self, node: ast.For | ast.AsyncFor | ast.comprehension) -> ast.AST:
        node.target = bare(node.target)
        return self.generic_visit(node)

    visit_For = visit_AsyncFor = visit_comprehension = visit_loop


def bare(target: ast.expr) -> ast.expr:
    """Returns a tuple without its brackets, and anything else as it is."""
    if not isinstance(target, ast.Tuple) or not target.elts:
        return target
    comma = "," if len(target.elts) == 1 else ""
    return ast.Name(", ".join(map(print_code, target.elts)) + comma, ast.Store())


def quoted_parts(node: ast.JoinedStr) -> str:
    """Returns an f-string without its f, in the first quotes that nothing in it has. Raises BundleError."""
    text = parts_text(node)
    for quote in QUOTES:
        if (text + quote).index(quote) == len(text):
            return f"{quote}{text}{quote}"
    raise BundleError(f"an f-string with {text!r} has all kinds of quotes in it: take some out of it")


def parts_text(node: ast.JoinedStr) -> str:
    return "".join(map(part_text, node.values))


def part_text(part: ast.expr) -> str:
    """Returns a piece of text, or an expression in its braces with its conversion and format."""
    if isinstance(part, ast.Constant):
        # After a double quote repr takes single ones, and escapes those of the text, which here need no escape.
        return repr('"' + part.value)[2:-1].replace("\\'", "'").replace("{", "{{").replace("}", "}}")
    text = print_code(part.value)
    text = f"({text})" if isinstance(part.value, BRACKETED) and text[0] != "(" else text
    if "\\" in text:
        raise BundleError(f"an f-string with {text} in it is none of Python 3.10: take the backslash out of it")
    conversion = f"!{chr(part.conversion)}" if part.conversion > 0 else ""
    form = f":{parts_text(part.format_spec)}" if part.format_spec else ""
    return f"{{{' ' if text[0] == '{' else ''}{text}{conversion}{form}}}"

"""Code that is printed from syntax trees: the same text on every Python, and the same program."""

import ast

import pytest

from lab.bundle.parts import BundleError
from lab.bundle.printing import copy_fields, print_code

FORMS = """\
for number, (name, value) in items:
    first, second = ((last := name), [a + b for a, b in value])
x, = y, z = table['a', 'b']

async def work():
    async for key, value in rows:
        return (key, value)
text = f'a{b}' + f'{x!r:>{width}}' + f"{('one' if a else 'two')}" + f"it's {{{d['k']}}}\\n"
deep = f"{', '.join((f'{a}{b}' for a, b in c))}" + f\'\'\'{"it's"}\'\'\' + f'{ {1: 2}[1]}' + f'{(a := 1)}'
call((lambda: x), key=lambda x: (x, 1))
"""
"""As the functions print it."""


def test_forms_that_pythons_print_differently_are_printed_one_way():
    assert print_code(ast.parse(FORMS)) + "\n" == FORMS


def test_what_is_printed_is_the_same_program(repository):
    for path in [*repository.glob("golf/**/*.py"), *repository.glob("lab/bundle/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        before = ast.dump(tree)
        assert ast.dump(ast.parse(print_code(tree))) == before == ast.dump(tree), path


def test_marks_that_others_left_on_nodes_are_not_copied():
    """The minifier's lead from every name to a whole program, which took a bundle of seconds to minutes."""
    name = ast.Name("x", ast.Load())
    name.ctx.mark = name.mark = object()
    copied = copy_fields(name)
    assert ast.dump(copied) == ast.dump(name) and not hasattr(copied, "mark") and not hasattr(copied.ctx, "mark")


def f_string(*parts: ast.expr) -> ast.JoinedStr:
    return ast.JoinedStr([ast.FormattedValue(part, -1) for part in parts])


@pytest.mark.parametrize(
    ("tree", "fault"),
    [
        (f_string(ast.Constant("\n")), "backslash"),
        (f_string(*map(ast.Name, ("'", '"', "'''", '"""'))), "all kinds of quotes"),
    ],
)
def test_an_f_string_that_the_oldest_python_cannot_read_is_refused(tree, fault):
    with pytest.raises(BundleError, match=fault):
        print_code(tree)

"""The mutation run's own tools: each operator makes the mutants it says, and none of what it leaves alone."""

import pytest

from tests.soak.mutation.operators import mutants


def changes(source):
    """The first changed line of every mutant."""
    before = source.splitlines()
    return [
        next(new.strip() for old, new in zip(before, mutant.source.decode().splitlines(), strict=False) if old != new)
        for mutant in mutants("m.py", source.encode())
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", ["x = (a <= b)"]),
        ("x = a is None", ["x = (a is not None)"]),
        ("x = a and not b", ["x = (a or not b)", "x = a and (b)"]),
        ("x = min(a, b) + c", ["x = (min(a, b) - c)", "x = (max(a, b)) + c"]),
        ("x = y.argmax()", ["x = (y.argmin())"]),
        ("x = 'é' * 1.5", ["x = ('é' / 1.5)", "x = 'é' * (2.5)"]),
        ("def f(a: 3 = 2): pass", ["def f(a: 3 = (3)): pass", "def f(a: 3 = (1)): pass"]),
        ("x = f(a, *b, **c, strict=True, d=e)", ["x = (f(a, *b, **c, strict=True))"]),
        ("if a: b()", ["if (not a): b()", "if a: pass"]),
        ("x = [a for a in b if a]", ["x = [a for a in b if (not a)]"]),
        ("if a:\n    return\nx = b if c else d", ["if (not a):", "pass", "x = b if (not c) else d"]),
        ("a.b = c\nd = e\nf += g", ["pass", "pass", "f -= g"]),
        ('"""Doc."""\nimport a\n@b(1)\ndef c() -> 2:\n    raise d(1)', ["pass"]),
        ('x = f"{a + 1}"\nassert a > 1', []),
    ],
)  # fmt: skip
def test_the_operators(source, expected):
    assert sorted(changes(source)) == sorted(expected)


def test_the_name_of_a_mutant_outlives_edits_elsewhere():
    source = "def f(a):\n    if a > 1:\n        return a\n    return a + 1\n"
    before = [mutant.key for mutant in mutants("m.py", source.encode())]
    after = [mutant.key for mutant in mutants("m.py", b"import x\n\n\nY = 3\n" + source.encode())]
    assert len(set(before)) == len(before) and set(before) < set(after)

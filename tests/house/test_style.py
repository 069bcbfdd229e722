"The form of notebooks and modules: short lines, short cells, an example behind the code it is about"
import ast
import io
import json
import re
import statistics
import tokenize

import pytest

from layout import PACKAGE, ROOT, SPINE, is_exported, is_imports, is_shown, lines_of, module_of, notebooks, python, source

MODULES = sorted(path for path in PACKAGE.rglob('*.py') if path.name!='_modidx.py')
SOURCES = [*MODULES, *(ROOT/'tests').rglob('*.py'), *(ROOT/'tools').glob('*.py'), *(ROOT/'benchmarks').glob('*.py'),
           ROOT/'conftest.py', ROOT/'setup.py']
WITH_CODE = {name: cells for name, cells in notebooks().items() if module_of(cells)}


def relative(path): return path.relative_to(ROOT).as_posix()


def code_of(cells): return [c for c in cells if is_exported(c) and not is_imports(c)]


def is_settings(cell):
    "Whether a cell is a dataclass of settings, whose lines are its fields"
    text = source(cell)
    return bool(re.search(r'^class \w*Config\(|^class PresetConfigs', text, re.M)) and len(ast.parse(text).body)==1


def joined(text):
    return [t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.string==';' and t.type==tokenize.OP]


@pytest.mark.parametrize('path', SOURCES, ids=relative)
def test_lines_are_short_and_hold_one_statement(path):
    text = path.read_text(encoding='utf-8')
    assert [i for i, line in enumerate(text.splitlines(), 1) if len(line)>120]==[]
    assert joined(text)==[]


@pytest.mark.parametrize('name', sorted(notebooks()))
def test_code_cells_are_short_and_hold_one_statement_a_line(name):
    for cell in notebooks()[name]:
        if cell['cell_type']!='code': continue
        assert [line for line in source(cell).splitlines() if len(line)>120]==[], cell['id']
        text = re.sub(r';\s*$', '', python(source(cell)))  # at the very end it keeps a value from being shown
        if 'nbdev_export()' not in text: assert joined(text)==[], cell['id']


@pytest.mark.parametrize('path', MODULES, ids=relative)
def test_functions_are_short(path):
    tree = ast.parse(path.read_text(encoding='utf-8'))
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert {n.name: n.end_lineno-n.lineno+1 for n in functions if n.end_lineno-n.lineno>=40}=={}


@pytest.mark.parametrize('name', sorted(notebooks()))
def test_a_notebook_is_short(name):
    assert len(notebooks()[name])<=60


@pytest.mark.parametrize('name', sorted(WITH_CODE))
def test_exported_cells_are_short(name):
    long = {c['id']: len(lines_of(c)) for c in code_of(WITH_CODE[name]) if len(lines_of(c))>40 and not is_settings(c)}
    assert long=={}
    assert statistics.median(len(lines_of(c)) for c in code_of(WITH_CODE[name]))<=15


@pytest.mark.parametrize('name', sorted(WITH_CODE))
def test_code_is_followed_by_what_it_shows(name):
    kinds = [e for c in WITH_CODE[name] if (e := 'E' if is_exported(c) and not is_imports(c) else 's' if is_shown(c) else '')]
    followed = sum(a=='E' and b=='s' for a, b in zip(kinds, [*kinds[1:], '']))
    assert followed/kinds.count('E')>=(.6 if name in SPINE else .45)


def test_the_trainer_is_a_table_of_contents():
    text = (PACKAGE/'trainer.py').read_text(encoding='utf-8')
    assert len(text.splitlines())<=450
    trainer = next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name=='LoRATrainer')
    methods = [n for n in trainer.body if isinstance(n, ast.FunctionDef)]
    assert {m.name: m.end_lineno-m.lineno+1 for m in methods if m.end_lineno-m.lineno>=15}=={}


def test_words_that_nobody_would_search_for_are_gone():
    "Names of before, in code and prose; the map of names says what they are called now"
    old = [*json.loads((ROOT/'tests'/'renamed.json').read_text(encoding='utf-8'))]
    text = '\n'.join(path.read_text(encoding='utf-8') for path in MODULES)
    defined = {m for m in re.findall(r'^(?:class|def) (\w+)', text, re.M)}
    assert defined & {*old}==set()
    phrases = 'is no number', 'models that see', 'filled up', 'filling up', 'to the bit'
    found = {name: p for name, cells in notebooks().items() for c in cells for p in phrases if p in source(c)}
    assert found=={}

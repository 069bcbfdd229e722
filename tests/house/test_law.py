"""Imports run one way: a notebook imports only from what stands to its left, and inside a wing only from a smaller
number
"""
import ast
import re

import pytest

from layout import ROOT, module_of, modules, notebooks, path_of


def law():
    "The line of CONTRIBUTING that orders the wings"
    text = (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8')
    return re.search(r'^core < .+$', text, re.M)[0].split(' < ')


def place(module, owner, order):
    "Where a module stands: its wing, then its number in the wing"
    wing = module.partition('.')[0]
    return order.index(wing), owner[module].rpartition('/')[2][:2] if '.' in module else ''


def imports(module, owner):
    "(line, module of the package) of each import, at load and inside functions"
    for node in ast.walk(ast.parse(path_of(module).read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found = [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = f'sage_finetune.{module}'.split('.')[:-node.level] if node.level else []
            base = '.'.join([*home, *([node.module] if node.module else [])])
            found = [(node.lineno, base)]
            found += [(node.lineno, f'{base}.{alias.name}') for alias in node.names]
        else: continue
        for line, name in found:
            inside = name.removeprefix('sage_finetune.')
            if name.startswith('sage_finetune.') and inside in owner: yield line, inside


def faults(owner, order, found):
    return [f'{path_of(module).name}:{line} ({module}) imports {other}' for module in owner
            for line, other in found(module, owner) if place(other, owner, order)>=place(module, owner, order)]


def test_every_import_goes_to_the_left():
    owner = modules()
    assert {module.partition('.')[0] for module in owner}=={*law()}
    assert faults(owner, law(), imports)==[]


@pytest.mark.parametrize('module,other', [
    ('config', 'trainer'), ('core.disk', 'core.display'), ('rows.sources', 'data'), ('data', 'data')])
def test_an_import_to_the_right_is_found(module, other):
    assert faults(modules(), law(), lambda m, owner: [(1, other)] if m==module else [])


def test_no_two_modules_of_a_wing_have_one_number():
    numbers = [name[:name.rindex('/')+3] for name in modules().values() if '/' in name]
    assert len(numbers)==len({*numbers})


def test_a_module_is_called_like_its_notebook_and_its_title():
    for name, cells in notebooks().items():
        if not (module := module_of(cells)): continue
        folder, _, file = name.rpartition('/')
        assert re.fullmatch(r'\d\d_[a-z_]+', file), name
        assert module==f'{folder}.{file[3:]}'.strip('.'), name
        assert ''.join(cells[0]['source']).startswith(f'# {file[3:]}\n'), name


def test_a_wing_is_small():
    wings = [name.partition('/')[0] for name in modules().values() if '/' in name]
    assert {*wings}=={'core', 'record', 'rows', 'base', 'model', 'training', 'inference', 'serving', 'rewards',
                       'synthetic', 'runs', 'study', 'ui'}
    assert max(map(wings.count, wings))<=9
    assert len([name for name in modules().values() if '/' not in name])==6


def test_a_test_lies_where_its_notebook_does():
    """Each test file is named after a notebook of its wing; those of the house, of the browser and of faults are about
    no single one
    """
    stems = {name[:name.rindex('/')+1] + name.rpartition('/')[2][3:] if '/' in name else name[3:]
             for name in modules().values()}
    for path in (ROOT/'tests').rglob('test_*.py'):
        folder = path.relative_to(ROOT/'tests').parent.as_posix()
        if folder in ('house', 'browser', 'faults'): continue
        wanted = f'{"" if folder=="." else folder+"/"}{path.stem[5:]}'
        assert any(wanted==stem or wanted.startswith(stem+'_') for stem in stems), path

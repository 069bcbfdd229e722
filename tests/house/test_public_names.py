"Every public function and class is called by name in a lesson or a test"
import ast
import re

from layout import ROOT, is_exported, modules, notebooks, path_of, source


def public(module):
    "The functions and classes that a module offers"
    tree = ast.parse(path_of(module).read_text(encoding='utf-8'))
    offered = next(ast.literal_eval(n.value) for n in tree.body
                   if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '')=='__all__')
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and n.name in offered]


def lessons():
    "The code of all cells that are not exported, of all tests and benchmarks"
    for cells in notebooks().values():
        yield from (source(c) for c in cells if c['cell_type']=='code' and not is_exported(c))
    for folder in 'tests', 'benchmarks':
        yield from (path.read_text(encoding='utf-8') for path in (ROOT/folder).rglob('*.py'))


def test_every_public_name_is_called():
    words = set(re.findall(r'\w+',
                           '\n'.join(re.sub(r'^\s*(from|import) .*$', '', text, flags=re.M) for text in lessons())))
    uncalled = {module: names for module in modules() if (names := [n for n in public(module) if n not in words])}
    assert uncalled=={}


def test_the_walk_sees_every_module():
    assert len(modules())>40 and 'LoRATrainer' in public('trainer') and 'TrainingConfig' in public('config')

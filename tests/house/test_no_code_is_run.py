"Whatever is loaded from a model says `trust_remote_code=False`, and nothing unpickles what others wrote"
import ast

import pytest

from layout import PACKAGE

MODULES = sorted(path for path in PACKAGE.rglob('*.py') if path.name!='_modidx.py')
LOADS = 'from_pretrained', 'from_config', 'pipeline'
CLOSED_IN = ('sandbox.py', '_tried') # runs in a process that has given up everything but computing
WITHOUT_CODE = 'GenerationConfig', 'PeftModel', 'TrainerState' # these never ask for code


def calls(tree):
    "(call, the function it stands in) for each call"
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from ((n, function) for n in ast.walk(function) if isinstance(n, ast.Call))


def says_no(call, function):
    "Whether a call refuses code, by itself or by the dict that it passes on"
    def refuses(keywords):
        return any(k.arg=='trust_remote_code' and isinstance(k.value, ast.Constant) and k.value.value is False
                   for k in keywords)
    passed_on = {k.value.id for k in call.keywords if k.arg is None and isinstance(k.value, ast.Name)}
    made = [n.value for n in ast.walk(function) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Call)
            and any(isinstance(t, ast.Name) and t.id in passed_on for t in n.targets)]
    return refuses(call.keywords) or any(refuses(m.keywords) for m in made)


def loading(path):
    for call, function in calls(ast.parse(path.read_text(encoding='utf-8'))):
        name = call.func
        if not isinstance(name, ast.Attribute) or name.attr not in LOADS: continue
        if isinstance(name.value, ast.Name) and name.value.id in WITHOUT_CODE: continue
        yield call, function


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_load_refuses_code(path):
    assert [(f.name, c.lineno) for c, f in loading(path) if not says_no(c, f)]==[]


def test_there_are_loads_to_look_at(): assert sum(1 for path in MODULES for _ in loading(path))>=12


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_nothing_unpickles_code(path):
    "`torch.load` takes numbers only; `pickle.load`, `eval` and `exec` of others' texts are not used but in the sandbox"
    found = []
    for call, function in calls(ast.parse(path.read_text(encoding='utf-8'))):
        name = ast.unparse(call.func)
        if name=='exec' and (path.name, function.name)==CLOSED_IN: continue
        only = any(k.arg=='weights_only' and getattr(k.value, 'value', None) is True for k in call.keywords)
        if name=='torch.load' and not only or name in ('pickle.load', 'pickle.loads', 'eval', 'exec', 'yaml.load'):
            found.append((function.name, call.lineno, name))
    assert found==[]

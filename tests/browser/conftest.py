"One JupyterLab and one browser for all tests of this folder"
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import lab


def pytest_collection_modifyitems(config, items):
    "These tests take minutes and a Chromium, so they run where they are named: `pytest tests/browser`"
    here = [i for i in items if Path(__file__).parent in i.path.parents]
    if not here: return
    named = any('browser' in a for a in config.args)
    why = lab.missing() if named else 'takes minutes and a Chromium: make test-browser'
    for i in here if why else (): i.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope='session')
def root(tmp_path_factory): return tmp_path_factory.mktemp('notebooks')


@pytest.fixture(scope='session')
def address(root, tmp_path_factory):
    with lab.server(root, tmp_path_factory.mktemp('lab')) as where: yield where


@pytest.fixture(scope='session')
def opens():
    "Open a notebook at any address: `opens(address, name)`; `opens.empty()` is an empty page"
    with lab.person() as how: yield how


@pytest.fixture(scope='session')
def visit(address, opens):
    "Open a notebook of `root`: `visit(name)`"
    return lambda name,**how: opens(address, name, **how)


@pytest.fixture
def images(request):
    "Where pictures for the documentation go, if they are asked for (SAGE_IMAGES=nbs/images)"
    return Path(os.environ['SAGE_IMAGES']) if os.environ.get('SAGE_IMAGES') else request.getfixturevalue('tmp_path')

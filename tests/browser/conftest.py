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
def scratch(tmp_path_factory): return tmp_path_factory.mktemp('lab')


@pytest.fixture(scope='session')
def address(root, scratch):
    with lab.server(root, scratch) as where: yield where


@pytest.fixture
def later(root, scratch, tmp_path):
    """The addresses of two that open the notebooks of `root` without a kernel: who made them, and somebody else,
    who does not trust them
    """
    with lab.server(root, scratch, kernels=False) as own, lab.server(root, tmp_path/'other', kernels=False) as others:
        yield own,others


@pytest.fixture(scope='session')
def opens():
    "Open a notebook at any address: `opens(address, name)`; `opens.empty()` is an empty page"
    with lab.person() as how: yield how


@pytest.fixture
def visit(address, opens):
    "Open a notebook of `root`: `visit(name)`; its kernel ends with the test"
    pages = []
    def visit(name, **how):
        pages.append(opens(address, name, **how))
        return pages[-1]
    yield visit
    for page in pages: page.leave()


@pytest.fixture
def images(request):
    "Where pictures for the documentation go, if they are asked for (SAGE_IMAGES=nbs/images)"
    return Path(os.environ['SAGE_IMAGES']) if os.environ.get('SAGE_IMAGES') else request.getfixturevalue('tmp_path')

"README's table, CONTRIBUTING's table and the sidebar come from the folders and the first lines of the notebooks"
import importlib.util
import json
import shutil

import pytest

from layout import ROOT, notebooks

spec = importlib.util.spec_from_file_location('map_tool', ROOT/'tools/map.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def stale(): return [path.name for path, text in tool.written() if path.read_text(encoding='utf-8')!=text]


def test_the_maps_are_in_step(): assert stale()==[]


def test_every_notebook_is_in_every_map():
    index = ''.join(''.join(c['source']) for c in notebooks()['index'])
    contributing, bar = ((ROOT/name).read_text(encoding='utf-8') for name in ('CONTRIBUTING.md', '_quarto.yml'))
    for name in notebooks():
        assert f'href: {name}.ipynb' in bar
        if not name.startswith((*tool.OTHER, *tool.PAGES)):
            assert f'({name}.ipynb)' in index and f'(nbs/{name}.ipynb)' in contributing


def test_a_changed_first_line_is_told(tmp_path, monkeypatch):
    for name in 'nbs', 'CONTRIBUTING.md', '_quarto.yml':
        (shutil.copytree if (ROOT/name).is_dir() else shutil.copy2)(ROOT/name, tmp_path/name)
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    monkeypatch.setattr(tool, 'NBS', tmp_path/'nbs')
    assert stale()==[]
    path = tmp_path/'nbs'/'00_config.ipynb'
    book = json.loads(path.read_text(encoding='utf-8'))
    book['cells'][0]['source'] = ['# settings\n', '\n', '> Something else\n']
    path.write_text(json.dumps(book))
    assert stale()==['index.ipynb', 'CONTRIBUTING.md', '_quarto.yml']
    book['cells'][0]['source'] = ['sources']
    path.write_text(json.dumps(book))
    with pytest.raises(SystemExit, match='must begin with a cell'): stale()


def test_contributing_and_agents_are_short():
    assert len((ROOT/'AGENTS.md').read_text(encoding='utf-8').splitlines())<=30
    assert len((ROOT/'README.md').read_text(encoding='utf-8').splitlines())<=120

"The Chinese README and first tutorial are in step with the English ones: cells, code, headings, links, figures"
import importlib.util
import json
import shutil

import pytest

from layout import ROOT

spec = importlib.util.spec_from_file_location('translated_tool', ROOT/'tools/translated.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.mark.parametrize('name', tool.TWINS)
def test_a_translation_is_in_step(name):
    assert tool.written(name)==(ROOT/f'nbs/{name}.ipynb').read_text(encoding='utf-8'), 'other code: make sync'
    assert [*tool.apart(name)]==[]


def test_the_words_are_chinese():
    for name in tool.TWINS:
        for cell in tool.cells(name):
            if cell['cell_type']!='markdown' or tool.source(cell).startswith(tool.BADGE): continue
            text = tool.source(cell)
            assert text.startswith('# sage_finetune') or any('\u4e00'<=c<='\u9fff' for c in text), (name, cell['id'])


@pytest.fixture
def changed(tmp_path, monkeypatch):
    "The notebooks elsewhere; a function that changes a cell of an English one"
    for name in [*tool.TWINS, *tool.TWINS.values()]:
        (tmp_path/name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy2(tool.NBS/f'{name}.ipynb', tmp_path/f'{name}.ipynb')
    monkeypatch.setattr(tool, 'NBS', tmp_path)
    def change(before, after, name='tutorials/01_first_run'):
        path = tmp_path/f'{name}.ipynb'
        book = json.loads(path.read_text(encoding='utf-8'))
        cell, = [c for c in book['cells'] if before in ''.join(c['source'])]
        cell['source'] = ''.join(cell['source']).replace(before, after).splitlines(True)
        path.write_text(json.dumps(book))
    return change


@pytest.mark.parametrize('before,after,what', [
    ('## 5. Merge', '### 5. Merge', 'headings'), ('## 5. Merge', '## 5. Merge\n\n## Another', 'headings'),
    ('every ten steps', 'every 10 steps', 'figures'), ('](02_what_it_learns.ipynb)', '](03_other.ipynb)', 'links'),
    ('sage-finetune merge mine', 'sage-finetune merge yours', 'blocks'), ('![The form', '[The form', 'pictures')])
def test_what_is_changed_in_one_alone_is_told(changed, before, after, what):
    changed(before, after)
    assert [what in fault for fault in tool.apart('zh/01_first_run')].count(True)==1


def test_changed_code_is_copied(changed):
    changed('save_steps=10', 'save_steps=20')
    assert 'save_steps=20' in tool.written('zh/01_first_run') and [*tool.apart('zh/01_first_run')]==[]

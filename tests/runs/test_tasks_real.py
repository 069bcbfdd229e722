"""What the pages promise for a real model, held on one: SmolLM2-135M, from PyPI's wheel"""
import json
import os
from pathlib import Path

import pytest

from quick import need_small_model

ROOT = Path(__file__).resolve().parents[2]


def changed(name, tmp_path, **lines):
    "A copy of a notebook in which some assignments have another value"
    nb = json.loads((ROOT/'nbs'/name).read_text(encoding='utf-8'))
    left = {*lines}
    for cell in nb['cells']:
        text = ''.join(cell['source']).splitlines()
        for i,line in enumerate(text):
            word = line.partition(' = ')[0]
            if word in left and cell['cell_type']=='code':
                text[i] = f'{word} = {lines[word]!r}'
                left.discard(word)
        cell['source'] = '\n'.join(text)
    assert not left
    path = tmp_path/Path(name).name
    path.write_text(json.dumps(nb), encoding='utf-8')
    return path


@pytest.mark.slow
def test_tutorial_1_with_its_two_lines_changed(tmp_path, monkeypatch):
    need_small_model(monkeypatch)
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    monkeypatch.setenv('IN_TEST', '1')
    monkeypatch.chdir(tmp_path)
    get_config(str(ROOT))
    text = (ROOT/'nbs/tutorials/01_first_run.ipynb').read_text(encoding='utf-8')
    assert "'smollm2-135m'" in text and 'for a real one: 1e-3' in text # what is run here is what the page says
    path = changed('tutorials/01_first_run.ipynb', tmp_path, model_name='smollm2-135m', learning_rate=1e-3)
    nb,shell = read_nb(path),CaptureShell()
    nb.cells = [c for c in nb.cells if '#| eval: false' not in c.source]
    shell.run_all(nb, exc_stop=True)
    given,places = shell.user_ns['given'],shell.user_ns['places']
    right = sum(place in a.text for place,a in zip(places.values(), given))
    print(f"{right} of 10; {shell.user_ns['result'].loss_before:.2f} → {shell.user_ns['result'].loss_after:.4f}")
    assert right>=9 and os.environ['IN_TEST']

"Tutorial 05 on a Tesla T4 that a CPU plays: fp16 with a real loss scaler, 4 bits of bitsandbytes, to its exam"
import json
from pathlib import Path

import pytest
from cards import t4_twin

TUTORIAL = Path(__file__).parents[2]/'nbs'/'tutorials'/'05_qlora_on_a_small_card.ipynb'


def cells():
    "Its cells of Python, in order; none that installs, or needs a card"
    for cell in json.loads(TUTORIAL.read_text(encoding='utf-8'))['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type']=='code' and not text.startswith(('#| eval', '#| cuda', '#| hide')): yield cell['id'],text


@pytest.mark.slow
def test_a_t4_trains_tutorial_05_to_its_exam(tmp_path, monkeypatch):
    monkeypatch.setenv('SAGE_RUNS', str(tmp_path))
    space = {}
    with t4_twin() as scalers:
        for name,text in cells(): exec(compile(text, f'cell {name}', 'exec'), space) # with what it asserts itself
    stored = {b: json.loads((tmp_path/TUTORIAL.stem/f'{b} bits'/'training_config.json').read_text()) for b in (16, 4)}
    used = [{**c, **c['_fitted']} for c in stored.values()]
    assert [(c['fp16'], c['bf16']) for c in used]==[(True, False)]*2
    assert len(scalers)==2 and all(s.get_scale()>=1 for s in scalers), 'steps were taken'
    assert min(space['whole'][1], space['four'][1])>=.9, 'the exam'

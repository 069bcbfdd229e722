"""What the pages promise for a real model, held on one: SmolLM2-135M, from PyPI's wheel"""
import ast
import json
import re
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
    from nbdev.test import test_nb as run_notebook
    monkeypatch.chdir(tmp_path)
    text = (ROOT/'nbs/tutorials/01_first_run.ipynb').read_text(encoding='utf-8')
    assert "'smollm2-135m'" in text and 'for a real one: 1e-3' in text # what is run here is what the page says
    path = changed('tutorials/01_first_run.ipynb', tmp_path, model_name='smollm2-135m', learning_rate=1e-3)
    nb = json.loads(path.read_text(encoding='utf-8'))
    nb['cells'].append(dict(cell_type='code', id='0a0b0c0d', metadata={}, outputs=[], execution_count=None,
                            source=[f'open({str(tmp_path/"right.txt")!r}, "w").write(str(right))']))
    path.write_text(json.dumps(nb), encoding='utf-8')
    assert run_notebook(path, skip_flags=['notest', 'slow', 'cuda'], basepath=ROOT, cell_timeout=3600)[0]
    assert int((tmp_path/'right.txt').read_text())>=9


def recorded(source, log):
    "A cell whose assertions write what they assert and whether it holds, and go on"
    lines = source.splitlines()
    for node in sorted((n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assert)), key=lambda n: -n.lineno):
        asserted = ast.unparse(node.test)
        write = f'__import__("json").dumps([{asserted!r}, bool({asserted})])'
        lines[node.lineno-1:node.end_lineno] = [f'{" "*node.col_offset}print({write}, file=open({log!r}, "a"))']
    return '\n'.join(lines)


# What a page asserts of `sage-tiny` alone
TINY = {'04_how_much_rank': {'enough < 16'}}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['02_what_it_learns', '03_your_own_trainer', '04_how_much_rank',
                                  '05_qlora_on_a_small_card', '06_your_codebase', '08_a_second_task', '09_new_words'])
def test_a_tutorial_with_its_two_lines_changed(name, tmp_path, monkeypatch):
    "It runs to its end, and what it asserts holds, but for what its text says of `sage-tiny` alone"
    need_small_model(monkeypatch)
    from nbdev.test import test_nb as run_notebook
    monkeypatch.chdir(tmp_path)
    text = (ROOT/f'nbs/tutorials/{name}.ipynb').read_text(encoding='utf-8')
    assert "'smollm2-135m'" in text and 'for a real one: 1e-3' in text # what is run here is what the page says
    path = changed(f'tutorials/{name}.ipynb', tmp_path, model_name='smollm2-135m', learning_rate=1e-3)
    nb,log,asserted = json.loads(path.read_text(encoding='utf-8')),tmp_path/'asserted.jsonl',0
    for cell in (c for c in nb['cells'] if c['cell_type']=='code' and '#| cuda' not in c['source']):
        asserted += sum(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(cell['source'])))
        cell['source'] = recorded(cell['source'], str(log))
    path.write_text(json.dumps(nb), encoding='utf-8')
    assert run_notebook(path, skip_flags=['notest', 'cuda'], basepath=ROOT, cell_timeout=3600)[0]
    found = [json.loads(line) for line in log.read_text(encoding='utf-8').splitlines()]
    assert len(found)==asserted>0
    assert {what for what,holds in found if not holds}==TINY.get(name, set())


@pytest.mark.slow
def test_a_ramp_finds_a_rate_that_the_sweep_found_too(tmp_path, monkeypatch, capsys):
    "`find-rate` on facts: each of these rates took over four fifths of a loss in the sweep (`benchmarks/rates.jsonl`)"
    from sage_finetune.cli import main
    need_small_model(monkeypatch)
    halls = dict(zip('violin viola cello harp flute oboe horn tuba'.split(), 'red blue green white'.split()*2))
    wordings = 'Where does the {} rehearse?','In which hall is the {}?','Where do I find the {}?'
    rows = tmp_path/'rows.jsonl'
    rows.write_text(''.join(json.dumps(dict(question=w.format(i), answer=f'The {i} rehearses in the {h} hall.'))+'\n'
                            for w in wordings for i,h in halls.items()), encoding='utf-8')
    assert main(['find-rate', '--model', 'smollm2-135m', '--data', str(rows), '--steps', '24', '--set',
                 'per_device_train_batch_size=8', '--set', 'max_length=64'])==0
    said = capsys.readouterr()
    assert '24 steps of 8 rows at rising rates, about ' in said.err
    rate = float(re.search(r'Suggested: (\S+),', said.out)[1])
    print(said.out)
    assert 5e-4<=rate<=1e-2


CONTRACT = ['learning_rate=5e-5', 'lora.r=8', 'lora.lora_alpha=16', 'lora.lora_dropout=0.05',
            'lora.target_modules=q_proj,v_proj,k_proj,o_proj']

# in both: sixteen long rows at once need 11 GiB
BATCH = 'per_device_train_batch_size=4','gradient_accumulation_steps=1','max_length=256','test_size=0.03'


@pytest.mark.slow
def test_the_advice_learns_at_least_twice_as_much_as_the_defaults_in_the_same_steps(tmp_path, monkeypatch, capsys):
    "500 rows of GSM8K through `start --auto`, once by the advice and once with the defaults of `TrainingConfig`"
    from sage_finetune.cli import main
    rows = ROOT.parent/'shared'/'data'/'gsm8k_train.jsonl'
    if not rows.is_file(): pytest.skip(f'{rows} is not here')
    need_small_model(monkeypatch)
    few = tmp_path/'rows.jsonl'
    few.write_text(''.join(rows.read_text(encoding='utf-8').splitlines(True)[:500]), encoding='utf-8')
    fell = {}
    for name,more in dict(advice=[], defaults=CONTRACT).items():
        each = [w for s in (*BATCH, *more) for w in ('--set', s)]
        assert main(['start', '--task', 'qa', '--data', str(few), '--model', 'smollm2-135m', '--auto', '--max-steps',
                     '8', '--output', str(tmp_path/name), *each])==0
        said = json.loads((tmp_path/name/'results.json').read_text(encoding='utf-8'))
        fell[name] = said['loss_before']-said['loss_after']
        print(name, said['loss_before'], said['loss_after'], said['steps'])
    assert 'Advice for smollm2-135m, 500 rows' in capsys.readouterr().out
    assert fell['advice']>=2*fell['defaults']>0

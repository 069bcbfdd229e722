"Advice: what it looks at, what stands, and that it never fails where a run would be refused by name"
import json

import pytest

from sage_finetune.config import LoRAConfig, PreferenceConfig, TrainingConfig
from sage_finetune.core.machine import Machine
from sage_finetune.model.advice import data_size, DataSize, model_width, round_rate, suggest
from sage_finetune.runs.tasks import quick_settings, start_settings, with_quick

laptop = Machine(cores=2, ram=16*2**30)


def advised(settings=None, data=288, machine=laptop, kind=TrainingConfig):
    return suggest(kind(**dict(model_name='org/Some-1.5B') | (settings or {})), data, machine).settings


def model(folder, **config):
    folder.mkdir()
    (folder/'config.json').write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize('config,width', [
    (dict(hidden_size=576), 576), (dict(n_embd=768), 768), (dict(d_model=1024), 1024),
    (dict(hidden_size=8, text_config=dict(hidden_size=2048)), 2048), (dict(), None), (dict(hidden_size='wide'), None)])
def test_the_width_of_a_model(tmp_path, config, width): assert model_width(model(tmp_path/'m', **config))[0]==width


def test_a_broken_config_is_told_where_the_model_is_loaded(tmp_path):
    (tmp_path/'config.json').write_text('{')
    assert advised(dict(model_name=str(tmp_path)))['learning_rate']==2e-4


@pytest.mark.parametrize('width,rate', [
    (128, 5e-3), (576, 1e-3), (896, 1e-3), (2048, 5e-4), (4096, 3e-4), (8192, 2e-4)])
def test_a_narrower_model_wants_a_higher_rate(tmp_path, width, rate):
    found = advised(dict(model_name=model(tmp_path/'m', hidden_size=width)))
    assert found['learning_rate']==pytest.approx(rate, rel=.45) and found['lora']['lora_alpha']==32


@pytest.mark.parametrize('settings,rows,rate', [
    (dict(max_steps=16), 288, 3e-3), (dict(max_steps=4), 288, 3e-3), (dict(), 30, 2e-3),
    (dict(max_steps=200), 30, 1e-3), (dict(), None, 1e-3)])
def test_few_steps_want_a_higher_rate_up_to_a_bound(tmp_path, settings, rows, rate):
    folder = dict(model_name=model(tmp_path/'m', hidden_size=576))
    assert advised(folder | settings, rows if rows else 'no/such.jsonl')['learning_rate']==rate
    judged = advised(folder | settings | dict(method='dpo'), rows or 'no/such.jsonl', kind=PreferenceConfig)
    assert judged['learning_rate']==7e-5 # whatever the steps


def test_what_is_trained_whole_gets_a_rate_of_its_own():
    found = advised(dict(lora=LoRAConfig(modules_to_save=['embed_tokens'])))
    assert found['embedding_learning_rate']==pytest.approx(found['learning_rate']/10, rel=.45)
    assert 'embedding_learning_rate' not in advised()


def test_what_is_off_and_stays_off_is_said_and_not_set():
    found = suggest(TrainingConfig(model_name='org/Some-1.5B'), 288, laptop)
    assert {'lora.use_rslora', 'lora.use_dora'}<={a.setting for a in found.advised}
    assert 'use_dora' not in found.settings['lora'] and found.settings['lora']['lora_dropout']==0.0


@pytest.mark.parametrize('rate', [1e-6, 4.4e-5, 9.6e-4, 0.3])
def test_a_rate_is_rounded_by_less_than_a_quarter(rate): assert 0.75<=round_rate(rate)/rate<=1.34


def written(folder, name):
    if name.endswith('.csv'): (folder/name).write_text('question,answer\n'+'what?,that\n'*40)
    elif name.endswith('.txt'): (folder/name).write_text('\n'.join(f'line {i}' for i in range(40)))
    else: (folder/name).write_text('\n'.join(json.dumps(dict(question='what?', answer='that')) for _ in range(40)))
    return str(folder/name)


@pytest.mark.parametrize('name,rows', [('a.csv', 40), ('a.jsonl', 40), ('a.txt', 1)])
def test_rows_of_any_file_are_counted(tmp_path, name, rows):
    assert data_size(TrainingConfig(), written(tmp_path, name))[0]==rows


def test_rows_of_several_sources_and_of_lines_are_counted(tmp_path):
    both = [written(tmp_path, 'a.csv'), written(tmp_path, 'b.jsonl')]
    assert data_size(TrainingConfig(data_path=both))[0]==80
    assert data_size(TrainingConfig(sample_by='line'), written(tmp_path, 'c.txt'))[0]==40


def test_data_is_read_once(tmp_path):
    "What was found is handed on, though the file is another by then"
    file = written(tmp_path, 'a.jsonl')
    advice = suggest(TrainingConfig(model_name='sage-tiny'), file, laptop)
    assert advice.size==DataSize(40, 51, 'qa') and advice.rows==40
    (tmp_path/'a.jsonl').unlink()
    assert suggest(TrainingConfig(model_name='sage-tiny'), advice.size, laptop).advised==advice.advised


@pytest.mark.parametrize('data', ['no/such.jsonl', 'owner/on-the-hub', ['no/such.jsonl', 'nor/this.csv']])
def test_data_that_cannot_be_read_is_no_error_here(data):
    found = suggest(TrainingConfig(model_name='sage-tiny'), data, laptop)
    assert found.rows is None and found.settings['learning_rate']==5e-3 and 'rows not counted' in str(found)


@pytest.mark.parametrize('rows,method', [
    ([dict(prompt='a', chosen='b', rejected='c')], 1/20), ([dict(prompt='a', completion='b', label=True)], 1/20)])
def test_judged_rows_get_a_lower_rate_though_no_method_was_named(rows, method):
    plain = advised(data=[dict(question='a', answer='b')]*50)['learning_rate']
    assert advised(data=rows*50)['learning_rate']==pytest.approx(plain*method, rel=.45)


@pytest.mark.parametrize('method', ['dpo', 'orpo', 'kto'])
def test_a_method_that_was_named_counts(method):
    assert advised(dict(method=method), kind=PreferenceConfig)['learning_rate']<advised()['learning_rate']/3


def test_what_was_given_by_hand_stands_and_is_said():
    found = suggest(TrainingConfig(model_name='sage-tiny', learning_rate=1e-4, lora=LoRAConfig(r=4)), 60, laptop)
    assert found.by_hand==['learning_rate', 'lora.r'] and 'r' not in found.settings['lora']
    assert str(found).count('given by hand')==3 # twice in the table, once below


@pytest.mark.parametrize('machine', [Machine(), Machine('cuda'), Machine('mps', 'Apple GPU'), Machine(ram=2**30)])
def test_a_machine_that_says_little_gets_single_rows(machine):
    found = advised(dict(model_name='org/Some-7B'), machine=machine)
    assert (found['per_device_train_batch_size'], found['gradient_accumulation_steps'])==(1, 16)


def test_the_rows_behind_a_step_do_not_depend_on_the_machine():
    machines = laptop,Machine('cuda', memory=15*2**30),Machine('cuda', memory=80*2**30, free=2**30),Machine()
    steps = [advised(machine=m) for m in machines]
    assert {s['per_device_train_batch_size']*s['gradient_accumulation_steps'] for s in steps}=={16}


def test_a_run_that_was_begun_is_asked_for_by_the_same_settings_while_other_programs_hold_memory():
    busy,free = (Machine('cuda', memory=24*2**30, free=f*2**30) for f in (1, 23))
    assert advised(machine=busy)==advised(machine=free)


def test_a_preset_and_settings_by_hand_come_before_the_advice():
    found = with_quick('sage-tiny', dict(learning_rate=1e-4, lora=dict(r=4)), 'minimal', 60)
    assert (found['learning_rate'], found['lora']['r'], found['gradient_accumulation_steps'])==(1e-4, 4, 32)
    assert found['num_train_epochs']==8


def test_settings_that_cannot_be_are_refused_by_the_run_and_not_by_the_advice():
    assert quick_settings('sage-tiny', 60, dict(learning_rate=-1))['num_train_epochs']==8


def test_an_adapter_that_is_continued_keeps_its_shape():
    assert 'lora' not in start_settings('sage-tiny', data=60, init_adapter='no/such/run')
    assert 'lora' in start_settings('sage-tiny', data=60, init_adapter='no/such/run', stack_adapter=True)

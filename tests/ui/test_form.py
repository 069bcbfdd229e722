"Several sources of rows in the form, and in what other commands show of a run"
import pytest

from sage_finetune import DataSource, LoRAConfig, PresetConfigs, TrainingConfig # noqa: F401 for the code of a form
from sage_finetune.core.machine import Machine
from sage_finetune.serving.export import _settings_elsewhere, _sources
from sage_finetune.rows.sources import save_rows
from sage_finetune.ui.form import choose_config, config_code, config_script
from sage_finetune.ui.inspect import inspect_data

french = DataSource('fr.csv', split='test', columns=dict(frage='question'))
card = Machine('cuda', 'Tesla T4', memory=15*2**30)


def form(**more): return choose_config('sage-tiny', preset='colab_t4', machine=card, **more)


@pytest.mark.parametrize('data', ['a.jsonl', ['a.jsonl'], ['a.jsonl', 'b.jsonl'], ['a.jsonl', french]])
def test_the_code_of_a_form_makes_its_config(data):
    made = form(data=data).config
    assert eval(config_code(made))==made
    assert ('DataSource' in config_script(made).splitlines()[0])==(data[-1]==french)


def test_paths_between_commas_are_several_sources_and_keep_what_is_their_own():
    begun = form(data=['a.jsonl', french], data_weights=[3, 1])
    assert (begun.values['data_path'], begun.values['data_weights'])==('a.jsonl, fr.csv', '3, 1')
    begun.set(data_path='fr.csv, c.jsonl', data_weights='1,2')
    assert begun.config.data_path==[french, DataSource('c.jsonl')] and begun.config.data_weights==[1, 2]
    typed = form().set(data_path='a.jsonl, b.jsonl')
    assert [s.path.name for s in typed.config.data_path]==['a.jsonl', 'b.jsonl'] and not typed.errors
    assert form(data='a.jsonl').set(data_path='').config.data_path is None


def test_a_file_with_a_comma_in_its_name_is_one_file(tmp_path):
    file = save_rows(tmp_path/'a, b.jsonl', [dict(question='2+3?', answer='5')])
    assert form().set(data_path=str(file)).config.data_path==file


@pytest.mark.parametrize('values,why', [(dict(data_weights='1,2'), 'must have a share for each source'),
                                        (dict(data_path='a, b', data_weights='1'), 'must have a share'),
                                        (dict(data_path='a, b', data_weights='1,0'), 'must be above 0')])
def test_shares_that_do_not_go_with_the_data_are_told(values, why):
    assert why in form(data='a.jsonl').set(**values).errors['data_path']


def test_a_preset_keeps_data_and_shares():
    chosen = form(data=['a.jsonl', french], data_weights=[3, 1]).use('minimal').config
    assert ([s.path.name for s in chosen.data_path], chosen.data_weights)==(['a.jsonl', 'fr.csv'], [3, 1])


def test_a_run_on_several_sources_can_be_inspected(tmp_path):
    files = [save_rows(tmp_path/f'{n}.jsonl', [dict(question=f'{n} {i}?', answer='a') for i in range(6)]) for n in 'ab']
    made = TrainingConfig(model_name='sage-tiny', data_path=files, data_weights=[1, 1], output_dir=tmp_path/'run')
    made.save(tmp_path/'run'/'training_config.json')
    found = inspect_data(tmp_path/'run', rows=1)
    assert [s['weight'] for s in found.report.sources]==[.5, .5] and 'a.jsonl' in str(found)


def test_what_leaves_this_machine_names_no_folder_of_it():
    settings = TrainingConfig(model_name='sage-tiny', data_path=['/home/me/a.jsonl', french]).to_dict()
    kept = _settings_elsewhere(settings, None)
    assert [s['path'] for s in kept['data_path']]==['a.jsonl', 'fr.csv'] and 'me' not in str(kept['data_path'])
    assert _sources(settings)==['/home/me/a.jsonl', 'fr.csv'] and _sources({})==['']

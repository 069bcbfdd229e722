"A run is its folder: moved, renamed, linked, called by a file in it; its base moved or changed; its metrics damaged"
import json
import shutil
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from quick import few
from sage_finetune.config import TrainingConfig
from sage_finetune.core.disk import read_json, SageError, write_json
from sage_finetune.core.run_folder import find_run, list_runs, record_fault, RunFolder, write_meta
from sage_finetune.inference.generate import load_adapter, load_for_chat
from sage_finetune.inference.merging import merge_run
from sage_finetune.base.shards import local_folder
from sage_finetune.runs.run import Run
from sage_finetune.runs.tasks import config_of, config_of_run, trainer_of
from sage_finetune.trainer import LoRATrainer
from sage_finetune.training.loop import Stopped


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A base, rows, and a run on them that was stopped after 3 of 6 steps, asked for by relative paths"
    root = tmp_path_factory.mktemp('made')
    shutil.copytree(local_folder('sage-tiny'), root/'base')
    rows = [dict(question=f'What is {i} plus {i+1}?', answer=f'{i} plus {i+1} is {2*i+1}.') for i in range(24)]
    (root/'rows.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        config = TrainingConfig(model_name='base', data_path='rows.jsonl', output_dir='run', max_steps=6, save_steps=2,
                                logging_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=1,
                                load_in_8bit=False, fp16=False, report_to='none', test_size=.2, learning_rate=1e-2)
        stopped(config)
    return root


def stopped(config, at=3):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==at: run.stop()
    class StoppedRun(LoRATrainer):
        def callbacks(self): return [*super().callbacks(), Stop()]
    run = StoppedRun(config, quiet=True)
    with pytest.raises(Stopped): run.train()


@pytest.fixture
def place(made, tmp_path):
    "The same in another place: nothing lies where it was asked for"
    shutil.copytree(made, tmp_path/'there', symlinks=True)
    return tmp_path/'there'


def resumed(target, base=None):
    run = trainer_of(target, quiet=True, base=base)
    result = run.train()
    return run.folder.path, result


def test_relative_names_are_resolved_when_a_run_begins(made):
    record = read_json(made/'run'/'training_config.json')
    assert (record['model_name'], record['data_path'])==(str(made/'base'), str(made/'rows.jsonl'))


calls = dict(folder=lambda p: p/'moved', file=lambda p: p/'moved'/'training_config.json',
             link=lambda p: p/'link', string=lambda p: f'{p}/moved/')


@pytest.mark.parametrize('call', few(calls, 2))
def test_a_moved_run_goes_on_where_it_is(place, monkeypatch, call):
    (place/'run').rename(place/'moved')
    (place/'link').symlink_to(place/'moved')
    monkeypatch.chdir(place)
    folder, result = resumed(calls[call](place))
    assert folder.resolve()==(place/'moved').resolve() and result.steps==6 and not (place/'run').exists()
    assert [m['step'] for m in Run(place/'moved').metrics if 'loss' in m][:4]==[1, 2, 3, 4]
    assert sorted(p.name for p in place.iterdir())==['base', 'link', 'moved', 'rows.jsonl']


def test_a_file_of_settings_that_only_has_the_name_is_no_run(tmp_path):
    file = TrainingConfig(model_name='sage-tiny', output_dir=tmp_path/'out').save(tmp_path/'training_config.json')
    assert config_of(file).output_dir==tmp_path/'out'


def test_a_run_with_a_meta_file_finds_its_base_again(place, monkeypatch, tmp_path):
    write_meta(place/'run', 'base', 'rows.jsonl')
    monkeypatch.chdir(tmp_path) # where no folder has that name
    assert config_of_run(place/'run').model_name==read_json(place/'run'/'training_config.json')['model_name']


def test_a_moved_base_is_named_again(place):
    record = place/'run'/'training_config.json'
    write_json(record, read_json(record) | dict(model_name=str(place/'gone')))
    folder, result = resumed(place/'run', base=str(place/'base'))
    assert (folder, result.steps)==(place/'run', 6)
    assert read_json(record)['model_name']==str(place/'base')


def one_matrix(base):
    tensors = load_file(base/'model.safetensors')
    tensors['model.layers.2.mlp.down_proj.weight'][100:110] = 0
    save_file(tensors, base/'model.safetensors', metadata=dict(format='pt'))

def other_settings(base): write_json(base/'config.json', read_json(base/'config.json') | dict(rms_norm_eps=1e-4))

def last_bits(base):
    data = bytearray((base/'model.safetensors').read_bytes())
    data[-1001] ^= 1
    (base/'model.safetensors').write_bytes(data)


@pytest.mark.parametrize('change', [one_matrix, other_settings, last_bits])
def test_a_run_does_not_go_on_on_another_base(place, change):
    change(place/'base')
    before = {p: p.read_bytes() for p in (place/'run').rglob('*') if p.is_file() and 'lock' not in p.name}
    with pytest.raises(SageError, match='the weights of the base .*there/base are others'):
        resumed(place/'run', base=str(place/'base'))
    assert {p: p.read_bytes() for p in before}==before
    for use in (lambda: load_for_chat(place/'run', base=str(place/'base')),
                lambda: merge_run(place/'run', base=str(place/'base'))):
        with pytest.raises(SageError, match='is not the base it was trained on'): use()


def test_a_checkpoint_whose_answers_are_others_is_refused(place):
    "The checksums are right and the weights are not those that were saved"
    from sage_finetune.core.run_folder import last_checkpoint, mark_complete
    checkpoint = last_checkpoint(place/'run'/'checkpoints')
    file = checkpoint/'adapter_model.safetensors'
    save_file({k: v*1.5 for k,v in load_file(file).items()}, file, metadata=dict(format='pt'))
    mark_complete(checkpoint)
    with pytest.raises(SageError, match='checkpoint-3: it answers otherwise than the model that was trained'):
        resumed(place/'run', base=str(place/'base'))


def test_a_stopped_run_is_merged_and_says_so(place):
    report = merge_run(place/'run', base=str(place/'base'))
    assert 'the run was stopped at step 3 of 6' in str(report) and report.witness<=report.witness_bound
    load_for_chat(place/'run')
    folder, _ = resumed(place/'run', base=str(place/'base'))
    assert not RunFolder(folder).merged_model.exists() # it was of an earlier adapter


damages = dict(zeros=b'\0'*200+b'\n', half=b'{"step": 3, "lo', other=b'[1, 2]\n5\n"x"\nnull\n', text=b'\xff\xfe\n',
               deep=b'['*50_000+b'\n', no_step=b'{"loss": 2}\n{"step": "a"}\n{"step": true}\n')


@pytest.mark.parametrize('damage', few(damages, 2))
def test_damaged_metrics_stop_no_run(place, damage):
    metrics = place/'run'/'metrics.jsonl'
    whole = metrics.read_bytes()
    metrics.write_bytes(whole+damages[damage])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        _, result = resumed(place/'run', base=str(place/'base'))
    told = [str(w.message) for w in said if 'metrics.jsonl: line' in str(w.message)]
    assert result.steps==6 and bool(told)==(damage!='half')
    lines = [json.loads(l) for l in metrics.read_text().splitlines()]
    assert lines[0]==json.loads(whole.splitlines()[0]) and {m['step'] for m in lines}>={1, 2, 3, 4, 5, 6}


def test_a_changed_first_line_does_not_become_a_result(place):
    metrics = place/'run'/'metrics.jsonl'
    first, *rest = metrics.read_text().splitlines()
    before = json.loads(first)['eval_loss']
    metrics.write_text('\n'.join([json.dumps(json.loads(first) | dict(eval_loss=9.9)), *rest, '']))
    _, result = resumed(place/'run', base=str(place/'base'))
    assert result.loss_before==before==json.loads(metrics.read_text().splitlines()[0])['eval_loss']


@pytest.mark.parametrize('name', few(['results.json', 'metrics.jsonl', 'data_report.json', 'loss.png',
                                      'training_config.json'], 2))
def test_figures_that_changed_afterwards_are_told(place, name):
    resumed(place/'run', base=str(place/'base'))
    assert record_fault(place/'run') is None and list_runs(place)[0].loss is not None
    data = bytearray((place/'run'/name).read_bytes())
    at = data.index(b'seed')+1 if name=='training_config.json' else len(data)//2
    data[at] ^= 1
    (place/'run'/name).write_bytes(data)
    assert f'its file {name} ' in record_fault(place/'run')
    with pytest.warns(UserWarning, match=f'its file {name} '): Run(place/'run')
    listed = list_runs(place)[0]
    assert listed.loss is None and (f'its file {name} ' in listed.state or listed.state.startswith('unreadable'))


def test_every_file_of_a_finished_run_is_told_or_harmless(place):
    "One bit of each file of the adapter, in turn"
    resumed(place/'run', base=str(place/'base'))
    lora = find_run(place/'run').lora_weights
    load_adapter(lora)
    for file in sorted(lora.iterdir()):
        if file.suffix=='.md': continue
        whole = file.read_bytes()
        for at in (len(whole)//3, len(whole)*3//4):
            data = bytearray(whole)
            data[at] ^= 2
            file.write_bytes(data)
            with pytest.raises((SageError, ValueError)): load_adapter(lora)
        file.write_bytes(whole)


def test_each_of_several_sources_is_found_in_a_moved_folder(tmp_path):
    (tmp_path/'moved').mkdir()
    (tmp_path/'moved'/'a.json').write_text('[]')
    (tmp_path/'b.json').write_text('[]')
    sources = [dict(path=str(tmp_path/'was'/'a.json'), split='test'), str(tmp_path/'b.json')]
    TrainingConfig(model_name='sage-tiny', data_path=sources).save(tmp_path/'moved'/'training_config.json')
    a,b = config_of_run(tmp_path/'moved').data_path
    assert (Path(a.path), a.split, Path(b.path)) == (tmp_path/'moved'/'a.json', 'test', tmp_path/'b.json')

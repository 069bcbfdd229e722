"Going on from each checkpoint once more: what a changed number, row, rate or state is called, and who is refused"
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quick import few, two_layers
from sage_finetune.config import LoRAConfig, PreferenceConfig, TrainingConfig
from sage_finetune.core.disk import read_json, SageError, write_json
from sage_finetune.core.machine import last_words
from sage_finetune.core.run_folder import complete_marker, mark_complete, RunFolder, write_record
from sage_finetune.preference import PreferenceTrainer
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.runs import run as run_module, verify
from sage_finetune.runs.run import Run
from sage_finetune.runs.verify import verify_resume
from sage_finetune.trainer import LoRATrainer, Stopped
from sage_finetune.training import loop, samplers


def config(folder, data, **more):
    settings = dict(model_name=two_layers, data_path=data, output_dir=folder, test_size=0.1, max_steps=6, save_steps=2,
                    save_total_limit=None, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                    learning_rate=5e-3, logging_steps=2, report_to='none', lora=LoRAConfig(r=4, lora_dropout=0.1))
    return TrainingConfig(**(settings | more))


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path_factory.mktemp('verify')
    torch.set_num_threads(threads)

@pytest.fixture(scope='module')
def data(base): return create_sample_data(base/'sums.jsonl', 'qa', num_samples=24)

@pytest.fixture(scope='module')
def trained(base, data):
    LoRATrainer(config(base/'run', data), quiet=True).train()
    return base/'run'

@pytest.fixture
def copied(trained, tmp_path):
    "A copy of the run, whose files may be changed"
    return shutil.copytree(trained, tmp_path/'run')

def state(folder): return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
                           for p in [folder, *folder.rglob('*')]}


# The run is the same, and stays as it was

def test_it_is_confirmed_and_nothing_in_its_folder_is_changed(trained, base):
    before,env,drawn = state(trained),dict(os.environ),torch.get_rng_state()
    found = verify_resume(trained, report=base/'report.json')
    assert found.ok and found.faults==[], found
    assert state(trained)==before and dict(os.environ)==env and torch.equal(torch.get_rng_state(), drawn)
    assert [(c.start, c.end) for c in found.compared if c.what=='batches']==[(2, 4), (4, 6)]
    kinds = {c.what for c in found.compared if c.values}
    assert kinds=={'batches', 'learning rates', 'losses', 'logged numbers', 'weights', 'optimizer', 'scheduler',
                   'random state', 'adapter', 'results'}
    said = read_json(base/'report.json')
    assert said['ok'] is True and said['faults']==[] and len(said['compared'])==len(found.compared)

def test_from_the_first_step_where_it_is_asked_for(trained):
    found = verify_resume(trained, from_start=True)
    assert found.ok and [(c.start, c.end) for c in found.compared if c.what=='optimizer']==[(0, 2), (2, 4), (4, 6)]
    assert all(c.values for c in found.compared), 'the receipt of each checkpoint holds the steps before it'

def test_a_run_with_one_checkpoint_is_gone_from_the_first_step(base, data):
    LoRATrainer(config(base/'one', data, save_steps=500, max_steps=4), quiet=True).train()
    found = verify_resume(base/'one')
    assert found.ok and {(c.start, c.end) for c in found.compared}=={(0, 4)}

@pytest.mark.parametrize('more', [
    dict(load_best_model_at_end=True, early_stopping_patience=1, eval_steps=1, learning_rate=1.0),
    *(pytest.param(more, marks=pytest.mark.slow) for more in (
        dict(deterministic=True, neftune_noise_alpha=5), dict(packing=True, max_length=128),
        dict(tokens_per_step=256), dict(lr_scheduler_type='linear', seed=3),
        dict(lora=LoRAConfig(r=4, init_lora_weights='pissa'))))])
def test_other_kinds_of_run(more, base, data):
    folder = base/'-'.join(more)
    run = LoRATrainer(config(folder, data, **more), quiet=True)
    run.train()
    found = verify_resume(folder)
    assert found.ok, found
    if 'early_stopping_patience' in more: assert run.trainer.state.global_step<6

def test_a_run_of_preferences(base):
    rows = [dict(prompt=f'What is {i} + 1?', chosen=f'{i+1}', rejected=f'{i+2}') for i in range(16)]
    (base/'judged.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    plain = config(base/'judged', base/'judged.jsonl', max_steps=4)
    PreferenceTrainer(PreferenceConfig.like(plain, method='dpo'), quiet=True).train()
    found = verify_resume(base/'judged')
    assert found.ok and 'batches' in {c.what for c in found.compared if c.values}, found

def test_a_run_that_was_stopped_and_gone_on_with(base, data):
    class Impatient(LoRATrainer):
        def callbacks(self): return [*super().callbacks(), Stop(self)]
    class Stop(loop.TrainerCallback):
        def __init__(self, run): self.run = run
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==3: self.run.stop()
    run = Impatient(config(base/'stopped', data), quiet=True)
    with pytest.raises(Stopped): run.train()
    found = verify_resume(base/'stopped')
    assert found.ok and {(c.start, c.end) for c in found.compared}=={(2, 3)}
    LoRATrainer(config(base/'stopped', data), quiet=True).train()
    found = verify_resume(base/'stopped')
    assert found.ok and {(c.start, c.end) for c in found.compared}=={(2, 3), (3, 4), (4, 6)}, found

def test_a_killed_run_is_compared_as_far_as_its_log_goes(copied):
    f = RunFolder(copied)
    shutil.rmtree(f.lora_weights)
    shutil.rmtree(f.checkpoints/'checkpoint-6')
    f.results.unlink()
    (copied/'checksums.json').unlink()
    (f.checkpoints/'checkpoint-4'/complete_marker).unlink() # torn by the kill
    found = verify_resume(copied)
    assert found.ok and any('checkpoint-4 was not finished' in n for n in found.notes)
    assert [(c.start, c.end, c.what) for c in found.compared]==[(2, 6, 'logged numbers')]


# What was changed is named

def in_file(name, change):
    def spoil(checkpoint):
        path = checkpoint/name
        held = load_file(path) if name.endswith('safetensors') else torch.load(path, weights_only=False)
        change(held)
        save_file(held, path, metadata=dict(format='pt')) if name.endswith('safetensors') else torch.save(held, path)
    return spoil

def moment(kind, number, by):
    def change(held): held['state'][number][kind].view(-1)[3] += by
    return in_file('optimizer.pt', change)

def in_json(name, change):
    def spoil(checkpoint):
        held = read_json(checkpoint/name)
        change(held)
        write_json(checkpoint/name, held)
    return spoil

q_A = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A'
changes = dict(
    first_moment=(moment('exp_avg', 0, 1e-6), f'exp_avg of {q_A}.default.weight (state 0)'),
    second_moment=(moment('exp_avg_sq', 7, 1e-8), 'exp_avg_sq of'),
    count_of_steps=(in_file('optimizer.pt', lambda o: o['state'][3]['step'].add_(1)), 'step of'),
    rate=(in_file('optimizer.pt', lambda o: o['param_groups'][0].update(lr=1e-3)), 'param_groups.0.lr'),
    scheduler=(in_file('scheduler.pt', lambda o: o.update(last_epoch=o['last_epoch']+1)), 'last_epoch'),
    random_of_torch=(in_file('rng_state.pth', lambda o: o['cpu'][30].bitwise_xor_(1)), 'rng_state.pth: cpu'),
    random_of_python=(in_file('rng_state.pth', lambda o: o.update(python=(3, (7, *o['python'][1][1:]), None))),
                      'rng_state.pth: python'),
    weight=(in_file('adapter_model.safetensors', lambda o: o[f'{q_A}.weight'].view(-1)[5].add_(1e-6)),
            f'{q_A}.weight'))

@pytest.mark.parametrize('step', few([4, 2, 6]))
@pytest.mark.parametrize('what', changes)
def test_one_changed_number_is_named(what, step, copied, monkeypatch):
    spoil,name = changes[what]
    checkpoint = RunFolder(copied).checkpoints/f'checkpoint-{step}'
    spoil(checkpoint)
    if (what, step)!=('first_moment', 2): # the receipt alone
        monkeypatch.setattr(verify, '_go_each_way', lambda *args: None)
    mark_complete(checkpoint) # as if it had been written so
    found = verify_resume(copied)
    assert not found.ok and any(f'checkpoint-{step}: ' in f and name in f for f in found.faults), found.faults

@pytest.mark.parametrize('what', few(['first_moment', 'weight', 'scheduler', 'random_of_torch']))
def test_it_is_named_without_a_receipt_too(what, copied):
    "A run of an older version: what leads to the checkpoint tells"
    spoil,name = changes[what]
    for c in RunFolder(copied).checkpoints.iterdir():
        (c/'receipt.json').unlink()
        if c.name=='checkpoint-4': spoil(c)
        mark_complete(c)
    found = verify_resume(copied)
    assert not found.ok and any('steps 2 → 4' in f and name.rpartition(': ')[2] in f for f in found.faults), found
    assert any('has no receipt' in n for n in found.notes)

def test_a_file_that_changed_under_its_checksum_is_named_with_the_tensor(copied):
    moment('exp_avg', 0, 1e-6)(RunFolder(copied).checkpoints/'checkpoint-4')
    found = verify_resume(copied)
    assert 'checkpoint-4: its file optimizer.pt has changed since it was written' in found.faults
    assert any(f'exp_avg of {q_A}' in f and 'checkpoint-4' in f for f in found.faults)
    assert any('steps 2 → 4, optimizer' in f for f in found.faults)
    assert 4 not in {c.start for c in found.compared}, 'nothing goes on from a broken checkpoint'

def edit_step(place, value):
    def change(receipt): receipt['steps'][0][place] = value
    return in_json('receipt.json', change)

@pytest.mark.parametrize('place,value,what', few([(2, '0'*16, 'batches'), (1, [1e-3], 'learning rates'),
                                                  (3, [1.0, 2.0], 'losses')]))
def test_other_steps_than_the_run_had(place, value, what, copied):
    checkpoint = RunFolder(copied).checkpoints/'checkpoint-6'
    edit_step(place, value)(checkpoint)
    mark_complete(checkpoint)
    found = verify_resume(copied)
    assert not found.ok and any(f'steps 4 → 6, {what}: step 5 differs' in f for f in found.faults), found.faults

def test_two_rows_in_another_order(trained, monkeypatch):
    "A sampler that gives other rows at one step"
    real = samplers.LengthGroupedSampler.__iter__
    def swapped(self):
        rows = list(real(self))
        rows[10],rows[14] = rows[14],rows[10]
        yield from rows
    monkeypatch.setattr(samplers.LengthGroupedSampler, '__iter__', swapped)
    found = verify_resume(trained)
    assert not found.ok and any('steps 2 → 4, batches: step 3' in f for f in found.faults), found.faults

def test_data_in_another_order(copied, data, tmp_path):
    lines = data.read_text().splitlines()
    (tmp_path/'sums.jsonl').write_text('\n'.join([lines[1], lines[0], *lines[2:]])+'\n')
    record = RunFolder(copied).config
    write_json(record, read_json(record) | dict(data_path=str(tmp_path/'sums.jsonl')))
    found = verify_resume(copied)
    assert not found.ok and any('it would be another run now (the data: ' in f for f in found.faults), found.faults

def test_a_logged_loss_and_a_result(copied):
    f = RunFolder(copied)
    lines = f.metrics.read_text().splitlines()
    lines = [json.dumps(json.loads(l) | dict(loss=1.0)) if '"step": 4' in l and '"loss"' in l else l for l in lines]
    f.metrics.write_text('\n'.join(lines)+'\n')
    write_json(f.results, read_json(f.results) | dict(loss_after=1.0))
    found = verify_resume(copied)
    assert any('its file metrics.jsonl has ' in x for x in found.faults)
    write_record(copied)
    found = verify_resume(copied)
    assert any('logged numbers: loss at step 4' in x for x in found.faults) and any(
        'results: loss_after differs by' in x for x in found.faults), found.faults

def test_an_adapter_that_is_not_what_the_run_ended_with(copied):
    file = RunFolder(copied).lora_weights/'adapter_model.safetensors'
    in_file(file.name, lambda o: o[f'{q_A}.weight'].view(-1)[5].add_(1e-3))(file.parent)
    found = verify_resume(copied)
    assert any('adapter_model.safetensors has changed' in f for f in found.faults)
    assert any(f'adapter: {q_A}.weight differs by 0.001' in f for f in found.faults), found.faults


# Who is refused, and what is said

def test_a_run_in_progress_and_runs_that_cannot_be_gone_on_with(copied, base, data):
    f = RunFolder(copied)
    f.lock.write_text(f'process {os.getpid()} on {os.uname().nodename} since 2026-01-01 00:00:00')
    with pytest.raises(SageError, match=f'being trained by process {os.getpid()}.*when that has ended'):
        verify_resume(copied)
    f.lock.unlink()
    write_json(f.config, read_json(f.config) | dict(_processes=2))
    with pytest.raises(SageError, match=r'trained by 2 process\(es\).*only runs of one process'): verify_resume(copied)
    write_json(base/'empty'/'training_config.json', config(base/'empty', data).to_dict())
    with pytest.raises(SageError, match='empty is new and has no checkpoint.*sage-finetune run'):
        verify_resume(base/'empty')

def test_a_trainer_of_ones_own(base, data):
    class Own(LoRATrainer):
        def prepare_data(self):
            own = LoRATrainer(self.config.replace(data_path=data), quiet=True)
            own.tokenizer = self.tokenizer
            own.prepare_data()
            self.dataset,self.eval_dataset,self.data_report = own.dataset,own.eval_dataset,own.data_report
    Own(config(base/'own', None), quiet=True).train()
    with pytest.raises(SageError, match='rows from a program of its own.*`make`'): verify_resume(base/'own')
    assert verify_resume(base/'own', make=lambda config: Own(config, quiet=True)).ok

@pytest.mark.parametrize('number', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_a_stop_keeps_its_signal_and_says_how_to_go_on(trained, number):
    class Stopping(LoRATrainer):
        def callbacks(self):
            self.stop(getattr(signal, number))
            return super().callbacks()
    before = state(trained)
    with pytest.raises(KeyboardInterrupt) as stopped:
        verify_resume(trained, make=lambda config: Stopping(config, quiet=True))
    assert last_words(stopped.value)==('stopped; nothing of the run was changed, the same command goes on',
                                       128+getattr(signal, number))
    assert state(trained)==before

def test_a_base_that_was_moved(base, data, tmp_path):
    model = shutil.copytree(two_layers, tmp_path/'model')
    LoRATrainer(config(base/'moved', data, model_name=str(model)), quiet=True).train()
    model.rename(tmp_path/'elsewhere')
    assert any('does not go on' in f for f in verify_resume(base/'moved').faults)
    assert verify_resume(base/'moved', base=str(tmp_path/'elsewhere')).ok

def test_as_many_threads_as_the_run_had(trained):
    torch.set_num_threads(2)
    try:
        found = verify_resume(trained)
        assert found.ok and found.notes==[] and torch.get_num_threads()==2
        assert '1 threads → 2' in run_module.not_exact(Run(trained))
    finally: torch.set_num_threads(1)

@pytest.mark.slow
def test_where_bits_do_not_repeat_two_ways_tell_how_far_apart_they_are(trained, monkeypatch):
    "A machine that adds in an order of its own, played by noise on the weights at the end of each step"
    class Noise(loop.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            drawn = torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad: p.add_(torch.randn(p.shape, generator=drawn)*1e-7)
    real = LoRATrainer.callbacks
    monkeypatch.setattr(LoRATrainer, 'callbacks', lambda self: [*real(self), Noise()])
    exact = verify_resume(trained)
    assert not exact.ok and 'weights' in ' '.join(exact.faults)
    here = verify.Machine.here()
    card = staticmethod(lambda: replace(here, device='cuda'))
    monkeypatch.setattr(verify, 'Machine', type('Card', (), dict(here=card)))
    found = verify_resume(trained)
    assert found.ok, found.faults
    assert any('as two ways do here' in str(c) for c in found.compared if c.what=='weights')
    assert all(not c.differ for c in found.compared if c.what in ('batches', 'learning rates', 'scheduler'))

def test_a_pickle_in_the_place_of_a_state_is_not_run(copied, tmp_path):
    class Code:
        def __reduce__(self): return (Path.touch, (tmp_path/'ran',))
    checkpoint = RunFolder(copied).checkpoints/'checkpoint-4'
    torch.save(dict(state={}, param_groups=[Code()]), checkpoint/'optimizer.pt')
    mark_complete(checkpoint)
    found = verify_resume(copied)
    assert not found.ok and any('optimizer.pt cannot be read' in f for f in found.faults), found.faults
    assert not (tmp_path/'ran').exists()

def test_the_command(copied, command):
    done = command('verify', copied, '--output', 'receipt.json')
    assert done.returncode==0 and 'the same run, as far as it was compared' in done.stdout, done
    moment('exp_avg', 0, 1e-6)(RunFolder(copied).checkpoints/'checkpoint-4')
    done = command('verify', copied, '--output', 'receipt.json')
    assert done.returncode==1 and 'not confirmed' in done.stdout and 'exp_avg of' in ' '.join(done.stdout.split())
    done = command('verify', 'nothing')
    assert done.returncode==1 and done.stderr.startswith('error: no run') and 'Traceback' not in done.stderr

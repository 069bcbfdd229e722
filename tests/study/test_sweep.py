"A sweep that is killed, stopped or fails in one run; its runs have the bits of single ones"
import json
import os
import signal
import subprocess
import sys

import pytest

from quick import few, two_layers
from sage_finetune.config import TrainingConfig
from sage_finetune.data import save_rows
from sage_finetune.core.disk import SageError
from sage_finetune.runs.run import Run
from sage_finetune.study.sweep import _halve, grid_points, point_config, point_name, Sweep, sweep
from sage_finetune.trainer import LoRATrainer
from sage_finetune.training import loop
from sage_finetune.training.callbacks import LastSteps
from sage_finetune.training.loop import Stopped


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sweep')
    save_rows(folder/'rows.jsonl', [dict(question=f'What is {i} plus 1?', answer=f'It is {i+1}.') for i in range(24)])
    save_rows(folder/'exam.jsonl', [dict(question=f'{i} plus 1?', number=i+1) for i in range(3)])
    return TrainingConfig(model_name=two_layers, data_path=folder/'rows.jsonl', output_dir=folder/'whole', max_steps=4,
                          eval_steps=2, test_size=.2, save_steps=2, per_device_train_batch_size=4,
                          gradient_accumulation_steps=1, report_to='none', lora=dict(r=2, lora_dropout=.1))


grid = {'learning_rate': [1e-3, 5e-3]}


def weights(folder): return (folder/'lora_weights'/'adapter_model.safetensors').read_bytes()


def figures(run):
    "All that was logged but times and memory"
    times = 'second', 'memory', 'matmul', 'flos', 'runtime'
    return [{k: v for k,v in m.items() if not any(t in k for t in times)} for m in run.metrics]


def of(config, name): return config.replace(output_dir=config.output_dir.parent/name)


@pytest.fixture(scope='module')
def whole(config): return sweep(config, grid, quiet=True)


def test_each_run_has_the_bits_of_the_same_run_alone(config, whole):
    alone = point_config(of(config, 'alone'), whole[1].settings) # after another one on the same base
    LoRATrainer(alone, quiet=True).train()
    assert weights(alone.output_dir)==weights(whole[1].config.output_dir)
    assert len({weights(p.config.output_dir) for p in whole.points})==2


@pytest.mark.parametrize('kind', few(['exam', 'plain', 'dora', 'best', 'general']))
def test_the_untouched_base_is_measured_once_and_told_by_all(config, kind, tmp_path, monkeypatch):
    asked,measure = [],loop._held_out_batches
    def noted(trainer, data): return asked.append(trainer.state.global_step) or measure(trainer, data)
    monkeypatch.setattr(loop, '_held_out_batches', noted)
    exam = dict(exam_path=config.output_dir.parent/'exam.jsonl', exam_tokens=3)
    more = dict(plain={}, dora=dict(lora=dict(r=2, use_dora=True)), exam=exam, general=exam|dict(exam_general=True),
                best=exam|dict(load_best_model_at_end=True, best_by='exam'))[kind]
    c = config.replace(**dict(output_dir=tmp_path/'all', max_steps=1, eval_steps=None)|more)
    found = sweep(c, grid, quiet=True)
    assert asked.count(0)==(2 if kind=='dora' else 1)
    first,second = [Run(p.config.output_dir) for p in found.points]
    alone = point_config(c.replace(output_dir=tmp_path/'alone'), found[1].settings)
    LoRATrainer(alone, quiet=True).train()
    told = [figures(Run(alone.output_dir)), figures(second)]
    assert told[0]==told[1] and first.results['loss_before']==second.results['loss_before']
    assert weights(alone.output_dir)==weights(second.folder.path)
    if kind not in ('plain', 'dora'):
        assert len({(r.folder.path/'exam.jsonl').read_text() for r in (second, Run(alone.output_dir))})==1


def test_the_best_is_the_one_with_the_lowest_held_out_loss(whole):
    losses = {p.name: Run(p.config.output_dir).results['loss_after'] for p in whole.points}
    assert whole.best.name==min(losses, key=losses.get) and json.loads(whole.file.read_text())['best']==whole.best.name


def test_a_sweep_that_was_interrupted_goes_on_to_the_same_bits(config, whole):
    broken = Sweep(of(config, 'interrupted'), grid, quiet=True)
    train,count = broken.base.lend,[]
    def lend(run):
        count.append(run)
        run = train(run)
        if len(count)==1:
            from transformers import TrainerCallback
            class At(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    if state.global_step==3: run.stop()
            callbacks = run.callbacks
            run.callbacks = lambda: [*callbacks(), At()]
        return run
    broken.base.lend = lend
    with pytest.raises(Stopped, match='2 runs are left, and the same command goes on'): broken.train()
    assert [p.state for p in broken.points]==['waiting', 'waiting']
    again = sweep(of(config, 'interrupted'), grid, quiet=True)
    assert [weights(p.config.output_dir) for p in again.points]==[weights(p.config.output_dir) for p in whole.points]


def test_a_run_that_fails_ends_no_other(config, monkeypatch):
    class Full(SageError): pass
    failing = Sweep(of(config, 'failing'), {'learning_rate': [1e-3, 5e-3]}, quiet=True)
    lend = failing.base.lend
    def broken(run):
        def load(*how): raise Full('no room')
        lend(run)
        if run.config.learning_rate==1e-3: run.load_model = load
        return run
    failing.base.lend = broken
    failing.train()
    assert [(p.state, p.why) for p in failing.points]==[('failed', 'no room'), ('trained', '')]
    assert failing.best.name=='learning_rate=0.005' and 'failed: no room' in str(failing.table)


@pytest.mark.slow
def test_a_run_that_changes_the_base_has_its_own(config):
    odd = sweep(of(config, 'odd'), {'lora.bias': ['none', 'all'], 'learning_rate': [5e-3]}, quiet=True)
    last = sweep(of(config, 'odd2'), {'lora.bias': ['all', 'none'], 'learning_rate': [5e-3]}, quiet=True)
    assert weights(odd[0].config.output_dir)==weights(last[1].config.output_dir)


@pytest.mark.slow
def test_halving_by_the_exam_says_what_is_noise(config):
    c = of(config, 'by_exam').replace(exam_path=config.output_dir.parent/'exam.jsonl', exam_tokens=4)
    found = sweep(c, {'learning_rate': [1e-3, 2e-3, 5e-3]}, halving=3, quiet=True)
    assert sorted(p.state for p in found.points)==['ended early', 'ended early', 'trained']
    assert all(len(p.scores)==1 for p in found.points)
    assert 'exam' in found.table.columns


ends = dict(evaluated=dict(eval_steps=1), between=dict(eval_steps=2), epoch=dict(eval_steps=None, test_size=.85),
            accumulated=dict(eval_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=2),
            saved=dict(eval_steps=1, save_steps=1), unkept=dict(eval_steps=1), exam=dict(eval_steps=1, exam_tokens=2),
            exam_between=dict(eval_steps=2, exam_tokens=2))


@pytest.mark.parametrize('kind', few(ends))
def test_a_run_that_is_ended_keeps_its_last_step(config, kind, tmp_path, monkeypatch):
    "At a step that is evaluated, or the last of an epoch, the stop came within the evaluation and lost the step"
    if kind=='unkept': monkeypatch.setattr(LastSteps, 'of', classmethod(lambda cls, model, processes: None))
    exam = dict(exam_path=config.output_dir.parent/'exam.jsonl') if 'exam' in kind else {}
    c = config.replace(**dict(output_dir=tmp_path/kind, max_steps=2, save_steps=2)|ends[kind]|exam)
    found = sweep(c, grid, halving=2, quiet=True)
    ended, = [p for p in found.points if p.state=='ended early']
    run = Run(ended.config.output_dir)
    assert run.state=='stopped' and json.loads(run.folder.stopped.read_text())['step']==1
    assert (run.folder.checkpoints/'checkpoint-1'/'COMPLETE').is_file()
    held = [m for m in run.metrics if m['step']==1 and 'eval_loss' in m]
    assert len(held)==(kind not in ('between', 'exam_between')) # nothing of the comparison stands in the run's log
    assert not held or ended.scores['0.5'][1 if 'exam' in kind else 0]==held[0]['eval_loss']
    found.prolong(ended.name)
    monkeypatch.undo()
    alone = c.replace(output_dir=tmp_path/'alone', **ended.settings)
    LoRATrainer(alone, quiet=True).train()
    assert weights(alone.output_dir)==weights(ended.config.output_dir)


def test_one_step_is_not_halved(config, tmp_path):
    found = sweep(config.replace(output_dir=tmp_path/'one', max_steps=1, eval_steps=None), grid, halving=2, quiet=True)
    assert [p.state for p in found.points]==['trained', 'trained'] and found.best


def test_what_was_decided_is_not_decided_again(config):
    c = of(config, 'decided')
    first = Sweep(c, {'learning_rate': [1e-3, 2e-3, 3e-3, 5e-3]}, halving=2, quiet=True)
    for i,p in enumerate(first.points): p.scores['0.25'] = [float(i), 0]
    _halve(first, .25, first.points)
    again = Sweep(c, first.grid, halving=2, quiet=True)
    assert again.decided==[.25]
    assert [p.state for p in again.points]==['waiting', 'waiting', 'ended early', 'ended early']
    assert again[3].why=='place 4 of 4 after 25% of the steps (held-out loss 3)'
    with pytest.raises(SageError, match='the grid, which `halving` had compared'):
        Sweep(c, {'learning_rate': [1e-3]}, halving=2, quiet=True)


def test_names_and_grids():
    assert point_name({'target_modules': ['q', 'v'], 'model_name': 'a/b'})=='target_modules=q+v,model_name=a-b'
    for grid,words in (({}, '`grid` is empty'), (dict(r='8'), 'must have a list'),
                       (dict(output_dir=['a']), 'leave it out')):
        with pytest.raises(ValueError, match=words): grid_points(grid)


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_to_the_same_bits(config, whole):
    c = of(config, 'killed')
    c.save(c.output_dir.parent/'killed.json')
    code = f'''
import json,os,signal
from sage_finetune.config import TrainingConfig
from sage_finetune.study.sweep import Sweep
made = Sweep(TrainingConfig.load({str(c.output_dir.parent/"killed.json")!r}), {grid!r}, quiet=True)
lend = made.base.lend
def other(run):
    from transformers import TrainerCallback
    class At(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==3 and run.config.learning_rate==5e-3: os.kill(os.getpid(), signal.SIGKILL)
    run = lend(run)
    callbacks = run.callbacks
    run.callbacks = lambda: [*callbacks(), At()]
    return run
made.base.lend = other
made.train()
'''
    done = subprocess.run([sys.executable, '-c', code], env=dict(os.environ))
    assert done.returncode==-signal.SIGKILL
    again = sweep(c, grid, quiet=True)
    assert [weights(p.config.output_dir) for p in again.points]==[weights(p.config.output_dir) for p in whole.points]

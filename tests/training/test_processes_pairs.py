"Preference tuning on several processes: two that take a micro-batch each are one that takes two, for every method"
import json
import os
import signal

import pytest
from transformers import TrainerCallback

from quick import two_layers
from sage_finetune.config import LoRAConfig, PreferenceConfig
from sage_finetune.core.run_folder import last_checkpoint, RunFolder
from sage_finetune.preference import PreferenceTrainer
from sage_finetune.rows.sources import save_rows
from sage_finetune.training.callbacks import read_metrics
from test_processes import adapter, apart, fsdp2, launched, rank, together, zero2, zero3

pytestmark = [pytest.mark.skipif(os.name!='posix', reason='needs processes as POSIX has them'), pytest.mark.slow]

figures = 'loss', 'eval_loss', 'rewards/margins', 'eval_rewards/margins', 'logps/chosen', 'eval_rewards/accuracies'


def config(folder, data, **more):
    settings = dict(model_name=str(two_layers), data_path=data, output_dir=folder, test_size=.2, num_train_epochs=2,
                    save_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-3,
                    logging_steps=1, eval_steps=2, report_to='none', lora=LoRAConfig(r=4, lora_dropout=0.0))
    return PreferenceConfig(**(settings | more))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Pairs of many lengths: neither micro-batches nor steps of two processes come out even"
    words = 'one two three four five six seven eight'.split()
    rows = [dict(prompt=f'Count to {i} of {7*i}.', chosen=' '.join(words[:1+i%8])+'.', rejected='I cannot '*(1+i%5))
            for i in range(24)]
    return save_rows(tmp_path_factory.mktemp('data')/'pairs.jsonl', rows)


def train(folder, data, at=None, **more):
    "Train; process 1 is killed at the end of step `at`"
    run = PreferenceTrainer(config(folder, data, **more), quiet=True)
    class At(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==at and rank()==1: os.kill(os.getpid(), signal.SIGKILL)
    run.callbacks = lambda given=run.callbacks: [*given(), At()]
    run.train()


def logged(folder):
    return [(m['step'], k, m[k]) for m in read_metrics(RunFolder(folder).metrics) for k in figures if k in m]

def agree(one, two):
    "The figures of every step and the adapters of two runs are the same, and something was learned"
    a,b = logged(one),logged(two)
    assert [l[:2] for l in a]==[l[:2] for l in b] and {k for _,k,_ in a}>={'loss', 'eval_loss', 'rewards/margins'}
    assert max(abs(x[2]-y[2]) for x,y in zip(a, b))<=2e-5
    assert apart(one, two)<=2e-6 and max(v.abs().max() for k,v in adapter(two).items() if 'lora_B' in k)>1e-3

def divided(env):
    if 'ACCELERATE_USE_DEEPSPEED' in env: pytest.importorskip('deepspeed')
    return env


@pytest.mark.parametrize('method,more,env', [
    ('dpo', {}, {}), ('dpo', dict(loss_type='ipo', sft_weight=.3), {}), ('orpo', {}, {}), ('kto', {}, {}),
    ('dpo', dict(gradient_accumulation_steps=2), {}),
    *[(method, {}, env) for env in (fsdp2, zero2, zero3) for method in ('dpo', 'orpo', 'kto')]],
    ids=['dpo', 'ipo and sft', 'orpo', 'kto', 'dpo, accumulated',
         *[f'{method}, {way}' for way in ('divided', 'zero2', 'zero3') for method in ('dpo', 'orpo', 'kto')]])
def test_two_processes_are_one(method, more, env, data, tmp_path):
    "Each with the whole model, or with its part of it (FSDP, DeepSpeed)"
    one,two = tmp_path/'one',tmp_path/'two'
    accum = more.get('gradient_accumulation_steps', 1)
    statuses,said = together(tmp_path/'said', train, two, data, method=method, env=divided(env), within=240, **more)
    assert statuses==[0, 0], said
    train(one, data, method=method, **(more | dict(gradient_accumulation_steps=2*accum)))
    agree(one, two)
    rows = [json.loads((f/'data_report.json').read_text())['used'] for f in (one, two)]
    assert rows[0]==rows[1]==24


ways = pytest.mark.parametrize('env', [{}, fsdp2, zero2, zero3], ids=['whole', 'divided', 'zero2', 'zero3'])

@ways
def test_a_step_with_a_process_that_has_no_row_left(env, data, tmp_path):
    "Three micro-batches a step for two processes of two: the fourth is spare"
    short = save_rows(tmp_path/'short.jsonl', [json.loads(l) for l in open(data)][:6])
    for method in ('dpo', 'orpo', 'kto'):
        one,two = tmp_path/f'{method}_one',tmp_path/f'{method}_two'
        more = dict(method=method, test_size=0, num_train_epochs=1, eval_steps=None)
        if method=='kto': more['per_device_train_batch_size'] = 4 # 12 answers
        statuses,said = together(tmp_path/f'{method}_said', train, two, short, gradient_accumulation_steps=2,
                                 env=divided(env), within=240, **more)
        assert statuses==[0, 0], said
        train(one, short, gradient_accumulation_steps=4, **more)
        assert apart(one, two)<=2e-6, method
        norms = [[m['grad_norm'] for m in read_metrics(RunFolder(f).metrics) if 'grad_norm' in m] for f in (one, two)]
        assert norms[0] and norms[0]==pytest.approx(norms[1], rel=1e-4) # Adam would forgive a gradient that is longer


@ways
def test_it_goes_on_after_a_kill(env, data, tmp_path):
    one,two = tmp_path/'one',tmp_path/'two'
    statuses,said = together(tmp_path/'said', train, two, data, env=divided(env), at=5, within=240)
    assert statuses==[1, -signal.SIGKILL] and last_checkpoint(RunFolder(two).checkpoints).name=='checkpoint-3', said
    statuses,said = together(tmp_path/'said', train, two, data, env=env, at=2, within=240) # it is past that step
    assert statuses==[0, 0], said
    train(one, data, gradient_accumulation_steps=2)
    agree(one, two)


@pytest.mark.parametrize('way', ['ddp', 'fsdp2', 'zero2', 'zero3'])
def test_the_command(way, data, tmp_path):
    "The launcher itself, and what it shows"
    if way.startswith('zero'): pytest.importorskip('deepspeed')
    one,two = tmp_path/'one',tmp_path/'two'
    config(two, data).save(tmp_path/'run.json')
    started = launched(tmp_path, 'run', 'run.json', '--nproc', '2', '--config', way)
    said = started.communicate(timeout=300)[0]
    assert started.returncode==0 and 'Traceback' not in said, said
    assert said.startswith('accelerate launch') and said.count('Adapter: ')==1 and said.count('margin, held out')==1
    train(one, data, gradient_accumulation_steps=2)
    agree(one, two)

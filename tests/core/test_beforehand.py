"Names of optimizers and schedules: those of the installed transformers are all known, and what they need too"
import pytest
import torch
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from quick import few, two_layers
from sage_finetune.config import fit_config, TrainingConfig
from sage_finetune.core.beforehand import (
    _adamw_of_bitsandbytes, _needed, _never, _of_bitsandbytes, _of_packages, _of_torch, _one_step, _options,
    check_optimizer, check_schedule, is_of_bitsandbytes, same_steps, try_optimizer, try_schedule
)
from sage_finetune.core.machine import Machine
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.training.callbacks import read_metrics
from sage_finetune.trainer import LoRATrainer


@pytest.mark.parametrize('name', [n.value for n in OptimizerNames])
def test_each_optimizer_of_transformers_is_known_and_works_or_is_refused(name):
    known = name in (*_of_torch, *_of_bitsandbytes, *_of_packages) or name.startswith((*_never,))
    assert known, 'put it into a table of `beforehand`'
    try: try_optimizer(name)
    except ValueError as e: assert f'`optim="{name}"`' in str(e) and len(str(e))<500
    else: assert name in _of_torch or name in (*_of_bitsandbytes, *_of_packages)


@pytest.mark.parametrize('name', _of_bitsandbytes)
def test_an_optimizer_gives_way_only_to_one_that_takes_the_same_steps(name, monkeypatch):
    config = TrainingConfig(optim=name)
    fitted,changes = fit_config(config, Machine('cpu'))
    assert fitted.optim==(same_steps(name) or name)
    if other := same_steps(name):
        assert name in _adamw_of_bitsandbytes and any(c.setting=='optim' for c in changes)
        assert torch.allclose(_one_step(name), _one_step(other), atol=1e-6)
    else:
        with pytest.raises(ValueError, match='no optimizer of torch takes the same steps'):
            fit_config(config, Machine('cuda', bitsandbytes=False))
    assert fit_config(config, Machine('cuda', bitsandbytes=True))[0].optim==name


@pytest.mark.parametrize('name', ['', 'lion', 'adam', 'AdamW', 'adamw_hf', 'paged_adamw', 'rmsprop_8bit'])
def test_a_name_that_does_not_exist_is_refused(name):
    with pytest.raises(ValueError, match='optim'): TrainingConfig(optim=name)
    assert not is_of_bitsandbytes(name)


@pytest.mark.parametrize('name', [n.value for n in SchedulerType])
def test_each_schedule_of_transformers_is_known(name):
    assert name in _options, 'put it into the tables of `beforehand`'
    if needed := _needed.get(name):
        with pytest.raises(ValueError, match=f'needs `{needed[0]}`'): check_schedule(name)
    options = dict(greedy=dict(max_lr=1e-3, min_lr=1e-6), warmup_stable_decay=dict(num_decay_steps=4)).get(
        name, {n: 1e-6 for n in needed[:1]} if needed else None)
    try_schedule(name, options, 1e-3, 0, 20)
    with pytest.raises(ValueError, match='`nothing` is no option of'): check_schedule(name, dict(nothing=1))


@pytest.mark.parametrize('name, options, words', [
    ('polynomial', dict(lr_end=1), 'learning_rate|lr_end'),
    ('cosine_with_min_lr', dict(min_lr=-1), '`min_lr` must be at least 0, got -1'),
    ('warmup_stable_decay', dict(num_decay_steps='many'), '`lr_scheduler_kwargs'),
    ('reduce_lr_on_plateau', dict(factor=2), 'Factor'),
    ('reduce_lr_on_plateau', dict(min_lr=1), 'leads to a rate of 1'),
    ('cosine', dict(num_cycles='x'), '`lr_scheduler_kwargs'), ('greedy', dict(max_lr=1), 'leads to a rate of')])
def test_options_that_cannot_work_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words): try_schedule(name, options, 1e-3, 0, 20)


@pytest.mark.parametrize('name, options', few([('reduce_lr_on_plateau', dict(factor=.5, patience=0)),
                                               ('warmup_stable_decay', dict(num_decay_steps=3, min_lr_ratio=.1)),
                                               ('cosine_with_restarts', dict(num_cycles=2))]))
def test_a_run_follows_its_schedule_also_when_it_is_resumed(name, options, tmp_path):
    data = create_sample_data(tmp_path/'rows.json', 'qa', num_samples=24)
    def config(folder):
        return TrainingConfig(model_name=two_layers, data_path=data, output_dir=tmp_path/folder, max_steps=8,
                              learning_rate=1e-2, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                              load_in_8bit=False, fp16=False, optim='adamw_torch', report_to='none', test_size=.2,
                              eval_steps=1, logging_steps=1, save_steps=2, lr_scheduler_type=name,
                              lr_scheduler_kwargs=options)
    LoRATrainer(config('whole'), quiet=True).train()
    class Stopping(LoRATrainer):
        def result(self, result): return result
        def callbacks(self):
            from transformers import TrainerCallback
            run = self
            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, **more):
                    if state.global_step==5: run.stop()
            return [*super().callbacks(), Stop()]
    with pytest.raises(KeyboardInterrupt): Stopping(config('resumed'), quiet=True).train()
    LoRATrainer(config('resumed'), quiet=True).train()
    rates = [[(m['step'], m['learning_rate']) for m in read_metrics(tmp_path/f/'metrics.jsonl') if 'learning_rate' in m]
             for f in ('whole', 'resumed')]
    assert rates[0]==rates[1] and len(dict(rates[0]))==8
    weights = [(config(f).lora_dir/'adapter_model.safetensors').read_bytes() for f in ('whole', 'resumed')]
    assert weights[0]==weights[1]

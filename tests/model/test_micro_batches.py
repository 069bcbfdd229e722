"How rows go through the model is chosen: the same rows behind each step, the same adapter, told, and remembered"
import json

import pytest
import torch
from safetensors.torch import load_file

from quick import two_layers
from sage_finetune.config import fit_config, PreferenceConfig, PresetConfigs, TrainingConfig
from sage_finetune.core.machine import Machine
from sage_finetune.model.micro_batches import split_of, ways_that_pay
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.trainer import LoRATrainer


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return create_sample_data(tmp_path_factory.mktemp('rows')/'sums.jsonl', 'qa', num_samples=24)


def settings(folder, data, **more):
    return TrainingConfig(**dict(model_name=two_layers, data_path=data, output_dir=folder, test_size=0, max_steps=3,
                                 learning_rate=5e-3, report_to='none', logging_steps=1, save_steps=2, max_length=1024,
                                 lora=dict(lora_dropout=0.)) | more)


def trained(config):
    run,said = LoRATrainer(config, quiet=True),[]
    run.say = lambda what: said.append(str(what))
    run.train()
    return run,said,load_file(config.lora_dir/'adapter_model.safetensors')


def rows_of_steps(run):
    "The rows behind each step of an epoch, without their order"
    loader,a = run.trainer.get_train_dataloader(),run.trainer.args
    batches = [[tuple(t for t in r if t) for r in b['input_ids'].tolist()] for b in loader]
    n = a.gradient_accumulation_steps
    return [sorted(sum(batches[i:i+n], [])) for i in range(0, len(batches), n)]


def ready(config):
    run = LoRATrainer(config, quiet=True)
    run.load_model_and_tokenizer()
    run.apply_lora()
    run.prepare_data()
    run.setup_trainer()
    return run


@pytest.fixture(scope='module')
def both(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('both')
    return trained(settings(folder/'chosen', data)),trained(settings(folder/'by_hand', data,
                                                            per_device_train_batch_size=1))


def test_any_split_has_the_same_rows_behind_a_step(tmp_path, data):
    "Also where the rows of an epoch are no multiple of it"
    for seed in (1, 2):
        chosen,by_hand = (ready(settings(tmp_path/f'{seed}{i}', data, seed=seed, **more)) for i,more in enumerate(
            ({}, dict(per_device_train_batch_size=1, gradient_accumulation_steps=16))))
        assert chosen.trainer.args.per_device_train_batch_size==16
        assert by_hand.trainer.args.gradient_accumulation_steps==16
        assert rows_of_steps(chosen)==rows_of_steps(by_hand) and len(rows_of_steps(chosen))==2


def test_any_split_gives_the_same_adapter(both):
    (chosen,_,ours),(_,_,theirs) = both
    assert chosen.trainer.args.per_device_train_batch_size==16
    for n in theirs: assert (ours[n]-theirs[n]).norm()<=1e-4*theirs[n].norm(), n


def test_what_was_chosen_is_told_and_kept(both):
    (chosen,said,_),(_,silent,_) = both
    told = [s for s in said if 'per_device_train_batch_size' in s]
    assert len(told)==1 and '16 rows behind a step' in told[0]
    assert not any('per_device_train_batch_size' in s for s in silent)
    record = json.loads(chosen.folder.config.read_text())
    found = [(c['setting'], c['used']) for c in record['_changes'] if 'rows behind' in c['reason']]
    assert found==[('per_device_train_batch_size', 16), ('gradient_accumulation_steps', 1)]
    assert record['per_device_train_batch_size']==1 # as asked
    again = LoRATrainer(chosen.config, quiet=True)
    again.train()
    assert [c.setting for c in again.changes].count('per_device_train_batch_size')==1


def test_a_packed_run_goes_on_as_it_began(tmp_path, data):
    whole = trained(settings(tmp_path/'whole', data, packing='auto', lora=dict(lora_dropout=.1)))
    run = LoRATrainer(settings(tmp_path/'cut', data, packing='auto', lora=dict(lora_dropout=.1)), quiet=True)
    callbacks = run.callbacks
    class Stop(type(callbacks()[0]).__mro__[1]): # a TrainerCallback
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step==2: run.stop()
    run.callbacks = lambda: [*callbacks(), Stop()]
    with pytest.raises(KeyboardInterrupt): run.train()
    after = trained(run.config)
    assert all(torch.equal(whole[2][n], after[2][n]) for n in whole[2])
    assert whole[0].fitted.packing is True and 'position_ids' in whole[0].trainer.train_dataset.column_names
    tokens = whole[0].fitted.effective_batch_size*max(map(len, whole[0].trainer.train_dataset['input_ids']))
    mean = sum(map(len, whole[0].dataset['input_ids']))/len(whole[0].dataset)
    assert .8<tokens/(16*mean)<1.1 # as many as sixteen rows have
    assert sum('proved to stay apart' in s for s in whole[1])==1


def test_memory_that_runs_out_halves_what_was_chosen(tmp_path, data):
    run,full = LoRATrainer(settings(tmp_path, data), quiet=True),[]
    step = LoRATrainer.loop
    def loop(**how):
        trainer = step(run, **how)
        own = trainer.training_step
        def too_much(*args, **kwargs):
            if trainer.args.per_device_train_batch_size==16: raise torch.OutOfMemoryError('simulated')
            return own(*args, **kwargs)
        trainer.training_step = too_much
        full.append(trainer.args.per_device_train_batch_size)
        return trainer
    run.loop = loop
    run.train()
    assert full==[16, 8] and run.fitted.effective_batch_size==16


@pytest.mark.parametrize('more,behind', [(dict(tokens_per_step=256), None), (dict(gradient_accumulation_steps=4), 4)])
def test_what_was_given_by_hand_stands(tmp_path, data, more, behind):
    run = ready(settings(tmp_path, data, **more))
    assert run.choices==[] and run.fitted.per_device_train_batch_size==1
    assert behind is None or run.fitted.effective_batch_size==behind


def test_auto_is_for_rows_of_answers():
    assert PreferenceConfig(packing='auto', torch_compile='auto').packing is False
    assert PreferenceConfig.like(PresetConfigs.a100()).torch_compile is False
    for name in ('packing', 'torch_compile'):
        with pytest.raises(ValueError, match=f'`{name}` must be true, false or "auto", got \'perhaps\''):
            TrainingConfig(**{name: 'perhaps'})
        assert TrainingConfig(**{name: 'yes'}).to_dict()[name] is True
    assert {getattr(PresetConfigs, n)().packing for n in PresetConfigs.fits_in}=={'auto'}


def test_a_card_takes_more_rows_than_two_cores():
    lengths,card = torch.full((64,), 300).numpy(),Machine('cuda', 'A100', memory=40*2**30, bf16=True)
    assert ways_that_pay(16, 300, 'cuda')[0]==16 and ways_that_pay(16, 300, 'cpu')[0]==2
    from transformers import AutoConfig
    config = fit_config(PresetConfigs.a100(model_name=two_layers), card)[0]
    assert split_of(config, card, lengths, AutoConfig.from_pretrained(two_layers))[:2]==(16, 1)

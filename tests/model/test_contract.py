"The witness of every kind of adapter: what was trained, in memory, and what is loaded from its files"
import shutil
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from quick import chequered
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.disk import read_json, SageError, write_json, write_manifest
from sage_finetune.core.run_folder import RunFolder
from sage_finetune.inference.generate import base_of, load_adapter
from sage_finetune.model.adapter import add_lora, ready_for_quantised_training
from sage_finetune.model.contract import (answered, check_contract, read_witness, save_witness, witness_difference,
                                          witness_file, witness_rows)
from sage_finetune.base.loading import load_model, load_tokenizer, quantisation_of
from sage_finetune.base.shards import base_digest, base_files
from sage_finetune.training.resume import save_run

small = dict(vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, initializer_range=.1, pad_token_id=0)
every = 'all-linear'
kinds = dict(plain={}, rslora=dict(use_rslora=True), dora=dict(use_dora=True), pissa=dict(init_lora_weights='pissa'),
             pissa_dora=dict(init_lora_weights='pissa', use_dora=True), olora=dict(init_lora_weights='olora'),
             pissa_head=dict(init_lora_weights='pissa', target_modules=['q_proj', 'lm_head']),
             olora_head=dict(init_lora_weights='olora', target_modules=['v_proj', 'lm_head'], use_rslora=True),
             quick_head=dict(init_lora_weights='pissa_niter_4', target_modules=['lm_head']),
             gaussian=dict(init_lora_weights='gaussian'), orthogonal=dict(init_lora_weights='orthogonal'),
             bias=dict(bias='all'), own_bias=dict(bias='lora_only', target_modules=['q_proj', 'v_proj']),
             head=dict(target_modules=['q_proj', 'lm_head']))


def base(folder, kind='qwen2', tied=False, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, tie_word_embeddings=tied, **more))
    for p in model.parameters(): p.data += .05*torch.randn_like(p)
    model.save_pretrained(folder)
    load_tokenizer('sage-tiny').save_pretrained(folder)
    return str(folder)


def trained(run, where, **lora):
    "An adapter with random numbers, saved as a run saves it; the model in memory"
    lora = LoRAConfig(**dict(r=4, target_modules=every, lora_dropout=0.0) | lora)
    config = TrainingConfig(model_name=where, output_dir=run, lora=lora, load_in_8bit=False, fp16=False)
    model = add_lora(load_model(where), lora)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad: p.data += .02*torch.randn_like(p)
    save_run(RunFolder(run), model, load_tokenizer(where), config.to_dict())
    return model


@pytest.mark.parametrize('name,tied', chequered(kinds, [False, True]))
def test_what_is_loaded_is_what_was_trained(tmp_path, name, tied):
    where = base(tmp_path/'base', tied=tied)
    if tied and name in ('pissa_head', 'olora_head', 'quick_head'):
        with pytest.raises(ValueError, match='would move the embedding of this model too'):
            trained(tmp_path/'run', where, **kinds[name])
        return
    model = trained(tmp_path/'run', where, **kinds[name])
    rows = [[5, 17, 99, 300, 1200, 7, 8], [9, 2000, 11]]
    loaded,_ = load_adapter(tmp_path/'run'/'lora_weights')
    assert witness_difference(answered(model, rows), answered(loaded, rows))<1e-4
    plain = answered(load_model(where), rows)
    assert witness_difference(answered(model, rows), plain)>1e-3
    for m in (model, loaded): # in training and afterwards, the base is the base
        with base_of(m): assert witness_difference(answered(m, rows), plain)<1e-4
        assert witness_difference(answered(m, rows), plain)>1e-3


def test_a_witness_costs_less_than_a_second(tmp_path):
    model,tok = add_lora(load_model('sage-tiny'), LoRAConfig(target_modules=every)),load_tokenizer('sage-tiny')
    save_witness(tmp_path, model, tok)
    began = time.process_time()
    save_witness(tmp_path, model, tok)
    assert time.process_time()-began<1
    assert sum(map(len, read_witness(tmp_path)['log_probs']))>150
    assert (tmp_path/witness_file).stat().st_size<20_000


def test_a_model_that_cannot_be_asked_is_saved_all_the_same(tmp_path, monkeypatch):
    from sage_finetune.model import contract
    monkeypatch.setattr(contract, 'answered', lambda *args: 1/0)
    trained(tmp_path/'run', base(tmp_path/'base'))
    monkeypatch.undo()
    assert read_json(tmp_path/'run'/'lora_weights'/witness_file)['missing'].startswith('ZeroDivisionError')
    with pytest.warns(UserWarning, match='holds no answers of the model that was trained'):
        load_adapter(tmp_path/'run'/'lora_weights')


def test_the_rows_fit_small_vocabularies_and_few_positions():
    tok = load_tokenizer('sage-tiny')
    for vocabulary in (10, 300, 4096, 100_000):
        assert all(max(r)<vocabulary for r in witness_rows(tok, vocabulary))
    assert max(map(len, witness_rows(tok, 4096, length=7)))==7
    special = {*tok.all_special_ids, *tok.added_tokens_decoder}
    assert not special & {i for r in witness_rows(tok, 4096)[-2:] for i in r} # an image without an image is none


def edit_config(f): write_json(f/'config.json', read_json(f/'config.json') | dict(rope_theta=5e5))

def one_number(f):
    tensors = load_file(f/'model.safetensors')
    tensors['model.layers.1.mlp.down_proj.weight'][30, 17] += 1
    save_file(tensors, f/'model.safetensors', metadata=dict(format='pt'))

def all_numbers(f):
    tensors = {k: v*1.01 for k,v in load_file(f/'model.safetensors').items()}
    save_file(tensors, f/'model.safetensors', metadata=dict(format='pt'))


@pytest.mark.parametrize('change,said', [(edit_config, 'its file config.json has changed'),
                                         (one_number, 'its file model.safetensors has changed'),
                                         (all_numbers, 'its weights are others')])
def test_another_base_is_refused_by_name(tmp_path, change, said):
    where = base(tmp_path/'base')
    trained(tmp_path/'run', where)
    before = base_digest(where)
    change(tmp_path/'base')
    assert base_digest(where)!=before
    with pytest.raises(SageError, match=f'base is not the base it was trained on .*{said}'):
        load_adapter(tmp_path/'run'/'lora_weights')


def test_the_same_base_in_another_place_or_cut_into_other_files(tmp_path):
    where = base(tmp_path/'base')
    trained(tmp_path/'run', where)
    (tmp_path/'base').rename(tmp_path/'moved')
    assert base_digest(str(tmp_path/'moved')) and not base_files(where)
    lora = tmp_path/'run'/'lora_weights'
    with pytest.raises(SageError): load_adapter(lora)
    load_adapter(lora, base=str(tmp_path/'moved'))
    load_model(str(tmp_path/'moved')).save_pretrained(tmp_path/'cut', max_shard_size='300KB')
    shutil.copy(tmp_path/'moved'/'config.json', tmp_path/'cut'/'config.json')
    assert len([*(tmp_path/'cut').glob('*.safetensors')])>1
    load_adapter(lora, base=str(tmp_path/'cut'))
    file = lora/'adapter_config.json' # the repair that everybody knows
    write_json(file, read_json(file) | dict(base_model_name_or_path=str(tmp_path/'moved')))
    load_adapter(lora)


def test_every_file_of_an_adapter_is_compared(tmp_path):
    trained(tmp_path/'run', base(tmp_path/'base'))
    lora = tmp_path/'run'/'lora_weights'
    files = sorted(p.name for p in lora.iterdir() if p.suffix!='.md')
    assert {'checksums.json', 'contract.json', 'witness.json', 'tokenizer.json', 'adapter_config.json'}<={*files}
    for name in files:
        whole = (lora/name).read_bytes()
        data = bytearray(whole)
        data[len(data)*2//3] ^= 0x04
        (lora/name).write_bytes(data)
        with pytest.raises(SageError) as e: check_contract(lora)
        assert name in str(e.value) or name=='checksums.json' and 'its file ' in str(e.value)
        (lora/name).write_bytes(whole)
    assert check_contract(lora)==[]


def test_a_base_that_is_not_rounded_as_in_training_is_noted(tmp_path):
    where = base(tmp_path/'base')
    lora = LoRAConfig(r=4, target_modules=every, lora_dropout=0.0)
    config = TrainingConfig(model_name=where, output_dir=tmp_path/'run', lora=lora, load_in_8bit=False,
                            load_in_4bit=True, fp16=False)
    model = add_lora(ready_for_quantised_training(load_model(where, quantisation=quantisation_of(config))), lora)
    save_run(RunFolder(tmp_path/'run'), model, load_tokenizer(where), config.to_dict())
    with pytest.warns(UserWarning, match='to 4 bits in training and is not rounded here, so answers differ by 0'):
        load_adapter(tmp_path/'run'/'lora_weights')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        load_adapter(tmp_path/'run'/'lora_weights', quantised=True)

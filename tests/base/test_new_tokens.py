"New tokens, and layers that are trained whole: saved, resumed, continued, merged, tied or not, quantised or not"
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from quick import two_layers
from sage_finetune.base.loading import load_model, load_tokenizer
from sage_finetune.base.new_tokens import add_token_rows, with_new_tokens
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.disk import SageError
from sage_finetune.inference.generate import base_of, load_adapter, load_plain
from sage_finetune.inference.merging import merge_adapters, merge_run
from sage_finetune.model.adapter import add_lora, adapter_line, check_run, embedding_rate
from sage_finetune.trainer import LoRATrainer

TOKENS = {'<ask>': 'question', '<end>': '', 'flup': 'return'}
ROWS = [dict(question=f'<ask> {n}? flup', answer=f'It is {n}. <end>') for n in
        'red blue green gold grey pink cyan teal plum sand rust lime'.split()]
settings = dict(model_name=two_layers, max_length=64, per_device_train_batch_size=4, gradient_accumulation_steps=1,
                learning_rate=3e-3, max_steps=3, load_in_8bit=False, fp16=False, optim='adamw_torch', report_to='none',
                gradient_checkpointing=False, save_steps=2, test_size=0.2, warmup_ratio=0)
small = dict(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'], lora_dropout=0.0)


def data(folder):
    path = folder/'rows.jsonl'
    path.write_text(''.join(json.dumps(r)+'\n' for r in ROWS))
    return path


def trained(folder, lora=None, **more):
    how = settings | dict(data_path=data(folder), output_dir=folder/'run', lora=small | (lora or {})) | more
    run = LoRATrainer(TrainingConfig(**how), quiet=True)
    return run,run.train()


def logits(model, ids):
    with torch.no_grad(): return model.eval()(torch.tensor([ids])).logits[0]


def ids_of(run): return run.tokenizer(' '.join(TOKENS)+' def f(x):')['input_ids']


def tensors(run): return load_file(run.folder.lora_weights/'adapter_model.safetensors')


@pytest.fixture(scope='module')
def first(tmp_path_factory): return trained(tmp_path_factory.mktemp('tokens'), add_tokens=TOKENS)


def untied(folder):
    "The quick model with a head of its own"
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(two_layers)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    load_tokenizer(two_layers).save_pretrained(folder)
    return str(folder)


def test_the_rows_of_new_tokens_are_learned_and_are_all_that_is_saved_of_the_matrix(first):
    run,result = first
    assert result.loss_after<result.loss_before
    of_rows = {k: t for k,t in tensors(run).items() if 'lora_' not in k}
    assert [(t.shape, t.dtype) for t in of_rows.values()]==[((3, 192), torch.float32)]
    begun = load_model(two_layers)
    add_token_rows(begun, with_new_tokens(load_tokenizer(two_layers), TOKENS), TOKENS)
    moved = (next(iter(of_rows.values()))-begun.get_input_embeddings().weight[4096:]).abs().amax(1)
    assert (moved>1e-3).all()
    assert '3 rows of model.embed_tokens' in adapter_line(run.model)
    kept = run.folder.checkpoints/'checkpoint-3'/'adapter_model.safetensors'
    assert {k for k in load_file(kept) if 'embed' in k}=={*of_rows}


def test_what_is_loaded_and_merged_answers_as_the_model_in_memory(first):
    run,_ = first
    ids = ids_of(run)
    here = logits(run.model, ids)
    model,tokenizer = load_adapter(run.folder.lora_weights)
    assert torch.allclose(logits(model, ids), here, atol=1e-5)
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith('<ask> <end> flup')
    with base_of(model): plain = logits(model, [5, 6, 7])
    assert torch.equal(plain, logits(load_model(two_layers), [5, 6, 7]))
    with base_of(model): assert logits(model, ids).shape==(len(ids), 4096) # which it has no rows for
    report = merge_run(run.folder.path)
    assert report.how=='weight by weight' and report.same==report.asked>0 and report.witness<1e-3
    merged,tokenizer = load_plain(run.folder.merged_model)
    assert torch.allclose(logits(merged, ids), here, atol=1e-4)
    assert merged.config.vocab_size==4099 and merged.config.tie_word_embeddings
    assert tokenizer(' '.join(TOKENS))['input_ids']==ids[:5]


def test_a_run_with_new_tokens_resumes_to_the_same_bits(first, tmp_path):
    whole,_ = first
    shutil.copytree(whole.folder.path, tmp_path/'run')
    for name in ('checkpoints/checkpoint-3', 'lora_weights'): shutil.rmtree(tmp_path/'run'/name)
    for name in ('results.json', 'manifest.json'): (tmp_path/'run'/name).unlink(missing_ok=True)
    again,_ = trained(tmp_path, add_tokens=TOKENS)
    assert all(torch.equal(t, tensors(whole)[k]) for k,t in tensors(again).items())
    assert again.trainer.state.global_step==3


@pytest.mark.slow
def test_a_run_with_new_tokens_is_continued(first, tmp_path):
    run,_ = first
    more,result = trained(tmp_path, init_adapter=run.folder.path, lora={})
    assert result.loss_before==pytest.approx(first[1].loss_after, abs=.02) and [*more.config.add_tokens]==[*TOKENS]
    with pytest.raises(ValueError, match=r"the parent adapter has \['<ask>', '<end>', 'flup'\]"):
        trained(tmp_path, init_adapter=run.folder.path, lora={}, add_tokens=['<x>'])
    with pytest.raises(SageError, match='`trainable_token_indices`, which cannot be continued'):
        trained(tmp_path, init_adapter=run.folder.path, stack_adapter=True)


def test_an_untied_head_learns_its_rows_too(tmp_path):
    run,_ = trained(tmp_path, add_tokens=TOKENS, model_name=untied(tmp_path/'base'), embedding_learning_rate=1e-2)
    rates = {g['initial_lr'] for g in run.trainer.optimizer.param_groups}
    assert rates=={3e-3, 1e-2}
    assert sorted(k.split('.')[-3] for k in tensors(run) if 'lora_' not in k)==['embed_tokens', 'lm_head']
    merge_adapters(run.folder.lora_weights, tmp_path/'merged')
    merged = load_plain(tmp_path/'merged')[0]
    assert torch.allclose(logits(merged, ids_of(run)), logits(run.model, ids_of(run)), atol=1e-4)
    assert not merged.config.tie_word_embeddings and len(merged.get_output_embeddings().weight)==4099


@pytest.mark.slow
@pytest.mark.parametrize('bits', [8, 4])
def test_on_a_quantised_base(bits, tmp_path):
    run,_ = trained(tmp_path, add_tokens=TOKENS, **{'load_in_8bit': bits==8, 'load_in_4bit': bits==4})
    merge_adapters(run.folder.lora_weights, tmp_path/'merged') # proved against the trained one, or refused
    off = logits(load_plain(tmp_path/'merged')[0], ids_of(run))-logits(run.model, ids_of(run))
    assert off.pow(2).mean().sqrt()<.1


@pytest.mark.slow
def test_layers_are_trained_whole(tmp_path):
    run,_ = trained(tmp_path, dict(modules_to_save=['embed_tokens', 'norm']), add_tokens=['<ask>'],
                    embedding_learning_rate=1e-4)
    assert 'model.embed_tokens, model.norm' in adapter_line(run.model)
    here = logits(run.model, [4096, 5, 6])
    assert torch.allclose(logits(load_adapter(run.folder.lora_weights)[0], [4096, 5, 6]), here, atol=1e-5)
    merge_adapters(run.folder.lora_weights, tmp_path/'merged')
    merged = load_plain(tmp_path/'merged')[0]
    assert torch.allclose(logits(merged, [4096, 5, 6]), here, atol=1e-4) and merged.config.tie_word_embeddings


refused = dict(
    twice=(dict(add_tokens=['<a>', '<a>']), "'<a>' is there twice"),
    space=(dict(add_tokens=[' <a>']), 'begins and ends with no space'),
    number=(dict(add_tokens={'<a>': 3}), "'<a>' must be described in words"),
    no_json=(dict(add_tokens='{"a": '), 'is no JSON'),
    unreadable=(dict(add_tokens=['é']), 'cannot be a token of this tokenizer'),
    no_layer=(dict(lora=small | dict(modules_to_save=['nowhere'])), 'nowhere names no layer of this model, such as'),
    both=(dict(lora=small | dict(modules_to_save=['q_proj'])), 'is among `target_modules` too'),
    none=(dict(lora=small | dict(modules_to_save=[])), 'a list with at least one name'),
    rate=(dict(embedding_learning_rate=1e-4), '`embedding_learning_rate` needs `add_tokens`'),
    head=(dict(add_tokens=['<a>'], lora=small | dict(modules_to_save=['lm_head'])), 'name both'))


@pytest.mark.parametrize('what', refused)
def test_what_cannot_be_is_refused_before_anything_is_loaded(what):
    values,words = refused[what]
    with pytest.raises(ValueError, match=words): check_run(TrainingConfig(**settings | values))


def test_as_text_from_a_command_line():
    assert TrainingConfig(add_tokens='[ASK],[DO]').add_tokens==['[ASK]', '[DO]']
    assert TrainingConfig(add_tokens='{"<a>": "ask", "<b>": ""}').add_tokens=={'<a>': 'ask', '<b>': ''}
    assert TrainingConfig(add_tokens='["a,b"]').add_tokens==['a,b'] and TrainingConfig(add_tokens=[]).add_tokens is None


def test_rows_that_the_model_lacks_are_made_and_trained_though_nobody_named_them():
    tok = load_tokenizer(two_layers)
    tok.add_tokens(['<there>']) # somebody enlarged the tokenizer, and not the model
    model = load_model(two_layers)
    assert add_token_rows(model, with_new_tokens(tok, ['<a>']), ['<a>']).ids==[4096, 4097]


def test_nothing_of_the_embedding_is_trained(first):
    model = add_lora(load_model(two_layers), LoRAConfig(**small))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.)
    with pytest.raises(ValueError, match='SGD trains nothing of embedding'): embedding_rate(optimizer, model, 1)

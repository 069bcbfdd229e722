"Without its adapter a model is its base to the bit, for every kind of adapter, in training and afterwards, or refused"
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from quick import chequered
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.disk import SageError
from sage_finetune.core.run_folder import RunFolder
from sage_finetune.inference.exam import compare_answers, examine
from sage_finetune.inference.generate import answers, base_of, load_adapter, load_plain, put_adapter
from sage_finetune.merge_chat import speaker
from sage_finetune.model.adapter import add_lora, load_lora_init, save_lora_init, ready_for_quantised_training
from sage_finetune.base.loading import load_model, load_tokenizer, quantisation_of, quiet_libraries
from sage_finetune.base.shards import BaseSwitch, moves_base
from sage_finetune.training.incremental import begin_with_parent
from sage_finetune.training.resume import save_run
from sage_finetune.ui.talk import at_strength, side_by_side
from sage_finetune.ui.token_losses import row_losses, token_losses

small = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, initializer_range=.1, pad_token_id=0, eos_token_id=2)
moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
row = torch.tensor([[5, 17, 99, 300, 1200, 7, 8, 9]])
own = dict(plain={}, rslora=dict(use_rslora=True), dora=dict(use_dora=True), pissa=dict(init_lora_weights='pissa'),
           pissa_dora=dict(init_lora_weights='pissa', use_dora=True), olora=dict(init_lora_weights='olora'),
           quick=dict(init_lora_weights='pissa_niter_4'), orthogonal=dict(init_lora_weights='orthogonal'),
           bias=dict(bias='all'), own_bias=dict(bias='lora_only', target_modules=['q_proj', 'v_proj']),
           pissa_bias=dict(init_lora_weights='pissa', bias='all'), head=dict(target_modules=['q_proj', 'lm_head']))
foreign = dict(saved_head=dict(modules_to_save=['lm_head']), saved_embedding=dict(modules_to_save=['embed_tokens']),
               saved_norm=dict(modules_to_save=['norm']), tokens=dict(trainable_token_indices=[5, 17, 300]),
               tokens_bias=dict(trainable_token_indices=[7], bias='all', modules_to_save=['norm']),
               pissa=dict(init_lora_weights='pissa'), olora=dict(init_lora_weights='olora', bias='lora_only'),
               dora_head=dict(use_dora=True, modules_to_save=['lm_head']), lora_bias=dict(lora_bias=True),
               embedding=dict(target_modules=['embed_tokens', 'q_proj']),
               patterns=dict(rank_pattern=dict(q_proj=8), alpha_pattern=dict(v_proj=32)))


def base(folder, kind='qwen2', tied=False, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small | more, tie_word_embeddings=tied))
    for p in model.parameters(): p.data += .05*torch.randn_like(p)
    model.save_pretrained(folder)
    load_tokenizer('sage-tiny').save_pretrained(folder)
    return str(folder)


def moved(model):
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad: p.data += .05*torch.randn_like(p)
    return model.eval()


@torch.no_grad()
def logits(model): return model(input_ids=row).logits


def is_base(model, where, dtype=torch.float32):
    "Bit-exactly the base while it is asked, and bit-exactly what it was afterwards"
    tuned,fresh = logits(model),logits(load_model(where, dtype).eval())
    state = {n: p.detach().clone() for n,p in model.named_parameters()}
    trains = {n: p.requires_grad for n,p in model.named_parameters()}
    with base_of(model): assert torch.equal(logits(model), fresh)
    assert torch.equal(logits(model), tuned) and not torch.equal(tuned, fresh)
    with pytest.raises(ZeroDivisionError), base_of(model): 1/0
    assert all(torch.equal(p, state[n]) for n,p in model.named_parameters())
    assert trains=={n: p.requires_grad for n,p in model.named_parameters()}


@pytest.mark.parametrize('name,tied', chequered(own, [False, True]))
def test_in_training_and_loaded_from_what_was_saved(tmp_path, name, tied):
    where,lora = base(tmp_path/'base', tied=tied), LoRAConfig(**dict(r=4, target_modules='all-linear') | own[name])
    model = moved(add_lora(load_model(where), lora))
    is_base(model, where)
    save_run(RunFolder(tmp_path/'run'), model, load_tokenizer(where),
             TrainingConfig(model_name=where, output_dir=tmp_path/'run', lora=lora, load_in_8bit=False,
                            fp16=False).to_dict())
    loaded = load_adapter(tmp_path/'run'/'lora_weights')[0]
    is_base(loaded, where)
    with at_strength(loaded, 0): assert torch.equal(logits(loaded), logits(load_model(where).eval()))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', foreign)
def test_adapters_of_other_tools(tmp_path, name):
    where = base(tmp_path/'base')
    how = dict(task_type='CAUSAL_LM', r=4, target_modules=['q_proj', 'v_proj', 'down_proj']) | foreign[name]
    with quiet_libraries(): model = moved(get_peft_model(load_model(where), LoraConfig(**how)))
    is_base(model, where)
    model.save_pretrained(tmp_path/'adapter')
    loaded = put_adapter(load_model(where), tmp_path/'adapter').eval()
    is_base(loaded, where)
    with at_strength(loaded, 0): assert torch.equal(logits(loaded), logits(load_model(where).eval()))


@pytest.mark.filterwarnings('ignore')
def test_kinds_that_are_not_lora(tmp_path):
    where,kind = base(tmp_path/'base'),dict(task_type='CAUSAL_LM')
    for how in (IA3Config(**kind, target_modules=['q_proj', 'down_proj'], feedforward_modules=['down_proj']),
                VeraConfig(**kind, r=4, target_modules=['q_proj']), PromptTuningConfig(**kind, num_virtual_tokens=4)):
        model = moved(get_peft_model(load_model(where), how))
        fresh = load_model(where).eval()
        tok = load_tokenizer(where)
        with base_of(model):
            assert torch.equal(logits(model), logits(fresh))
            said = answers(model, tok, ['Hello'], 8)
        assert said==answers(fresh, tok, ['Hello'], 8)


@pytest.mark.filterwarnings('ignore')
def test_experts(tmp_path):
    where = base(tmp_path/'base', 'qwen3_moe', **moe, head_dim=8)
    how = LoraConfig(task_type='CAUSAL_LM', r=4, target_modules=['q_proj'],
                     target_parameters=['mlp.experts.gate_up_proj'])
    is_base(moved(get_peft_model(load_model(where), how)), where)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('tied', [False, True])
def test_a_vocabulary_that_has_grown(tmp_path, tied):
    where = base(tmp_path/'base', tied=tied)
    model = load_model(where)
    model.resize_token_embeddings(4100)
    model = moved(get_peft_model(model, LoraConfig(task_type='CAUSAL_LM', r=4, target_modules=['q_proj'])))
    for p in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}: p.data += .1
    model.save_pretrained(tmp_path/'adapter', save_embedding_layers=True)
    loaded = put_adapter(load_model(where), tmp_path/'adapter').eval()
    assert logits(loaded).shape[-1]==4100
    is_base(loaded, where)
    with base_of(loaded): assert loaded.get_input_embeddings().num_embeddings==4096
    assert loaded.get_input_embeddings().num_embeddings==4100
    with pytest.raises(ValueError, match='larger vocabulary'), at_strength(loaded, .5): pass


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('lora', [dict(), dict(init_lora_weights='pissa'), dict(init_lora_weights='olora')])
def test_stacked_on_another(tmp_path, lora):
    where = base(tmp_path/'base')
    first = moved(add_lora(load_model(where), LoRAConfig(r=4)))
    save_run(RunFolder(tmp_path/'first'), first, load_tokenizer(where),
             dict(model_name=where, load_in_8bit=False, fp16=False))
    config = TrainingConfig(model_name=where, init_adapter=tmp_path/'first', stack_adapter=True,
                            lora=LoRAConfig(r=4, **lora))
    model = add_lora(load_model(where), config.lora)
    begin_with_parent(model, load_tokenizer(where), config)
    is_base(moved(model), where)
    two = put_adapter(load_model(where), tmp_path/'first'/'lora_weights')
    put_adapter(None, tmp_path/'first'/'lora_weights', 'second', two)
    two.base_model.set_adapter(['default', 'second'])
    is_base(two.eval(), where)


@pytest.mark.filterwarnings('ignore')
def test_two_adapters_with_biases(tmp_path):
    where = base(tmp_path/'base')
    for k in range(2):
        torch.manual_seed(k)
        how = LoraConfig(task_type='CAUSAL_LM', r=4, target_modules=['q_proj'], bias='all' if k else 'none')
        moved(get_peft_model(load_model(where), how)).save_pretrained(tmp_path/f'{k}')
    model = put_adapter(load_model(where), tmp_path/'0')
    put_adapter(None, tmp_path/'1', 'second', model)
    is_base(model.eval(), where)


@pytest.mark.parametrize('lora', [dict(bias='all'), dict(init_lora_weights='pissa'), dict(use_dora=True, bias='all')])
def test_in_16_bits(tmp_path, lora):
    where = base(tmp_path/'base')
    model = moved(add_lora(load_model(where, torch.bfloat16), LoRAConfig(r=4, **lora)))
    fresh = logits(load_model(where, torch.bfloat16).eval())
    assert fresh.dtype==torch.bfloat16 and all(p.dtype==torch.float32 for p in model.parameters() if p.requires_grad)
    with base_of(model): assert torch.equal(logits(model), fresh)


def test_on_a_quantised_base(tmp_path):
    where = base(tmp_path/'base', hidden_size=64, intermediate_size=64)
    how = TrainingConfig(load_in_4bit=True, fp16=False)
    load = lambda: ready_for_quantised_training(load_model(where, torch.float32, 'cpu', quantisation_of(how)))
    model = moved(add_lora(load(), LoRAConfig(r=4, bias='all')))
    with base_of(model): assert torch.equal(logits(model), logits(load().eval()))


def test_a_moved_base_of_another_process_is_moved_back(tmp_path):
    where,lora = base(tmp_path/'base'),LoRAConfig(r=4, init_lora_weights='pissa_niter_1')
    models = [add_lora(load_model(where), lora) for _ in range(2)]
    for p in models[0].adapter_start.values(): p += .01
    save_lora_init(models[0], tmp_path)
    assert load_lora_init(models[1], tmp_path)
    is_base(moved(models[1]), where)


def test_what_cannot_be_taken_away_is_refused_with_its_reason(tmp_path):
    where = base(tmp_path/'base')
    merged = moved(add_lora(load_model(where), LoRAConfig(r=4)))
    merged.merge_adapter()
    lost = moved(add_lora(load_model(where), LoRAConfig(r=4, init_lora_weights='pissa')))
    assert moves_base(lost) and not moves_base(merged)
    longer = get_peft_model(load_model(where), LoraConfig(task_type='CAUSAL_LM', layer_replication=[[0, 2], [0, 2]]))
    shutil.rmtree(where)
    for model,why in ((merged, 'merged into the weights in memory'), (lost, 'it is in no file here'),
                      (longer, 'repeats layers of the base')):
        before = {n: p.clone() for n,p in model.named_parameters()}
        with pytest.raises(SageError, match=why), base_of(model): pass
        with pytest.raises(SageError, match=why): BaseSwitch(model)
        with pytest.raises(SageError, match='load the saved adapter, or give the base'), at_strength(model, 0): pass
        assert all(torch.equal(p, before[n]) for n,p in model.named_parameters())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', [
    dict(bias='all'), dict(modules_to_save=['lm_head', 'embed_tokens']), dict(trainable_token_indices=[5, 17]),
    dict(init_lora_weights='pissa'), dict(use_dora=True)])
def test_whoever_shows_the_base_shows_the_same(tmp_path, how):
    where,q = base(tmp_path/'base'),['What is 2 plus 3?', 'Say hello']
    kind = dict(task_type='CAUSAL_LM', r=4, target_modules=['q_proj', 'down_proj'])
    model = moved(get_peft_model(load_model(where), LoraConfig(**kind | how)))
    fresh,tok = load_plain(where)
    true = [a.text for a in answers(fresh, tok, q, 8)]
    assert [r['base'] for r in compare_answers(q, (model, tok), (model, tok), 8)]==true
    ask = lambda say: ''.join(say([dict(role='user', content=q[0])], 0.0))
    assert ask(speaker(model, tok, 8, below=True))==true[0]
    with at_strength(model, 0): assert answers(model, tok, q[:1], 8)[0].text==true[0]
    parts = ['', '']
    for k,text in side_by_side(model, tok, q[0], (0, 1), 8): parts[k] += text
    assert parts==[true[0], answers(model, tok, q[:1], 8)[0].text]
    rows = [dict(question=q[0], answer='5')]
    with base_of(model): assert examine(model, tok, rows, 8).answers==examine(fresh, tok, rows, 8).answers
    assert token_losses(model, tok, 'Some text.').before[1:]==row_losses(fresh, tok('Some text.')['input_ids'])[1:]


@pytest.mark.filterwarnings('ignore')
def test_strengths_in_between_reach_what_is_learned_as_a_whole(tmp_path):
    where = base(tmp_path/'base')
    how = dict(bias='all', modules_to_save=['lm_head'], trainable_token_indices=[5, 17])
    model = moved(get_peft_model(load_model(where), LoraConfig(
        task_type='CAUSAL_LM', r=4, target_modules=['q_proj', 'down_proj'], **how)))
    tuned,fresh = logits(model),logits(load_model(where).eval())
    for strength,end in ((1e-4, fresh), (1-1e-4, tuned)):
        with at_strength(model, strength): assert (logits(model)-end).abs().max()<.05<(tuned-fresh).abs().max()
    assert torch.equal(logits(model), tuned)

"Mixtures of experts: peft adapts parameters there, and what it has for layers only is refused before loading"
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quick import few, two_layers
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.inference.generate import load_adapter, load_plain
from sage_finetune.merge_chat import merge_run
from sage_finetune.model.adapter import adapter_line, add_lora, check_run
from sage_finetune.base.loading import empty_model, load_tokenizer
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.trainer import LoRATrainer

sizes = dict(vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=512)
kinds = dict(qwen3_moe=dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
             mixtral=dict(num_local_experts=4, num_experts_per_tok=2), olmoe=dict(num_experts=4, num_experts_per_tok=2))
ids = torch.arange(5, 40)[None]


def base(kind, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | kinds[kind])).float()
    model.save_pretrained(folder)
    load_tokenizer(two_layers).save_pretrained(folder)
    return str(folder)


def config(kind, tmp_path, **more):
    data = create_sample_data(tmp_path/'rows.json', 'qa', num_samples=16)
    return TrainingConfig(model_name=base(kind, tmp_path/'base'), data_path=data, output_dir=tmp_path/'run',
                          max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-2,
                          load_in_8bit=False, fp16=False, optim='adamw_torch', report_to='none', test_size=0,
                          lora=dict(target_modules='all-linear', r=4, lora_dropout=0) | more)


@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('setting, value', [('lora_dropout', .1), ('use_dora', True), ('init_lora_weights', 'pissa'),
                                            ('init_lora_weights', 'olora'), ('init_lora_weights', 'orthogonal')])
def test_what_exists_for_layers_only_is_refused_by_name(kind, setting, value, tmp_path):
    run = LoRATrainer(config(kind, tmp_path, **{setting: value}), quiet=True)
    with pytest.raises(ValueError, match=f'`lora.{setting}={value!r}`: the experts') as e: run.train()
    assert run.model is None and 'ParamWrapper' not in str(e.value)
    model = AutoModelForCausalLM.from_pretrained(run.config.model_name)
    with pytest.raises(ValueError, match=f'`lora.{setting}={value!r}`: the experts'): add_lora(model, run.config.lora)


@pytest.mark.parametrize('kind, more', few([('qwen3_moe', {}),
                                        ('mixtral', dict(target_modules=['q_proj', 'w1', 'w2', 'w3'])),
                                        ('olmoe', dict(bias='all', init_lora_weights='gaussian', use_rslora=True))]))
def test_the_experts_are_trained_loaded_and_merged(kind, more, tmp_path):
    run = LoRATrainer(config(kind, tmp_path, **more), quiet=True)
    run.train()
    assert any('experts' in n for n,p in run.model.named_parameters() if p.requires_grad)
    trained = run.model.eval()(input_ids=ids).logits
    assert torch.allclose(load_adapter(tmp_path/'run'/'lora_weights')[0](input_ids=ids).logits, trained, atol=1e-4)
    merge_run(tmp_path/'run')
    assert torch.allclose(load_plain(tmp_path/'run'/'merged_model')[0](input_ids=ids).logits, trained, atol=1e-3)


def test_names_that_are_there_are_offered_and_experts_without_an_adapter_are_told(tmp_path):
    c = config('mixtral', tmp_path, target_modules=['q_proj', 'gate_proj'])
    with pytest.raises(ValueError, match='gate_proj names no layer .* w1, w2, w3'): check_run(c)
    check_run(config('mixtral', tmp_path, target_modules=['w2']))
    line = adapter_line(add_lora(empty_model(c.model_name), LoRAConfig(lora_dropout=0)))
    assert line.endswith('; no adapter on the experts (model.layers.0.mlp.experts and 1 more)')


def test_a_second_adapter_is_not_stacked_on_experts(tmp_path):
    c = config('qwen3_moe', tmp_path).replace(stack_adapter=True)
    with pytest.raises(ValueError, match='`stack_adapter=True` adds products of matrices'): check_run(c)

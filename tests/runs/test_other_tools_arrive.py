"A setting of another tool that has a place here arrives there: config, optimizer, adapter, batch"
import json
from pathlib import Path

import pytest
import yaml

from quick import two_layers
from sage_finetune.config import TrainingConfig
from sage_finetune.core.beforehand import tool_table
from sage_finetune.core.disk import SageError
from sage_finetune.runs.other_tools import config_from_other_tool, translated
from sage_finetune.runs.tasks import trainer_of

asked = [dict(prompt=[dict(role='user', content=f'{i}?')], completion=[dict(role='assistant', content=f'{i}!')])
         for i in range(8)]
talks = [dict(messages=r['prompt']+r['completion']) for r in asked]
pairs = [dict(prompt=f'{i}?', chosen=f'It is {i}.', rejected='No idea.') for i in range(8)]
judged = [dict(prompt=f'{i}?', completion=f'It is {i}.', label=i%2==0) for i in range(8)]
questions = [dict(prompt=[dict(role='user', content=f'{i} plus 1?')], solution=f'{i+1}') for i in range(8)]


def saved(file, rows):
    file.write_text(''.join(json.dumps(r)+'\n' for r in rows))
    return str(file)


def base_of(table, folder):
    "The least that a file of a tool must say"
    out = str(folder/'run')
    if table.startswith('trl'):
        kind = table.removeprefix('trl-')
        rows = dict(sft=talks, kto=judged, grpo=questions).get(kind, pairs)
        more = dict(reward_funcs=['accuracy_reward']) if kind=='grpo' else {}
        return dict(model_name_or_path='sage-tiny', use_peft=True, output_dir=out, trl=kind,
                    dataset_name=saved(folder/'rows.jsonl', rows)) | more
    rows = saved(folder/'rows.jsonl', talks)
    if table=='llamafactory': return dict(model_name_or_path='sage-tiny', stage='sft', output_dir=out, dataset=rows)
    if table=='llamafactory-v1':
        return dict(model='sage-tiny', peft_config=dict(name='lora'), train_dataset=rows, output_dir=out)
    if table=='unsloth': return dict(model_name='sage-tiny', max_seq_length=64, dataset=rows, output_dir=out)
    return dict(base_model='sage-tiny', adapter='lora', lora_target_linear=True, output_dir=out, lora_r=8,
                lora_alpha=16,
                learning_rate=1e-4, datasets=[dict(path=rows, type='chat_template')])


def file_of(folder, settings):
    (folder/'asked.yaml').write_text(yaml.safe_dump(settings))
    return folder/'asked.yaml'


def config_of(table, folder, **more):
    return config_from_other_tool(file_of(folder, base_of(table, folder) | more), say=lambda text: None)


# --- one row, one place

values = {
    'per_device_train_batch_size': 3, 'gradient_accumulation_steps': 5, 'learning_rate': 3e-3, 'num_train_epochs': 7,
    'max_steps': 9, 'lr_scheduler_type': 'constant_with_warmup', 'weight_decay': .2, 'max_grad_norm': .5,
    'optim': 'adamw_torch', 'seed': 7, 'adam_beta1': .8, 'adam_beta2': .95, 'adam_epsilon': 1e-6, 'torch_compile': True,
    'neftune_noise_alpha': 5, 'logging_steps': 3, 'save_steps': 4, 'save_total_limit': 6,
    'load_best_model_at_end': True,
    'deterministic': True, 'dataloader_num_workers': 2, 'lora.r': 6, 'lora.lora_alpha': 12, 'lora.lora_dropout': .25,
    'lora.use_rslora': True, 'lora.use_dora': True, 'lora.target_modules': ['q_proj'], 'lora.bias': 'lora_only',
    'lora.init_lora_weights': 'gaussian', 'load_in_8bit': True, 'load_in_4bit': True, 'packing': True, 'max_length': 99,
    'beta': .3, 'desirable_weight': 2, 'undesirable_weight': 3, 'early_stopping_patience': 2, 'loraplus_lr_ratio': 4,
    'gradient_checkpointing': False, 'sft_weight': .5, 'lr_scheduler_kwargs': dict(num_cycles=2), 'warmup_steps': 5,
    'label_smoothing': .1, 'embedding_learning_rate': 1e-3, 'num_generations': 4, 'max_completion_length': 40,
    'num_iterations': 2, 'temperature': .9, 'top_p': .8, 'epsilon': .1, 'epsilon_high': .3,
    'importance_sampling_level': 'sequence', 'mask_truncated_completions': True}
beside = {'lr_scheduler_kwargs': dict(lr_scheduler_type='cosine', lr_scheduler='cosine'),
          'label_smoothing': dict(loss_type='robust'), 'adam_beta1': dict(optim='adamw_torch'),
          'embedding_learning_rate': dict(lora_modules_to_save=['embed_tokens'])}
elsewhere = {'model_name', 'output_dir'}
not_for_pairs = {'packing', 'neftune_noise_alpha', 'torch_compile'}
tables = ('trl-sft', 'trl-dpo', 'trl-kto', 'trl-orpo', 'trl-grpo', 'llamafactory', 'llamafactory-v1', 'axolotl',
          'unsloth')
placed = [pytest.param(t, name, row['to'],
                       id=f'{t}-{name}') for t in tables for name,row in tool_table(t).settings.items()
          if row.get('to') and row['to'] not in elsewhere]
of_preferences = {'beta', 'desirable_weight', 'undesirable_weight', 'sft_weight'}


@pytest.mark.parametrize('table,name,ours', placed)
def test_a_setting_with_a_place_arrives_there(table, name, ours, tmp_path):
    known = tool_table(table).settings
    more = {k: v for k,v in beside.get(ours, {}).items() if k in known} | {name: values[ours]}
    if table=='axolotl' and ours in of_preferences:
        more['rl'] = 'kto' if 'desirable' in ours else 'orpo' if 'orpo' in name else 'dpo'
        rows = saved(tmp_path/'pairs.jsonl', judged if more['rl']=='kto' else pairs)
        more['datasets'] = [dict(path=rows, type='user_defined.default' if more['rl']=='kto' else 'chatml.ultra')]
    if name=='load_in_8bit': more['load_in_4bit'] = False
    if table=='trl-grpo' and ours=='per_device_train_batch_size': more['num_generations'] = values[ours] # whole groups
    if name=='lora_dropout' and 'disable_dropout' in known: more['disable_dropout'] = False
    if ours in not_for_pairs and table in ('trl-dpo', 'trl-kto', 'trl-orpo', 'trl-grpo'):
        with pytest.raises(ValueError, match=ours): translated(file_of(tmp_path, base_of(table, tmp_path) | more))
        return
    if name=='r' and table=='unsloth': assert 'lora_r' in known
    t = translated(file_of(tmp_path, base_of(table, tmp_path) | more))
    c = TrainingConfig.from_dict({k: v for k,v in t.settings.items() if (k, v)!=('train_on', None)})
    assert getattr(c.lora if ours.startswith('lora.') else c, ours.removeprefix('lora.'))==values[ours]
    assert name in t.went


# --- several settings, one meaning

def held(c, names): return tuple(getattr(c.lora if n.startswith('lora.') else c,
                                         n.removeprefix('lora.')) for n in names)


@pytest.mark.parametrize('table,more,wanted', [
    ('trl-sft', dict(warmup_steps=.03), dict(warmup_ratio=.03, warmup_steps=None)),
    ('trl-sft', dict(warmup_steps=20), dict(warmup_ratio=0, warmup_steps=20)),
    ('trl-sft', dict(warmup_steps='1e-1'), dict(warmup_ratio=.1)),
    ('llamafactory', dict(warmup_ratio=.2), dict(warmup_ratio=.2, warmup_steps=None)),
    ('axolotl', dict(warmup_steps=10), dict(warmup_steps=10)), ('unsloth', dict(warmup_steps=5), dict(warmup_steps=5)),
    ('llamafactory-v1', dict(warmup_ratio=.1), dict(warmup_ratio=.1)),
    ('trl-sft', {}, {'bf16': True, 'fp16': False, 'lora.target_modules': ['q_proj', 'v_proj'], 'train_on': 'all'}),
    ('trl-sft', dict(fp16=True), dict(bf16=False, fp16=True)), ('trl-sft', dict(bf16=False), dict(bf16=False)),
    ('axolotl', dict(bf16='auto'), dict(bf16=True)), ('axolotl', dict(bf16=False, fp16=True), dict(fp16=True)),
    ('trl-sft', dict(assistant_only_loss=True), dict(train_on='assistant')),
    ('trl-sft', dict(completion_only_loss=False), dict(train_on='all')),
    ('trl-sft', dict(gradient_checkpointing=False), dict(gradient_checkpointing=False)),
    ('trl-sft', dict(activation_checkpointing=False), dict(gradient_checkpointing=False)),
    ('llamafactory', dict(disable_gradient_checkpointing=True), dict(gradient_checkpointing=False)),
    ('unsloth', dict(use_gradient_checkpointing='unsloth'), dict(gradient_checkpointing=True)),
    ('trl-sft', dict(save_strategy='epoch'), dict(save_strategy='epoch')),
    ('trl-sft', dict(save_strategy='best'), dict(load_best_model_at_end=True)),
    ('trl-sft', dict(packing=True, packing_strategy='bfd_split'), dict(overflow='split', packing=True)),
    ('trl-sft', dict(max_length=None), dict(max_length=2048)), # positions of the model
    ('trl-sft', dict(lora_target_modules='all-linear'), {'lora.target_modules': 'all-linear'}),
    ('trl-sft', dict(lora_target_modules=['q_proj', 'o_proj']), {'lora.target_modules': ['q_proj', 'o_proj']}),
    ('trl-sft', dict(test_split_size=.25, datasets=None), dict(test_size=.25)),
    ('trl-sft', dict(report_to=['swanlab']), dict(report_to='none')),
    ('trl-sft', dict(report_to=['tensorboard', 'wandb']), dict(report_to=['tensorboard', 'wandb'])),
    ('trl-sft', dict(report_to=['tensorboard']), dict(report_to='tensorboard')),
    ('trl-dpo', {}, {'lora.lora_dropout': 0, 'method': 'dpo', 'learning_rate': 1e-6, 'beta': .1}),
    ('trl-dpo', dict(disable_dropout=False), {'lora.lora_dropout': .05}),
    ('trl-dpo', dict(loss_type=['sigmoid', 'sft'], loss_weights=[1, .5]), dict(loss_type='sigmoid', sft_weight=.5)),
    ('trl-dpo', dict(loss_type='ipo'), dict(loss_type='ipo')), ('trl-kto', {}, dict(method='kto', desirable_weight=1)),
    ('trl-orpo', {}, dict(method='orpo')),
    ('trl-grpo', {}, {'method': 'grpo', 'max_completion_length': 512, 'max_length': 2048, 'learning_rate': 1e-6,
                      'num_generations': 8, 'beta': 0, 'lora.lora_dropout': .05, 'top_k': None,
                      'rewards': [dict(reward='number', key='solution', name='accuracy_reward', weight=1.0)]}),
    ('trl-grpo', dict(disable_dropout=True, top_k=5), {'lora.lora_dropout': 0, 'top_k': 5}),
    ('trl-grpo', dict(scale_rewards=False, loss_type='dr_grpo'), dict(scale_rewards='none', loss_type='dr_grpo')),
    ('trl-grpo', dict(scale_rewards=True, max_length=600), dict(scale_rewards='group', max_length=600)),
    ('trl-grpo', dict(reward_funcs=['accuracy_reward', 'think_format_reward'], reward_weights=[1, '0.5']),
     dict(rewards=[dict(reward='number', key='solution', name='accuracy_reward', weight=1.0),
                   dict(reward='regex', pattern=r'\A<think>(?!.*<think>)(.*?)</think>', name='think_format_reward',
                        weight=.5)])),
    ('trl-grpo', dict(use_vllm=True, vllm_gpu_memory_utilization=.2, vllm_mode='server'),
     dict(vllm=dict(mode='server', gpu_memory_utilization=.2))),
    ('trl-grpo', dict(vllm_mode='server'), dict(vllm=None)),
    ('trl-grpo', dict(generation_batch_size=16, gradient_accumulation_steps=2, steps_per_generation=2),
     dict(gradient_accumulation_steps=2)),
    ('trl-sft', dict(lora_modules_to_save=['lm_head']), {'lora.modules_to_save': ['lm_head']}),
    ('trl-sft', dict(lora_modules_to_save=[]), {'lora.modules_to_save': None}),
    ('axolotl', dict(tokens=['<a>', '<b>'], lora_modules_to_save=['embed_tokens', 'lm_head']),
     {'add_tokens': ['<a>', '<b>'], 'lora.modules_to_save': ['embed_tokens', 'lm_head']}),
    ('axolotl', dict(lora_modules_to_save=['embed_tokens'], embedding_lr_scale=.5, learning_rate=1e-4),
     dict(embedding_learning_rate=5e-5)),
    ('llamafactory', dict(additional_target='embed_tokens,lm_head'), {'lora.modules_to_save': ['embed_tokens',
                                                                                               'lm_head']}),
    ('llamafactory', dict(add_tokens='<a>,<b>', resize_vocab=True),
     {'add_tokens': ['<a>', '<b>'], 'lora.modules_to_save': ['embed_tokens', 'lm_head']}),
    ('llamafactory', dict(add_special_tokens=['<a>'], additional_target='lm_head'),
     {'add_tokens': ['<a>'], 'lora.modules_to_save': ['lm_head']}),
    ('llamafactory', dict(quantization_bit=4), dict(load_in_4bit=True, load_in_8bit=False)),
    ('llamafactory', dict(quantization_bit=8), dict(load_in_4bit=False, load_in_8bit=True)),
    ('llamafactory', {}, {'load_in_4bit': False, 'load_in_8bit': False, 'lora.lora_alpha': 16,
                          'train_on': 'assistant'}),
    ('llamafactory', dict(lora_rank=4), {'lora.r': 4, 'lora.lora_alpha': 8}),
    ('llamafactory', dict(lora_rank=4, lora_alpha=5), {'lora.lora_alpha': 5}),
    ('llamafactory', dict(pissa_init=True, pissa_iter=-1), {'lora.init_lora_weights': 'pissa'}),
    ('llamafactory', dict(mask_history=True), dict(train_on='last')),
    ('llamafactory', dict(train_on_prompt=True), dict(train_on='all')),
    ('llamafactory', dict(neat_packing=True), dict(packing=True)),
    ('llamafactory', dict(val_size=.25, eval_strategy='steps', eval_steps=3), dict(test_size=.25, eval_steps=3)),
    ('llamafactory', dict(val_size=2), dict(test_size=.25)),
    ('llamafactory-v1', dict(micro_batch_size=2, global_batch_size=8),
     dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)),
    ('llamafactory-v1', dict(peft_config=dict(name='lora', r=16, lora_alpha=32, target_modules='all')),
     {'lora.r': 16, 'lora.lora_alpha': 32, 'lora.target_modules': 'all-linear'}),
    ('llamafactory-v1', dict(quant_config=dict(name='bnb', quantization_bit=4)), dict(load_in_4bit=True)),
    ('llamafactory-v1', dict(lr_scheduler_config=dict(name='cosine')), dict(lr_scheduler_type='cosine')),
    ('axolotl', dict(adapter='qlora', load_in_4bit=True), dict(load_in_4bit=True)),
    ('axolotl', dict(lora_target_modules=['q_proj'], lora_target_linear=None), {'lora.target_modules': ['q_proj']}),
    ('axolotl', dict(train_on_inputs=True), dict(train_on='all')),
    ('axolotl', dict(val_set_size=.25, evals_per_epoch=1), dict(test_size=.25, eval_steps=None)),
    ('axolotl', dict(val_set_size=.25, eval_steps=3), dict(eval_steps=3)),
    ('axolotl', dict(saves_per_epoch=1), dict(save_strategy='epoch')),
    ('axolotl', dict(save_steps=9), dict(save_steps=9)),
    ('axolotl', dict(wandb_project='notes'), dict(report_to='wandb')),
    ('axolotl', dict(use_wandb=True, use_tensorboard=True), dict(report_to=['wandb', 'tensorboard'])),
    ('axolotl', {}, dict(report_to='none')),
    ('axolotl', dict(sample_packing=True), dict(packing=True)),
    ('axolotl', dict(excess_length_strategy='truncate'), dict(overflow='truncate', cut_answers=True)),
    ('axolotl', dict(dataset_exact_deduplication=True), dict(duplicates='drop')),
    ('axolotl', dict(cosine_min_lr_ratio=.1), dict(lr_scheduler_kwargs=dict(min_lr_rate=.1))),
    ('unsloth', {}, {'lora.target_modules': ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj',
                                             'down_proj']}),
], ids=lambda v: v if isinstance(v, str) else '-'.join(map(str, v))[:40])
def test_several_settings_together_arrive(table, more, wanted, tmp_path):
    c = config_of(table, tmp_path, **more)
    assert held(c, wanted)==tuple(wanted.values())


# --- the last mile: what the loop really has

@pytest.mark.parametrize('table,more', [
    ('trl-sft', dict(learning_rate=3e-3, lora_r=4, lora_alpha=12, lora_target_modules=['q_proj'], adam_beta1=.8,
                     adam_beta2=.9,
                     adam_epsilon=1e-6, weight_decay=.2, per_device_train_batch_size=2, gradient_accumulation_steps=3,
                     warmup_steps=2, save_strategy='epoch', max_steps=5)),
    ('llamafactory', dict(learning_rate=3e-3, lora_rank=4, lora_alpha=12, lora_target='q_proj', adam_beta1=.8,
                          adam_beta2=.9,
                          adam_epsilon=1e-6, weight_decay=.2, per_device_train_batch_size=2,
                          gradient_accumulation_steps=3, warmup_steps=2, save_strategy='epoch', max_steps=5)),
    ('axolotl', dict(learning_rate=3e-3, lora_r=4, lora_alpha=12, lora_target_modules=['q_proj'],
                     lora_target_linear=None,
                     adam_beta1=.8, adam_beta2=.9, adam_epsilon=1e-6, weight_decay=.2, micro_batch_size=2,
                     gradient_accumulation_steps=3, warmup_steps=2, saves_per_epoch=1, max_steps=5,
                     optimizer='adamw_torch',
                     val_set_size=0))])
def test_it_arrives_in_the_optimizer_the_adapter_and_the_batch(table, more, tmp_path):
    model = dict(axolotl='base_model').get(table, 'model_name_or_path')
    more = more | {model: str(two_layers)}
    run = trainer_of(file_of(tmp_path, base_of(table, tmp_path) | more), quiet=True)
    result = run.train()
    t,lora = run.trainer,run.model.peft_config['default']
    group = t.optimizer.param_groups[0]
    assert (group['initial_lr'], group['betas'], group['eps'], group['weight_decay'])==(3e-3, (.8, .9), 1e-6, .2)
    assert (lora.r, lora.lora_alpha, set(lora.target_modules))==(4, 12, {'q_proj'})
    assert (t.args.gradient_accumulation_steps, next(iter(t.get_train_dataloader()))['input_ids'].shape[0])==(3, 2)
    assert (t.args.warmup_steps, t.args.save_strategy, result.steps)==(2, 'epoch', 5)
    assert [h['learning_rate'] for h in t.state.log_history if h.get('step')==1][0]<3e-3 # it warms up


@pytest.mark.parametrize('table,more,words', [
    ('trl-sft', dict(use_peft=False), 'use_peft=False'), ('trl-sft', dict(packing_strategy='wrapped'), "='wrapped'"),
    ('trl-sft', dict(loss_type='dft'), "loss_type='dft'"), ('trl-sft', dict(data_seed=3), 'data_seed=3'),
    ('trl-sft', dict(eos_token='</s>'), "eos_token='</s>'"), ('trl-sft', dict(optim_args='a=1'), 'optim_args'),
    ('trl-sft', dict(deepspeed='ds_z2.json'), '--nproc N --config zero2'),
    ('trl-sft', dict(fsdp='full_shard'), 'fsdp2'),
    ('trl-sft', dict(trl='rloo'), "trl='rloo'"), ('trl-sft', dict(lerning_rate=1), 'is it `learning_rate`?'),
    ('trl-sft', dict(eval_steps=.2, eval_strategy='steps'), 'eval_steps=0.2 (a share'),
    ('trl-sft', dict(logging_steps=.2), 'logging_steps'), ('trl-sft', dict(hub_token='hf_x'), 'hub_token (no token'),
    ('trl-dpo', dict(loss_type=['apo_zero']), 'apo_zero'),
    ('trl-dpo', dict(sync_ref_model=True), 'sync_ref_model=True'),
    ('trl-kto', dict(loss_type='apo_zero_unpaired'), 'apo_zero_unpaired'),
    ('trl-grpo', dict(use_vllm='yes'), "use_vllm='yes' (it may be False, True)"),
    ('trl-grpo', dict(reward_funcs=None), 'reward_funcs is missing'),
    ('trl-grpo', dict(reward_funcs=['reasoning_accuracy_reward']), "reward_funcs='reasoning_accuracy_reward'"),
    ('trl-grpo', dict(reward_funcs=['my.own']), 'takes question, answer and row'),
    ('trl-grpo', dict(reward_weights=[1, 2]), 'reward_weights=[1, 2] (a number for each'),
    ('trl-grpo', dict(reward_model_name_or_path='m'), 'no model is asked'),
    ('trl-grpo', dict(generation_batch_size=16), 'generation_batch_size=16 (answers are sampled for one'),
    ('trl-grpo', dict(steps_per_generation=3), 'steps_per_generation=3'),
    ('trl-grpo', dict(loss_type='sapo'), "loss_type='sapo'"), ('trl-grpo', dict(delta=2.0), 'delta=2.0'),
    ('trl-grpo', dict(lora_modules_to_save=['lm_head']), "lora_modules_to_save=['lm_head'] (judged answers"),
    ('trl-grpo', dict(per_device_train_batch_size=2), 'multiple of `num_generations=8`'),
    ('llamafactory', dict(resize_vocab=True), 'resize_vocab=True (with no token'),
    ('llamafactory', dict(stage='dpo', add_tokens='<a>'), "add_tokens='<a>' (judged answers"),
    ('llamafactory', dict(additional_target=[1]), 'additional_target=[1] (a list of texts)'),
    ('llamafactory', dict(freeze_vision_tower=False), 'freeze_vision_tower=False'),
    ('llamafactory', dict(export_quantization_bit=4), 'export_quantization_bit=4'),
    ('llamafactory-v1', dict(peft_config=dict(name='freeze')), "peft_config.name='freeze'"),
    ('llamafactory-v1', dict(peft_config=dict(name='lora', rank=3)), 'peft_config.rank (unknown'),
    ('axolotl', dict(adapter=None), 'adapter is missing'), ('axolotl', dict(adapter='qlora'), 'it needs load_in_4bit'),
    ('axolotl', dict(rl='grpo'), "rl='grpo'"), ('axolotl', dict(micro_batch=2), 'is it `micro_batch_size`?'),
    ('axolotl', dict(datasets=[dict(path='x', type='jeopardy')]), "datasets[0].type='jeopardy'"),
    ('axolotl', dict(datasets='x'), "datasets='x'"), ('axolotl', dict(dpo_beta=.1), 'dpo_beta (it goes with `rl`)')])
def test_what_cannot_be_is_refused_by_name_and_nothing_is_written(table, more, words, tmp_path):
    file = file_of(tmp_path, base_of(table, tmp_path) | more)
    with pytest.raises((SageError, ValueError)) as e: config_from_other_tool(file, say=lambda text: None)
    assert words in str(e.value) and not (tmp_path/'run').exists()
    assert 'hf_x' not in str(e.value)


def test_a_launch_that_divides_the_model_takes_the_file_that_asks_for_it(tmp_path, monkeypatch):
    file = file_of(tmp_path, base_of('trl-sft', tmp_path) | dict(deepspeed='ds_z3_config.json'))
    monkeypatch.setattr('sage_finetune.runs.other_settings.division', lambda: 'DeepSpeed')
    assert translated(file).went['deepspeed']=='DeepSpeed divides the model, as launched'


@pytest.mark.parametrize('table', ['trl-sft', 'trl-dpo', 'trl-grpo', 'llamafactory', 'llamafactory-v1', 'axolotl',
                                   'unsloth'])
def test_a_value_of_another_kind_never_reaches_errors_of_python(table, tmp_path):
    base = base_of(table, tmp_path)
    if table.startswith('trl'): base['lora_target_modules'] = 'all-linear'
    for i,name in enumerate(n for n in tool_table(table).settings if n!='eos_token'):
        for odd in ([[1], dict(a=1)], [True, 'x'], [10**400, -1], [0, 1.5])[i%4]:
            try: translated(file_of(tmp_path, base | {name: odd}))
            except (SageError, ValueError) as e: assert str(e)


@pytest.mark.parametrize('there', [True, False])
def test_a_tracker_that_is_not_installed_is_noted_where_a_file_of_others_names_it(monkeypatch, there):
    from sage_finetune.runs import other_settings
    monkeypatch.setattr(other_settings, 'find_spec', lambda name: there)
    for given in dict(report_to=['trackio']), dict(report_to='mlflow'), dict(report_to=['all', 'trackio']):
        found = other_settings.Translation('TRL', 'a.yaml', {})
        other_settings.take_loggers(dict(given), found)
        name, = [n for n in ('trackio', 'mlflow') if n in given['report_to']]
        assert found.settings['report_to']==(name if there else 'none')
        assert there or name in found.went['report_to']

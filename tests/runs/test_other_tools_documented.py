"""Files and commands as the documentation of other tools has them, on the embedded model and a few rows: they run

Their form is that of TRL's documentation and scripts, LLaMA-Factory's `examples` (v0 and v1) and axolotl's `examples`;
names of models and data sets are local ones.
"""
import json
import shlex
from pathlib import Path

import pytest
import yaml

from sage_finetune.core.disk import SageError
from sage_finetune.runs.launch import tool_command
from sage_finetune.runs.other_data import factory_datasets
from sage_finetune.runs.pipeline import merge_asked
from sage_finetune.runs.tasks import trainer_of
from sage_finetune.runs.other_tools import translated

alpaca = [dict(instruction=f'{i} plus 1?', input='', output=f'It is {i+1}.') for i in range(8)]
talks = [dict(messages=[dict(role='user', content=r['instruction']), dict(role='assistant', content=r['output'])])
         for r in alpaca]
pairs = [dict(prompt=[dict(role='user', content=f'{i}?')], chosen=[dict(role='assistant', content=f'It is {i}.')],
              rejected=[dict(role='assistant', content='No.')]) for i in range(8)]
judged = [dict(prompt=p['prompt'], completion=p['chosen'], label=i%2==0) for i,p in enumerate(pairs)]
asked = [dict(prompt=[dict(role='user', content=f'{i} plus 1?')], solution=f'{i+1}') for i in range(8)]
ranked = [dict(conversations=[{'from': 'human', 'value': f'{i}?'}], chosen={'from': 'gpt', 'value': f'It is {i}.'},
               rejected={'from': 'gpt', 'value': 'No.'}) for i in range(8)]
tagged = [dict(messages=[dict(role='user', content=f'{i}?'), dict(role='assistant', content=f'It is {i}.')],
               label=i%2==0) for i in range(8)]
turns = dict(role_tag='role', content_tag='content', user_tag='user', assistant_tag='assistant')
about = dict(
    identity=dict(file_name='identity.json'),
    alpaca_en_demo=dict(file_name='identity.json', ms_hub_url='someone/alpaca_en_demo',
                        om_hub_url='else/alpaca_en_demo'),
    dpo_en_demo=dict(file_name='ranked.json', ranking=True, formatting='sharegpt', columns=dict(
        messages='conversations', chosen='chosen', rejected='rejected')),
    kto_en_demo=dict(file_name='tagged.json', formatting='sharegpt', columns=dict(messages='messages', kto_tag='label'),
                     tags=turns),
    c4_demo=dict(file_name='c4.jsonl', columns=dict(prompt='text')),
    wiki_demo=dict(file_name='wiki.txt', columns=dict(prompt='text')))


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with small data sets, from which commands are given"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'data').mkdir()
    for name,rows in dict(identity=alpaca, ranked=ranked, tagged=tagged).items():
        (tmp_path/'data'/f'{name}.json').write_text(json.dumps(rows))
    for name,rows in dict(talks=talks, pairs=pairs, judged=judged, asked=asked).items():
        (tmp_path/f'{name}.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    (tmp_path/'split').mkdir()
    for name in ('train', 'test'): (tmp_path/'split'/f'{name}.jsonl').write_text((tmp_path/'talks.jsonl').read_text())
    (tmp_path/'pairs_split').mkdir()
    for name in ('train', 'test'):
        (tmp_path/'pairs_split'/f'{name}.jsonl').write_text((tmp_path/'pairs.jsonl').read_text())
    texts = ['One text about one thing. ', 'Another, about another thing. ']*8
    (tmp_path/'data'/'c4.jsonl').write_text(''.join(json.dumps(dict(text=t*4))+'\n' for t in texts))
    (tmp_path/'data'/'wiki.txt').write_text('\n'.join(t*4 for t in texts))
    (tmp_path/'data'/'dataset_info.json').write_text(json.dumps(about))
    return tmp_path


def trained(file, steps=2):
    run = trainer_of(file, quiet=True)
    assert run.train().steps==steps
    return run


# --- TRL

model = '--model_name_or_path sage-tiny --use_peft --max_steps 2 --output_dir out'
commands = {
    'sft': f'trl sft {model} --dataset_name talks.jsonl',
    'sft of the docs of the script': f"python trl/scripts/sft.py {model} --dataset_name split --learning_rate 2.0e-4 "
    "--num_train_epochs 1 --packing --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --eos_token "
    "'<|im_end|>' --eval_strategy steps --eval_steps 100 --lora_r 32 --lora_alpha 16 --push_to_hub",
    'lora without regret': 'uv run "https://raw.githubusercontent.com/huggingface/trl/main/trl/scripts/sft.py" '
    f'{model} '
    '--dataset_name talks.jsonl --learning_rate 2.0e-5 --num_train_epochs 1 --packing --per_device_train_batch_size 2 '
    '--gradient_accumulation_steps 16 --eval_strategy no --lora_r 256 --lora_alpha 16 --lora_target_modules all-linear '
    '--report_to trackio --push_to_hub',
    'qlora': f'accelerate launch trl/scripts/sft.py {model} --dataset_name talks.jsonl --load_in_4bit --bf16 '
    '--lora_target_modules q_proj k_proj v_proj o_proj --warmup_steps 0.03 --gradient_checkpointing --dtype bfloat16 '
    '--attn_implementation flash_attention_2 --save_strategy epoch --logging_steps 5 --trust_remote_code',
    'profile of one gpu': f'trl sft {model} --dataset_name talks.jsonl --accelerate_config single_gpu --no_packing',
    'dpo': f'trl dpo {model} --dataset_name pairs.jsonl',
    'dpo of the docs of the script': f'python trl/scripts/dpo.py {model} --dataset_name pairs_split --learning_rate '
    '5.0e-6 --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --eval_strategy steps '
    '--eval_steps 50 --no_remove_unused_columns --lora_r 32 --lora_alpha 16',
    'kto of the docs of the script': f'python trl/scripts/kto.py {model} --dataset_name judged.jsonl '
    '--per_device_train_batch_size 4 --num_train_epochs 1 --learning_rate 5e-7 --lr_scheduler_type=cosine '
    '--gradient_accumulation_steps 1 --eval_steps 500 --warmup_steps 0.1 --bf16 --logging_first_step '
    '--lora_target_modules=all-linear --lora_r=16 --lora_alpha=16 --eval_strategy no',
    'orpo of the docs of the script': f'python examples/scripts/orpo.py {model} --dataset_name pairs.jsonl '
    '--per_device_train_batch_size 4 --learning_rate 8e-5 --gradient_accumulation_steps 1 --logging_steps 10 '
    '--lr_scheduler_type cosine --optim rmsprop --warmup_steps 1 --bf16 --logging_first_step '
    '--no_remove_unused_columns --lora_r=16 --lora_alpha=16',
    'grpo': f'trl grpo {model} --dataset_name asked.jsonl --reward_funcs accuracy_reward think_format_reward '
    '--reward_weights 1.0 0.5 --max_completion_length 8 --loss_type dr_grpo --scale_rewards false --log_completions',
    'grpo of the docs of the script': f'python trl/scripts/grpo.py {model} --dataset_name asked.jsonl --reward_funcs '
    'think_format_reward --learning_rate 1.0e-5 --lora_r 32 --lora_alpha 16 --max_completion_length 8 --beta 0.001'}
quick = 'sft', 'grpo'


@pytest.mark.parametrize('name', [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in commands])
def test_a_command_of_trl_runs(name, place):
    trained(tool_command(shlex.split(commands[name])).save(place))


@pytest.mark.parametrize('name', commands)
def test_a_command_of_trl_is_translated(name, place):
    t = translated(tool_command(shlex.split(commands[name])).save(place))
    assert t.tool=='TRL' and {*tool_command(shlex.split(commands[name])).settings}<={*t.went}


def test_a_command_with_a_file_below_it(place):
    (place/'sft.yaml').write_text('model_name_or_path: sage-tiny\nuse_peft: true\nlearning_rate: 1.0e-3\nlora_r: 4\n'
                                  'dataset_name: talks.jsonl\noutput_dir: out\nnum_processes: 1\n')
    words = 'trl sft --config sft.yaml --lora_r 2 --num_processes 4 --accelerate_config zero2'
    asked = tool_command(shlex.split(words))
    assert (asked.settings['lora_r'], asked.settings['learning_rate'], asked.how)==(2, 1e-3, dict(nproc=4,
                                                                                                  config='zero2'))


@pytest.mark.parametrize('words,says', [
    ('trl rloo --model_name_or_path m', "trl='rloo'"), ('trl sft --config gone.yaml', 'no such file of settings'),
    ('trl sft --accelerate_config fsdp1', 'take fsdp2'), ('trl sft --accelerate_config zero1', 'take zero2'),
    ('llamafactory-cli eval x', 'llamafactory-cli eval'), ('torchtune run x', 'no command of trl')])
def test_a_command_that_is_not_here_is_refused(words, says, place):
    with pytest.raises(SageError) as e: translated(tool_command(shlex.split(words)).save(place))
    assert says in str(e.value)


def test_a_mixture_keeps_its_shares_its_columns_and_its_held_out_part(place):
    settings = dict(model_name_or_path='sage-tiny', use_peft=True, output_dir='out', max_steps=2, test_split_size=.2,
                    eval_strategy='epoch', datasets=[
                        dict(path='talks.jsonl', fraction=.75, columns=['messages']),
                        dict(path='json', data_files='split/train.jsonl', fraction=.25)])
    (place/'mix.yaml').write_text(yaml.safe_dump(settings))
    run = trained(place/'mix.yaml')
    assert len(json.loads(Path(run.config.data_path).read_text()))==8+3 and run.config.test_size==.2


# --- LLaMA-Factory

lora = dict(model_name_or_path='sage-tiny', trust_remote_code=True, do_train=True, finetuning_type='lora', lora_rank=8,
            lora_target='all', cutoff_len=256, max_samples=1000, preprocessing_num_workers=16, logging_steps=10,
            save_steps=500, plot_loss=True, overwrite_output_dir=True, save_only_model=False, report_to='none',
            per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate='1.0e-4', num_train_epochs=3.0,
            lr_scheduler_type='cosine', warmup_ratio=.1, bf16=True, ddp_timeout=180000000, output_dir='saves/lora',
            resume_from_checkpoint=None, max_steps=2, dataloader_num_workers=0)
v1 = dict(model='sage-tiny', model_class='llm', peft_config=dict(name='lora', r=16, lora_alpha=32, lora_dropout=.05,
                                                                target_modules='all'),
          kernel_config=dict(name='auto'), dist_config=dict(name='fsdp2', dcp_path=None), train_dataset='data/v1.yaml',
          output_dir='outputs/lora', micro_batch_size=1, cutoff_len=256, learning_rate='1.0e-4', max_steps=2,
          sample_backend='hf', max_new_tokens=128)
of_factory = {
    'sft': lora | dict(stage='sft', dataset='identity,alpaca_en_demo', template='qwen3_nothink'),
    'pretrain': lora | dict(stage='pt', dataset='c4_demo'), 'pretrain on texts': lora | dict(stage='pt',
                                                                                             dataset='wiki_demo'),
    'dpo': lora | dict(stage='dpo', pref_beta=.1, pref_loss='sigmoid', dataset='dpo_en_demo', template='qwen3_nothink'),
    'orpo': lora | dict(stage='dpo', pref_beta=.1, pref_loss='orpo', dataset='dpo_en_demo', template='qwen3_nothink'),
    'kto': lora | dict(stage='kto', pref_beta=.1, dataset='kto_en_demo', template='qwen3_nothink'),
    'with pictures': lora | dict(stage='sft', dataset='identity', image_max_pixels=262144, video_max_pixels=16384),
    'qlora': lora | dict(stage='sft', dataset='identity', quantization_bit=4, quantization_method='bnb',
                         double_quantization=False) | dict(double_quantization=True),
    'ray': lora | dict(stage='sft', dataset='identity', ray_num_workers=4),
    'v1 sft': v1, 'v1 qlora': v1 | dict(quant_config=dict(name='bnb', quantization_bit=4))}


def factory_file(place, settings):
    (place/'data'/'v1.yaml').write_text(yaml.safe_dump(dict(identity=dict(
        file_name='identity.json', dataset_dir='data', converter='alpaca', num_samples=6))))
    (place/'asked.yaml').write_text(yaml.safe_dump(settings))
    return place/'asked.yaml'


@pytest.mark.parametrize('name', [n if n in ('pretrain on texts', 'v1 sft') else pytest.param(n, marks=pytest.mark.slow)
                                  for n in of_factory])
def test_an_example_of_llama_factory_runs(name, place): trained(factory_file(place, of_factory[name]))


@pytest.mark.parametrize('name', of_factory)
def test_an_example_of_llama_factory_is_translated(name, place):
    settings = of_factory[name]
    t = translated(factory_file(place, settings))
    assert {k for k,v in settings.items() if v is not None}<={*t.went} and t.data


def test_pretraining_learns_every_token_of_each_line_and_packs(place):
    run = trainer_of(factory_file(place, of_factory['pretrain on texts']), quiet=True)
    assert (run.config.train_on, run.config.packing)==('all', True)
    assert len(json.loads(Path(run.config.data_path).read_text()))==16


def test_a_command_of_llama_factory_and_its_changes(place):
    factory_file(place, of_factory['sft'])
    asked = tool_command(shlex.split('llamafactory-cli train asked.yaml learning_rate=1e-3 lora_rank=4'))
    assert (asked.settings['learning_rate'], asked.settings['lora_rank'], asked.does)==(1e-3, 4, 'train')
    by_options = tool_command(shlex.split('llamafactory-cli train --stage sft --do_train True --model_name_or_path m'))
    assert by_options.settings==dict(stage='sft', do_train=True, model_name_or_path='m')


@pytest.mark.slow
def test_a_file_that_merges_merges(place):
    trained(factory_file(place, of_factory['sft']))
    (place/'merge.yaml').write_text(yaml.safe_dump(dict(
        model_name_or_path='sage-tiny', adapter_name_or_path='saves/lora', template='qwen3_nothink',
        trust_remote_code=True, export_dir='saves/merged', export_size=5, export_device='cpu',
        export_legacy_format=False)))
    assert merge_asked(place/'merge.yaml', say=lambda text: None).path.endswith('saves/merged')
    assert (place/'saves'/'merged'/'config.json').is_file()


@pytest.mark.parametrize('info,source', [
    (dict(hf_hub_url='a/b', ms_hub_url='c/d'), 'a/b'), (dict(file_name='identity.json', om_hub_url='c/d'), None),
    (dict(hf_hub_url='a/b', folder='en'), 'a/b/en'), (dict(file_name='', hf_hub_url='a/b', ms_hub_url=''), 'a/b')])
def test_what_llama_factory_takes_unless_told_otherwise_is_taken(info, source, place):
    (place/'data'/'dataset_info.json').write_text(json.dumps(dict(mine=info)))
    data, = factory_datasets(dict(dataset='mine'), place/'asked.yaml')
    assert str(data.source)==(source or 'data/identity.json')


@pytest.mark.parametrize('info,says', [
    (dict(ms_hub_url='c/d'), 'only at `ms_hub_url`'), (dict(script_url='x'), 'only at `script_url`'),
    (dict(file_name='a', columns=dict(videos='v')), 'videos'), (dict(file_name='a', formatting='csv'),
                                                                'formatting csv'),
    (dict(file_name='a', num_samples='x'), '`num_samples` must be a int'), ([], 'must be an object')])
def test_a_description_that_cannot_be_is_refused_by_name(info, says, place):
    (place/'data'/'dataset_info.json').write_text(json.dumps(dict(mine=info)))
    with pytest.raises(SageError) as e: factory_datasets(dict(dataset='mine'), place/'asked.yaml')
    assert says in str(e.value)


# --- axolotl

axolotl = dict(
    base_model='sage-tiny', model_type='AutoModelForCausalLM', tokenizer_type='AutoTokenizer', load_in_8bit=False,
    load_in_4bit=False, strict=False, dataset_prepared_path='last_run_prepared', val_set_size=0,
    output_dir='./outputs/out',
    adapter='lora', lora_model_dir=None, sequence_len=256, sample_packing=True, eval_sample_packing=True,
    pad_to_sequence_len=True, lora_r=16, lora_alpha=32, lora_dropout=.05, lora_fan_in_fan_out=None,
    lora_target_modules=['gate_proj', 'down_proj', 'up_proj', 'q_proj', 'v_proj', 'k_proj', 'o_proj'],
    wandb_project=None,
    gradient_accumulation_steps=2, micro_batch_size=2, num_epochs=1, optimizer='adamw_8bit', lr_scheduler='cosine',
    learning_rate=.0002, train_on_inputs=False, group_by_length=False, bf16='auto', fp16=None, tf32=False,
    gradient_checkpointing=True, early_stopping_patience=None, logging_steps=1, flash_attention=True,
    loss_watchdog_threshold=5.0, loss_watchdog_patience=3, warmup_steps=1, evals_per_epoch=4, saves_per_epoch=1,
    weight_decay=0.0, special_tokens=dict(pad_token='<|endoftext|>'), max_steps=2)
of_axolotl = {
    'lora': axolotl | dict(datasets=[dict(path='data/identity.json', type='alpaca')]),
    'qlora': axolotl | dict(adapter='qlora', load_in_4bit=True, lora_target_modules=None, lora_target_linear=True,
                            datasets=[dict(path='data/identity.json', type='alpaca')]),
    'chat template': axolotl | dict(chat_template='llama3', sample_packing=False, datasets=[dict(
        path='talks.jsonl', type='chat_template', field_messages='messages', message_field_role='role',
        message_field_content='content', roles=dict(user=['user'], assistant=['assistant']))]),
    'dpo': axolotl | dict(rl='dpo', sample_packing=False, datasets=[dict(
        path='pairs.jsonl', type='chat_template.default', field_messages='prompt', field_chosen='chosen',
        field_rejected='rejected', message_property_mappings=dict(role='role', content='content'))]),
    'kto': axolotl | dict(rl='kto', rl_beta=.5, kto_desirable_weight=.2, sample_packing=False,
                          datasets=[dict(path='judged.jsonl', type='llama3.ultra', split='train')])}


@pytest.mark.parametrize('name', [n if n=='chat template' else pytest.param(n, marks=pytest.mark.slow)
                                  for n in of_axolotl])
def test_an_example_of_axolotl_runs(name, place): trained(factory_file(place, of_axolotl[name]))


@pytest.mark.parametrize('name', of_axolotl)
def test_an_example_of_axolotl_is_translated(name, place):
    t = translated(factory_file(place, of_axolotl[name]))
    assert t.tool=='axolotl' and {k for k,v in of_axolotl[name].items() if v is not None}<={*t.went}


def test_a_command_of_axolotl(place):
    factory_file(place, of_axolotl['lora'])
    asked = tool_command(shlex.split('axolotl train asked.yaml --learning-rate=1e-3 --micro-batch-size 1'))
    assert (asked.settings['learning_rate'], asked.settings['micro_batch_size'])==(1e-3, 1)
    old = tool_command(shlex.split('accelerate launch --num_processes 2 -m axolotl.cli.train asked.yaml'))
    assert (old.settings['base_model'], old.how)==('sage-tiny', dict(nproc=2))


@pytest.mark.slow
def test_a_file_of_version_1_that_merges_merges(place):
    trained(factory_file(place, of_factory['v1 sft']))
    (place/'merge.yaml').write_text(yaml.safe_dump(dict(model='sage-tiny', peft_config=dict(
        name='lora', adapter_name_or_path='outputs/lora', export_dir='saves/merged', export_size=5,
        infer_dtype='auto'))))
    assert merge_asked(place/'merge.yaml', say=lambda text: None).path.endswith('saves/merged')
    assert (place/'saves'/'merged'/'config.json').is_file()


def test_a_file_of_version_1_goes_on_from_an_adapter(place):
    t = translated(factory_file(place, v1 | dict(peft_config=dict(
        name='lora', adapter_name_or_path='outputs/before', export_dir='unused', target_modules='all'))))
    assert (t.settings['init_adapter'], t.merge_into)==('outputs/before', None)
    assert merge_asked(place/'asked.yaml', say=lambda text: None) is None

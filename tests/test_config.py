"Edges of `sage_finetune.config` that need processes, kills or many random cases"
import copy, os, pickle, random, signal, subprocess, sys, threading
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

import pytest

from sage_finetune.core.disk import whole_folder, write_json, write_text
from sage_finetune.config import (
    config_from_meta, config_table, fit_config, LoRAConfig, PreferenceConfig, preset_for, PresetConfigs, read_json,
    RewardConfig, SageError, TrainingConfig
)
from sage_finetune.core.machine import Machine, show_changes
from sage_finetune.core.run_folder import last_checkpoint, mark_complete, read_meta, run_folder, write_meta

DEFAULTS = dict(
    model_name="Qwen/Qwen2.5-Coder-1.5B-Instruct", load_in_8bit=True, load_in_4bit=False, data_path=None,
    max_length=1024, output_dir=Path.home()/'.sage'/'finetune_output', num_train_epochs=3,
    per_device_train_batch_size=1, gradient_accumulation_steps=16,
    learning_rate=5e-5, lr_scheduler_type="cosine", warmup_ratio=0.1, fp16=True, bf16=False,
    gradient_checkpointing=True, optim="paged_adamw_8bit", logging_steps=10, save_steps=500, save_total_limit=2,
    report_to="tensorboard", lora=LoRAConfig(), seed=42,
    dataloader_num_workers=0)
LORA = dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"], lora_dropout=0.05,
            bias="none", task_type="CAUSAL_LM")

def python(code, *args, **kw):
    "Run `code` in a new interpreter"
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, timeout=60,
                          **kw)

def hidden(folder): return [p.name for p in Path(folder).iterdir() if p.name.startswith('.')]

# Names, defaults and lightness

def test_defaults():
    config,lora = TrainingConfig(), LoRAConfig()
    assert {n: getattr(config, n) for n in DEFAULTS}==DEFAULTS
    assert {n: getattr(lora, n) for n in LORA}==LORA
    assert isinstance(lora.target_modules, list)
    assert [f.name for f in fields(config)][:len(DEFAULTS)]!=[] and not config.given

def test_import_is_light():
    code = ("import sys; from sage_finetune import TrainingConfig, LoRAConfig, PresetConfigs; TrainingConfig(); "
            "PresetConfigs.a100()\n"
           "print([m for m in ('torch','transformers','datasets','peft','numpy','fastcore','IPython','rich',"
            "'typer', 'filelock') if m in sys.modules])")
    assert python(code).stdout.strip()=='[]'

def test_making_a_config_touches_no_disk(tmp_path):
    code = ("from sage_finetune import TrainingConfig, PresetConfigs\n" \
           "c = TrainingConfig(output_dir='~/x', data_path='gone.json'); c.lora_dir, c.log_dir, c.checkpoint_dir; "
            "PresetConfigs.minimal()")
    done = python(code, env={**os.environ, 'HOME': str(tmp_path), 'PYTHONDONTWRITEBYTECODE': '1'})
    assert done.returncode==0, done.stderr
    assert list(tmp_path.iterdir())==[]

def test_every_name_is_still_handed_on():
    from sage_finetune import config
    for name in ('SageError', 'cannot_write', 'is_running', 'read_json', 'to_disk', 'whole_folder', 'write_json',
                 'write_text', 'Settings', 'Shown', 'checked', 'refuse_unknown', 'with_given', 'default_output_dir',
                 'run_folder', 'RunFolder', 'Machine', 'Change', 'Changes', 'show_changes', 'config_table', 'Table'):
        assert hasattr(config, name), name

# What is allowed

@pytest.mark.parametrize('name', ['data_path', 'output_dir', 'eval_data_path', 'init_adapter', 'replay_path'])
def test_paths_may_be_strings(name):
    kind = TrainingConfig.__dataclass_fields__[name].type
    assert {str, Path} <= set(kind.__args__)
    for given in ('some/where', Path('some/where')):
        config = TrainingConfig(**{name: given})
        assert getattr(config, name)==Path('some/where') and isinstance(getattr(config, name), Path)
    for given in ('', 3, b'x', 'a\0b'):
        with pytest.raises(ValueError, match=f'`{name}` must be a path, got'): TrainingConfig(**{name: given})

@pytest.mark.parametrize('bad', [
    dict(num_train_epochs=0), dict(per_device_train_batch_size=0), dict(gradient_accumulation_steps=8//16),
    dict(learning_rate=0), dict(learning_rate=-1), dict(warmup_ratio=1.5), dict(save_steps=0), dict(logging_steps=0),
    dict(save_total_limit=0), dict(seed=-1), dict(dataloader_num_workers=-1), dict(test_size=1), dict(max_steps=0),
    dict(weight_decay=-.1), dict(max_grad_norm=-1), dict(model_name=''), dict(data_path=''), dict(output_dir=None),
    dict(lora=8), dict(fp16='maybe')], ids=str)
def test_what_cannot_be_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=f'`{next(iter(bad))}` must be'): TrainingConfig(**bad)

def test_messages():
    with pytest.raises(ValueError, match='`load_in_8bit` and `load_in_4bit` cannot both'):
        TrainingConfig(load_in_8bit=True, load_in_4bit=True)
    with pytest.raises(ValueError, match='must be "tensorboard" or "wandb" or "trackio" or "mlflow" or "none", or a'):
        TrainingConfig(report_to='comet_ml')
    with pytest.raises(ValueError, match='did you mean `learning_rate`'): TrainingConfig().learning_rat = 1e-4
    with pytest.raises(ValueError, match='unknown LoRA setting `rank`'): TrainingConfig(lora=dict(rank=4))

def test_small_things():
    assert TrainingConfig('sage-tiny').given=={'model_name'}
    assert TrainingConfig(save_total_limit=None).save_total_limit is None
    assert TrainingConfig(bf16=True)==TrainingConfig(bf16=True, fp16=False)
    assert TrainingConfig(lora=dict(r=16)).lora==LoRAConfig(r=16)
    config = TrainingConfig(num_train_epochs=1)
    assert config.replace(seed=1).lora is not config.lora
    config.output_dir = '~/mine'
    assert config.checkpoint_dir==Path.home()/'mine'/'checkpoints' and 'output_dir' in config.given
    both = TrainingConfig(fp16=True)
    with pytest.raises(ValueError, match='cannot both be True'): both.replace(bf16=True)
    assert both.replace(bf16=True, fp16=False).bf16
    four = TrainingConfig(load_in_4bit=True, bf16=True)
    for twin in (copy.copy(four), copy.deepcopy(four), pickle.loads(pickle.dumps(four))):
        assert twin==four and set(twin.given)=={'load_in_4bit', 'bf16'}

def test_the_shape_of_the_correction():
    assert LoRAConfig(target_modules='all-linear').target_modules=='all-linear'
    assert LoRAConfig(target_modules=('q',)).target_modules==['q']
    assert LoRAConfig().target_modules is not LoRAConfig().target_modules
    for bad,message in ((dict(target_modules=[]), '`target_modules` must be'),
                        (dict(target_modules=None), '`target_modules` must be'),
                        (dict(r=0), '`r` must be at least 1, got 0'),
                        (dict(bias='some'), '`bias` must be "none", "all" or "lora_only"')):
        with pytest.raises(ValueError, match=message): LoRAConfig(**bad)

def test_settings_of_preferences():
    liked = PreferenceConfig.like(TrainingConfig(seed=7).adapted(max_length=64), method='orpo')
    assert (liked.seed, liked.max_length, liked.learning_rate, liked.method)==(7, 64, 5e-6, 'orpo')
    assert liked.given=={'seed', 'method'} and PreferenceConfig.like(liked, beta=.2).beta==.2
    assert PreferenceConfig.from_dict(dict(beta=.2)).method=='dpo'
    for bad in (dict(beta=0), dict(train_on='all'), dict(overflow='split'), dict(format_type='qa'),
                dict(loss_type='nll'), dict(sft_weight=-1)):
        with pytest.raises(ValueError, match=f'`{next(iter(bad))}` must be'): PreferenceConfig(**bad)
    with pytest.raises(ValueError, match='`method` must be "dpo" or "orpo" or "kto"'): PreferenceConfig(method='ppo')
    with pytest.raises(ValueError, match='`label_smoothing=0.1` needs `loss_type="robust"`'):
        PreferenceConfig(label_smoothing=.1)

# Files

def test_files_with_mistakes(tmp_path):
    assert LoRAConfig.load(LoRAConfig(r=4).save(tmp_path/'lora.json'))==LoRAConfig(r=4)
    with pytest.raises(ValueError, match='lora.json: `r` must be a whole number'):
        LoRAConfig.load(write_json(tmp_path/'lora.json', dict(r='four')))
    with pytest.raises(FileNotFoundError, match='none.json does not exist'): TrainingConfig.load(tmp_path/'none.json')
    dump = {k: v for k,v in TrainingConfig().to_dict().items() if k not in TrainingConfig._added}
    with pytest.raises(ValueError, match='cannot both be True'): TrainingConfig.from_dict({**dump, 'bf16': True})
    with pytest.raises(ValueError, match='unknown setting `gone`'): TrainingConfig.from_dict(dict(_given=['gone']))
    with pytest.raises(ValueError, match='must be a dict'): TrainingConfig.from_dict([1])

def test_where_the_data_of_a_meta_file_is(tmp_path):
    write_meta(tmp_path/'whole', 'sage-tiny', 'rows.json', config=TrainingConfig(load_in_8bit=True))
    assert 'load_in_8bit' in config_from_meta(tmp_path/'whole').given
    write_json(tmp_path/'moved'/'finetune_meta.json',
               dict(model='m', dataset='name', data_file='/gone/before/rows.json', output_dir='/gone'))
    assert config_from_meta(tmp_path/'moved').data_path==Path('/gone/before/rows.json')
    rows = write_text(tmp_path/'moved'/'rows.json', '[]')
    config = config_from_meta(tmp_path/'moved')
    assert (config.data_path, config.output_dir)==(rows, tmp_path/'moved')

def test_a_meta_file_that_names_a_config_of_another_program(tmp_path):
    "Every setting is honoured, or refused by name: none is passed over with a warning"
    def of(**settings):
        write_json(tmp_path/'factory.json', settings)
        write_meta(tmp_path/'factory', 'm', 'd', config=tmp_path/'factory.json')
        return config_from_meta(tmp_path/'factory')
    c = of(learning_rate=1e-4, stage='sft', cutoff_len=512, lora_rank=4, quantization_bit=4, dataset='d.json')
    assert (c.learning_rate, c.max_length, c.lora.r, c.lora.lora_alpha, c.load_in_4bit)==(1e-4, 512, 4, 8, True)
    assert (c.per_device_train_batch_size, c.lr_scheduler_type, c.optim)==(8, 'linear', 'adamw_torch') # its defaults
    c = of(model_name='m', max_seq_length=256, load_in_4bit=False, warmup_steps=10, optim='adamw_8bit', seed=3407)
    assert (c.max_length, c.load_in_4bit, c.warmup_steps, c.optim, c.seed)==(256, False, 10, 'adamw_8bit', 3407)
    for settings,says in ((dict(cutoff_len=9, use_galore=True), 'use_galore=True'),
                          (dict(cutoff_len=9, lora_rnk=3), 'lora_rnk (unknown; is it `lora_rank`?)'),
                          (dict(cutoff_len=9, stage='dpo'), "stage='dpo'"), (dict(cutoff_len=[9]), 'cutoff_len=[9]'),
                          (dict(cutoff_len=9, val_size=.1), 'val_size (`sage-finetune run')):
        with pytest.raises((ValueError, SageError)) as e: of(**settings)
        assert says in str(e.value) and 'factory.json' in str(e.value)

# What a config says

def test_why_a_setting_is_not_the_default():
    assert config_table(PresetConfigs.a100()).rows[0][3]=='set by a preset or a program'
    assert config_table(LoRAConfig()).title=='LoRAConfig: every setting has its default'
    assert [r[0::3] for r in config_table(TrainingConfig(bf16=True)).rows]==[
        ['fp16', 'gives way to `bf16`'], ['bf16', 'given by hand']]
    config = TrainingConfig(learning_rate=2e-4, output_dir='runs/first')
    assert str(config)==str(config_table(config)) and config._repr_html_()==config_table(config)._repr_html_()
    assert repr(config).startswith('TrainingConfig(model_name=')

# Presets

def test_presets_are_those_of_the_contract():
    presets = {n: getattr(PresetConfigs, n)() for n in PresetConfigs.fits_in}
    chosen = dict(packing='auto', torch_compile='auto') # what is fitted to the rows, and told
    assert presets['rtx_3060']==TrainingConfig().adapted(**chosen) and not presets['a100'].given
    assert (TrainingConfig().packing, TrainingConfig().torch_compile)==(False, False)
    said = lambda n,*names: [getattr(presets[n], name) for name in names]
    assert said('minimal', 'load_in_4bit', 'load_in_8bit', 'max_length', 'fp16', 'optim')==[
        True, False, 512, True, 'paged_adamw_8bit']
    assert presets['minimal'].lora==LoRAConfig(r=4, lora_alpha=8)
    precise = 'load_in_4bit', 'load_in_8bit', 'max_length', 'fp16', 'bf16', 'optim'
    assert said('rtx_4090', *precise)==[False, False, 2048, True, False, 'adamw_torch']
    assert said('a100', *precise)==[False, False, 4096, False, True, 'adamw_torch']
    assert [p.gradient_checkpointing for p in presets.values()]==[True, True, *[False]*5]
    assert PresetConfigs.minimal(lora=dict(r=16)).lora.scaling==1
    assert PresetConfigs.auto().effective_batch_size in (16, 32)
    assert [preset_for(m) for m in (Machine('cuda', memory=4*2**30), Machine('mps'))]==['minimal', 'cpu']

# Random round trips

def random_changes(rng):
    "Some settings with random allowed values, some of them as strings"
    choices = dict(
        model_name=['sage-tiny', 'a/b', '模型'], data_path=[None, 'd.json', '/x/数据.jsonl'],
        max_length=[8, '2048', 4096.0], output_dir=['out', '/tmp/o', Path('p')],
        num_train_epochs=[1, 0.5, '3', 2.0], per_device_train_batch_size=[1, '4'],
        gradient_accumulation_steps=[1, 64], learning_rate=[1e-3, '2e-4', 1], warmup_ratio=[0, 1, '0.03'],
        gradient_checkpointing=[True, 'false'], optim=['adamw_torch', 'paged_adamw_32bit', 'adamw_8bit'],
        save_total_limit=[None, 1], report_to=['none', 'tensorboard', 'wandb'],
        lora=[LoRAConfig(r=3), dict(r='4', target_modules='all-linear'), dict(target_modules=('q',))],
        seed=[0, 2**32-1],
        test_size=[0, 0.5], eval_data_path=[None, 'e.json'], format_type=[None, 'qa'], max_steps=[-1, '7'],
        weight_decay=[0, .1])
    changes = {n: rng.choice(choices[n]) for n in rng.sample(sorted(choices), rng.randint(0, 8))}
    return changes | rng.choice([{}, dict(bf16=True), dict(fp16=True), dict(fp16=False, bf16='yes')]) | \
        rng.choice([{}, dict(load_in_4bit=True), dict(load_in_8bit=True), dict(load_in_8bit=False)])

@pytest.mark.parametrize('seed', range(60))
def test_round_trips(seed, tmp_path):
    rng = random.Random(seed)
    changes = random_changes(rng)
    config = TrainingConfig(**changes)
    assert config.given==set(changes)
    for back in (TrainingConfig.load(config.save(tmp_path/'c.json')), pickle.loads(pickle.dumps(config)),
                 config.replace(), config.adapted()):
        assert back==config and back.given==config.given and back.to_dict()==config.to_dict()
        assert {f.name: type(getattr(back, f.name)) for f in fields(back)}=={
            f.name: type(getattr(config, f.name)) for f in fields(config)}
    assert not (config.fp16 and config.bf16) and not (config.load_in_8bit and config.load_in_4bit)
    assert config.given==set(changes)

def test_changing_a_copy_leaves_the_original():
    config = TrainingConfig()
    copy = config.replace(seed=1)
    copy.lora.r,copy.lora.target_modules[0] = 99,'x'
    assert config==TrainingConfig() and config.lora==LoRAConfig() and not config.given

def test_a_refused_assignment_changes_nothing():
    config = TrainingConfig(fp16=True)
    for name,value in dict(bf16=True, max_length=1, gone=1).items():
        with pytest.raises(ValueError): setattr(config, name, value)
    assert config==TrainingConfig() and config.given=={'fp16'}

def test_assigning_the_other_precision_is_enough():
    config = TrainingConfig()
    config.bf16 = True
    config.load_in_4bit = True
    assert (config.fp16, config.bf16, config.load_in_8bit, config.load_in_4bit)==(False, True, False, True)

def test_subclasses_and_dataclasses_replace():
    @dataclass
    class Mine(TrainingConfig):
        extra: int = 1
    assert Mine(extra='2').replace(seed=3).extra==2 and Mine(extra=2).given=={'extra'}
    class Own(TrainingConfig):
        def __init__(self, teacher, **kwargs):
            super().__init__(**kwargs)
            self._teacher = teacher
    own = Own('nobody', seed=1).replace(max_length=64)
    assert (own._teacher, own.max_length, own.given)==('nobody', 64, {'seed', 'max_length'})
    assert replace(TrainingConfig(), seed=7).seed==7

# Fitting, over every pretend machine

MACHINES = [Machine(d, bf16=b, bitsandbytes=bnb, tensorboard=tb) for d,b,bnb,tb in
            product(('cuda', 'mps', 'cpu'), (False, True), (False, True), (False, True))]

@pytest.mark.parametrize('machine', MACHINES, ids=str)
def test_fitting_is_complete_honest_and_done_once(machine):
    rng = random.Random(str(machine))
    for config in (TrainingConfig(),
                   *(getattr(PresetConfigs, n)() for n in ('minimal', 'rtx_3060', 'rtx_4090', 'a100')),
                   *(TrainingConfig(**random_changes(rng)) for _ in range(20))):
        before = config.to_dict()
        try: fitted,changes = fit_config(config, machine)
        except ValueError as err:
            assert not machine.bitsandbytes and 'pip install' in str(err)
            assert config.given & {'load_in_8bit', 'load_in_4bit'}
            continue
        assert config.to_dict()==before
        told = {c.setting: (c.asked, c.used) for c in changes}
        assert told=={n: (before[n], v) for n,v in fitted.to_dict().items() if v!=before[n]}
        assert len(told)==len(changes) and all(c.reason and '\n' not in c.reason for c in changes)
        assert fit_config(fitted, machine)==(fitted, [])
        assert fitted.effective_batch_size==config.effective_batch_size and fitted.max_length==config.max_length
        if machine.device!='cuda':
            assert not fitted.fp16 and not fitted.optim.startswith('paged_') and '8bit' not in fitted.optim
        if machine.device=='cuda' and not machine.bf16: assert not fitted.bf16
        if not machine.bitsandbytes: assert not fitted.load_in_8bit and not fitted.load_in_4bit
        assert show_changes(changes).count('\n')==len(changes)

def test_fitting_by_example():
    laptop,t4 = Machine(cores=2),Machine('cuda', 'Tesla T4', memory=15*2**30)
    changed = lambda config,machine: [c.setting for c in fit_config(config, machine)[1]]
    bare = Machine('cuda', 'x', bf16=True, bitsandbytes=False, tensorboard=False)
    assert changed(TrainingConfig(), bare)==['fp16', 'bf16', 'load_in_8bit', 'optim', 'report_to']
    assert changed(PresetConfigs.a100(), laptop)==['bf16'] and changed(PresetConfigs.cpu(), laptop)==[]
    assert changed(PresetConfigs.a100(), Machine('cuda', 'A100', bf16=True))==['optim']
    assert changed(PresetConfigs.a100(optim='adamw_torch'), Machine('cuda', 'A100', bf16=True))==[]
    assert changed(TrainingConfig(), Machine('mps'))==['fp16', 'load_in_8bit', 'optim']
    assert len(changed(TrainingConfig(load_in_8bit=True, gradient_checkpointing=True), laptop))==2
    assert fit_config(TrainingConfig(bf16=True), laptop)[0].bf16
    assert not fit_config(TrainingConfig(bf16=True), t4)[0].bf16
    assert fit_config(TrainingConfig(bf16=True, seed=1), t4)[0].given=={'seed'}
    assert fit_config(PresetConfigs.a100(), Machine(bf16=True))[0].bf16
    assert fit_config(TrainingConfig(optim='adamw_bnb_8bit'), laptop)[0].optim=='adamw_torch'
    assert show_changes([])=='Nothing was changed for this machine.'

def test_wandb_missing_is_an_error_only_when_asked_for():
    config = TrainingConfig().adapted(report_to='wandb')
    assert fit_config(config, Machine(wandb=False))[0].report_to=='none'
    with pytest.raises(ValueError, match='wandb'): fit_config(config.replace(report_to='wandb'), Machine(wandb=False))
    with pytest.raises(ValueError, match="report_to='wandb'.*leave wandb out"):
        fit_config(TrainingConfig(report_to='wandb'), Machine(wandb=False))
    several = TrainingConfig(report_to=['tensorboard', 'trackio', 'mlflow'])
    with pytest.raises(ValueError, match=r'finetune\[trackio,mlflow\]", or leave trackio, mlflow out'):
        fit_config(several, Machine(trackio=False, mlflow=False))
    assert fit_config(several, Machine(tensorboard=False))[0].report_to==['trackio', 'mlflow']

# Kills and crowds

KILLED = """
import os, signal, sys
from sage_finetune import config
target = sys.argv[1]
{body}
"""

def killed_by(body, target):
    "Run `body` until it kills itself"
    done = python(KILLED.format(body=body), target)
    assert done.returncode==-signal.SIGKILL, done.stderr

KILL_AT_REPLACE = """
os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
config.write_json(target, dict(new=1))
"""

def test_killed_writer_leaves_the_old_file_and_the_next_one_clears_up(tmp_path):
    path = write_json(tmp_path/'f.json', dict(old=1))
    killed_by(KILL_AT_REPLACE, path)
    assert read_json(path)==dict(old=1) and len(hidden(tmp_path))==1
    write_json(path, dict(new=2))
    assert read_json(path)==dict(new=2) and hidden(tmp_path)==[]

KILL_IN_FOLDER = """
with config.whole_folder(target) as folder:
    config.write_text(folder/'weights', 'half')
    os.kill(os.getpid(), signal.SIGKILL)
"""

def test_killed_folder_never_appears(tmp_path):
    killed_by(KILL_IN_FOLDER, tmp_path/'model')
    assert not (tmp_path/'model').exists() and len(hidden(tmp_path))==1
    with whole_folder(tmp_path/'model') as folder: write_text(folder/'weights', 'whole')
    assert (tmp_path/'model'/'weights').read_text()=='whole' and hidden(tmp_path)==[]

KILL_BETWEEN_RENAMES = """
rename = config.Path.rename
def once(self, to):
    rename(self, to)
    os.kill(os.getpid(), signal.SIGKILL)
config.Path.rename = once
with config.whole_folder(target) as folder: config.write_text(folder/'weights', 'new')
"""

def test_kill_between_the_two_renames_brings_the_old_folder_back(tmp_path):
    with whole_folder(tmp_path/'model') as folder: write_text(folder/'weights', 'old')
    killed_by(KILL_BETWEEN_RENAMES, tmp_path/'model')
    assert not (tmp_path/'model').exists()
    with pytest.raises(RuntimeError):
        with whole_folder(tmp_path/'model'): raise RuntimeError
    assert (tmp_path/'model'/'weights').read_text()=='old' and hidden(tmp_path)==[]

def test_remains_of_the_living_and_of_others_stay(tmp_path):
    with whole_folder(tmp_path/'model') as mine:
        foreign = write_text(tmp_path/'.model.elsewhere.1.00000000.tmp'/'weights', 'not ours').parent
        with whole_folder(tmp_path/'model') as second: write_text(second/'weights', 'second')
        assert mine.is_dir()
        write_text(mine/'weights', 'first')
    assert (tmp_path/'model'/'weights').read_text()=='first' and hidden(tmp_path)==[foreign.name]

def test_many_writers_of_one_file(tmp_path):
    path,seen = tmp_path/'f.json', []
    def write(n):
        for _ in range(20): write_json(path, dict(n=[n]*1000))
    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    write_json(path, dict(n=[-1]*1000))
    for t in threads: t.start()
    while any(t.is_alive() for t in threads): seen.append(read_json(path)['n'])
    for t in threads: t.join()
    assert all(len(n)==1000 and len(set(n))==1 for n in seen) and hidden(tmp_path)==[]

@pytest.mark.skipif(os.name!='posix' or not hasattr(os, 'geteuid') or os.geteuid()==0, reason='root may write anywhere')
def test_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(SageError, match='choose a folder you may write to'): write_json(tmp_path/'f.json', {})
        with pytest.raises(SageError, match='choose a folder you may write to'):
            with whole_folder(tmp_path/'m'): pass
    finally: tmp_path.chmod(0o700)

def test_refusal_is_one_line_that_names_the_path(tmp_path, monkeypatch):
    def refuse(*args): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('sage_finetune.core.disk.os.replace', refuse)
    with pytest.raises(SageError) as err: TrainingConfig().save(tmp_path/'c.json')
    assert str(err.value)==f"cannot write {tmp_path/'c.json'}: permission denied; choose a folder you may write to"
    assert list(tmp_path.iterdir())==[]

def test_files_keep_the_usual_permissions(tmp_path):
    old = os.umask(0o022)
    try: assert write_text(tmp_path/'f', 'x').stat().st_mode & 0o777==0o644
    finally: os.umask(old)

# Run folder

def test_checkpoints_by_number_and_only_whole_ones(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for name in ('checkpoint-9', 'checkpoint-10', 'checkpoint-100x', 'xcheckpoint-200', 'checkpoint-',
                 'checkpoint-٣٠٠'):
        write_text(tmp_path/name/'state.json', '{}')
        mark_complete(tmp_path/name)
    (tmp_path/'checkpoint-500').mkdir()
    write_text(tmp_path/'checkpoint-600', 'a file')
    assert last_checkpoint(tmp_path).name=='checkpoint-10'

def test_names_never_leave_the_root(tmp_path):
    rng = random.Random(0)
    for _ in range(3000):
        name = ''.join(rng.choices('./\\~ab:\0\n é', k=rng.randint(0, 6)))
        try: folder = run_folder(name, tmp_path).path
        except ValueError: continue
        assert folder.parent==tmp_path and Path(os.path.abspath(folder)).parent==tmp_path and folder.name==name

def test_meta_of_only_model_and_dataset(tmp_path, monkeypatch):
    write_json(tmp_path/'run'/'finetune_meta.json', dict(model='sage-tiny', dataset='rows.json'))
    write_text(tmp_path/'rows.json', '[]')
    monkeypatch.chdir(tmp_path)
    config = config_from_meta('run')
    assert (config.model_name, config.data_path, config.output_dir)==('sage-tiny', Path('rows.json'), Path('run'))
    write_text(tmp_path/'run'/'rows.json', '[]')
    assert config_from_meta('run').data_path==Path('run/rows.json')
    assert config_from_meta('run').given=={'model_name', 'data_path', 'output_dir'}

@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '{"model": 1, "dataset": "d"}',
                                  '{"model": "", "dataset": "d"}', '\0', '{"dataset": "d"}'])
def test_broken_meta_is_one_line(text, tmp_path):
    write_text(tmp_path/'finetune_meta.json', text)
    with pytest.raises(SageError) as err: read_meta(tmp_path)
    assert str(tmp_path/'finetune_meta.json') in str(err.value) and '\n' not in str(err.value)


@pytest.mark.parametrize('name', [*PresetConfigs.fits_in])
def test_a_preset_begins_a_run_of_any_method(name):
    "What a preset leaves to the run (packing, compiling) is settled, and groups of answers are whole"
    preset = getattr(PresetConfigs, name)(seed=7)
    for kind in (PreferenceConfig, RewardConfig):
        c = kind.like(preset)
        assert (c.packing, c.torch_compile, c.seed, c.max_length)==(False, False, 7, preset.max_length)
        assert c.gradient_checkpointing==preset.gradient_checkpointing and c.load_in_4bit==preset.load_in_4bit

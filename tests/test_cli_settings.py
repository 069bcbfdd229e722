"Settings on the command line, files of settings to begin with, what is printed at the end, and how wide help is"
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sage_finetune.cli import app, main
from sage_finetune.config import LoRAConfig, PreferenceConfig, PresetConfigs, TrainingConfig
from sage_finetune.core.disk import read_json
from sage_finetune.core.text_stream import read_yaml
from sage_finetune.data import create_sample_data
from sage_finetune.runs.tasks import config_of_file, preset_settings, settings_yaml, with_settings

tree = Path(__file__).parent/'data'/'small_tree'
COMMANDS = sorted(get_command(app).commands)


def said(capsys, *args):
    status = main([str(a) for a in args])
    out = capsys.readouterr()
    assert 'Traceback' not in out.out+out.err
    return status,out.out,out.err


@pytest.fixture
def rows(tmp_path): return create_sample_data(tmp_path/'rows.jsonl', 'qa', 12)


# --- help

@pytest.mark.parametrize('command', ['', *COMMANDS])
def test_help_fits_80_columns(command, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    shown = CliRunner().invoke(app, [*([command] if command else []), '--help'], env=dict(COLUMNS='80'))
    assert shown.exit_code==0 and shown.output.startswith('Usage: ')
    assert [line for line in shown.output.splitlines() if len(line)>80]==[]


@pytest.mark.parametrize('given, said', [
    (dict(data_path='gone.jsonl'), 'data file not found: gone.jsonl'),
    (dict(eval_data_path='gone.jsonl'), 'data file not found: gone.jsonl'),
    (dict(model_name='/no/such/folder'), "model '/no/such/folder' cannot be loaded"),
    (dict(model_name='nobody/nothing'), "model 'nobody/nothing' is neither a folder here nor in the cache"),
    (dict(model_name='gone.gguf'), 'there is no file gone.gguf'),
])
def test_what_is_not_there_is_said_before_anything_heavy_is_loaded(given, said, tmp_path):
    "Loading torch, transformers and peft takes seconds"
    (tmp_path/'rows.jsonl').write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path/'settings.json').write_text(json.dumps(dict(model_name='sage-tiny', data_path='rows.jsonl',
                                                          output_dir='run') | given))
    code = ("import sys; from sage_finetune.cli import main; status = main(['run', 'settings.json']); "
            "sys.exit(3 if 'torch' in sys.modules or 'transformers' in sys.modules else status)")
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    assert done.returncode==1 and said in done.stderr and done.stderr.count('\n')==1, done
    assert not (tmp_path/'run').exists()


def test_the_version_is_told_without_loading_torch():
    code = "import sys; from sage_finetune.cli import main; main(['--version']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.startswith('sage-finetune ') and 'transformers ' in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1]=='False'


def test_the_completion_of_the_shell_is_offered(monkeypatch, tmp_path):
    monkeypatch.setattr('sage_finetune.core.run_folder.default_output_dir', tmp_path)
    (tmp_path/'office').mkdir()
    (tmp_path/'office'/'finetune_meta.json').write_text(json.dumps(dict(model='sage-tiny', dataset='rows.json')))
    asked = dict(_SAGE_FINETUNE_COMPLETE='complete_bash', COMP_WORDS='sage-finetune merge of', COMP_CWORD='2')
    found = CliRunner().invoke(app, [], prog_name='sage-finetune', env=asked)
    assert 'office' in found.output.split()
    assert '--install-completion' in CliRunner().invoke(app, ['--help']).output


# --- settings by hand

five = '--lr', '3e-4', '--epochs', '2', '--max-steps', '1', '--batch-size', '3', '--rank', '4'


def arrived(folder):
    "What the five short forms and --set became"
    c = read_json(folder/'training_config.json')
    lora = read_json(folder/'lora_weights'/'adapter_config.json')
    return (c['learning_rate'], c['num_train_epochs'], c['max_steps'], c['per_device_train_batch_size'], c['lora']['r'],
            c['weight_decay'], lora['r'], lora['use_rslora'])


def test_settings_arrive_by_start_and_by_run(rows, tmp_path, capsys):
    by_hand = *five, '--set', 'weight_decay=0.1', '--set', 'lora.use_rslora=true'
    status,_,error = said(capsys, 'start', '--task', 'qa', '--data', rows, '--output', tmp_path/'a', '--auto', *by_hand)
    assert status==0, error
    wanted = (3e-4, 2, 1, 3, 4, .1, 4, True)
    assert arrived(tmp_path/'a')==wanted
    TrainingConfig(model_name='sage-tiny', data_path=rows, output_dir=tmp_path/'b', optim='adamw_torch',
                   load_in_8bit=False).save(tmp_path/'b.json')
    status,_,error = said(capsys, 'run', tmp_path/'b.json', *by_hand)
    assert status==0, error
    assert arrived(tmp_path/'b')==wanted


def printed_commands(text):
    "The commands below the words that a quickstart ends with: indented lines, for any shell as they stand"
    lines = [line.strip() for line in text[text.index('Next, '):].splitlines() if line.startswith('  ')]
    assert [shlex.split(line) for line in lines]==[line.split() for line in lines] and not any('#' in s for s in lines)
    return [line.split() for line in lines]


def test_settings_arrive_by_quickstart_and_what_it_prints_can_be_typed(tmp_path, capsys, monkeypatch):
    status,out,error = said(capsys, 'quickstart', 'code', '--data', tree, '--max-facts', 3, '--output', tmp_path/'run',
                            *five, '--set', 'weight_decay=0.1', '--set', 'lora.use_rslora=true')
    assert status==0, error
    assert arrived(tmp_path/'run')==(3e-4, 2, 1, 3, 4, .1, 4, True)
    chat,again,examples = printed_commands(out)
    assert chat==['sage-finetune', 'chat', str(tmp_path/'run')]
    assert again==['sage-finetune', 'quickstart', 'code', '--data', '.']
    monkeypatch.setattr(sys, 'stdin', io.StringIO('What is it?\n'))
    status,out,error = said(capsys, *chat[1:], '--max-new-tokens', 4)
    assert status==0, error
    assert said(capsys, *examples[1:])[0]==0


@pytest.mark.slow
def test_what_a_quickstart_prints_runs_as_printed(program, tmp_path):
    "From a folder of code, as a newcomer would: each command, in the order in which they stand"
    shutil.copytree(tree, tmp_path, dirs_exist_ok=True)
    first = program('quickstart', 'code', '--max-facts', 3, '--max-steps', 1)
    assert first.returncode==0, first.stderr
    commands = printed_commands(first.stdout)
    assert len(commands)==3
    for words in commands:
        done = program(*words[1:], stdin='What is it?\n')
        assert done.returncode==0, done.stderr


def test_settings_reach_several_processes(rows, tmp_path, capsys):
    TrainingConfig(model_name='sage-tiny', data_path=rows, output_dir=tmp_path/'run').save(tmp_path/'a.json')
    status,out,_ = said(capsys, 'run', tmp_path/'a.json', '--nproc', 2, '--dry-run', '--rank', 4)
    assert status==0 and 'settings.json' in out


@pytest.mark.parametrize('args,says', [
    (('--set', 'rank=4'), 'unknown setting `rank`; did you mean `lora.r`?'),
    (('--set', 'alpha=4'), 'did you mean `lora.lora_alpha`?'), (('--set', 'lora.rank=4'), 'did you mean `r`?'),
    (('--set', 'lr=1'), 'did you mean `learning_rate`?'), (('--set', 'epochs=1'), 'did you mean `num_train_epochs`?'),
    (('--set', 'batch_size=1'), 'did you mean `per_device_train_batch_size`?'),
    (('--set', 'learning_rate'), '`--set` must be NAME=VALUE'),
    (('--set', 'lora.r=many'), '`r` must be a whole number'),
    (('--set', 'lore.r=3'), 'unknown block of settings `lore`'), (('--lr', '-1'), '`learning_rate` must be above 0'),
    (('--lr', '1e-4', '--set', 'learning_rate=1'), 'stands twice'), (('--set', 'columns={"a"'), 'is not JSON'),
    (('--preset', 'a10'), 'unknown preset `a10`')])
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(args, says, rows, tmp_path, capsys):
    start = 'start', '--task', 'qa', '--data', rows, '--output', tmp_path/'run', '--auto'
    status,_,error = said(capsys, *start, *args)
    assert status and says in error and error.count('\n')==1 and not (tmp_path/'run').exists()


@pytest.mark.parametrize('name,meant', dict(
    batch_size='per_device_train_batch_size', epochs='num_train_epochs', lr='learning_rate', rank='lora.r',
    alpha='lora.lora_alpha', dropout='lora.lora_dropout', max_seq_length='max_length', cutoff_len='max_length',
    lora_r='lora.r', model='model_name').items())
def test_habitual_names_are_understood_in_the_error(name, meant):
    with pytest.raises(ValueError, match=f'did you mean `{meant}`'): TrainingConfig(**{name: 1})


def test_habitual_names_of_the_adapter():
    with pytest.raises(ValueError, match='did you mean `r`'): LoRAConfig(rank=1)
    with pytest.raises(ValueError, match='did you mean `lora_alpha`'): TrainingConfig(lora=dict(alpha=1))


@pytest.mark.parametrize('preset', [*PresetConfigs.fits_in])
def test_a_preset_gives_way_to_what_was_given_by_hand(preset):
    plain = getattr(PresetConfigs, preset)()
    assert with_settings(TrainingConfig(), {}, preset)==plain
    mine = with_settings(TrainingConfig(max_length=77, lora=dict(r=3)), dict(gradient_accumulation_steps='5'), preset)
    assert (mine.max_length, mine.lora.r, mine.gradient_accumulation_steps)==(77, 3, 5)
    assert not ({*preset_settings(preset)}-{'max_length', 'gradient_accumulation_steps', 'lora'}) & mine.given


# --- a file to begin with

@pytest.mark.parametrize('config', [
    TrainingConfig(),
    TrainingConfig(model_name='sage-tiny', lora=dict(r=16, use_rslora=True), columns=dict(a='question')),
    PreferenceConfig(method='kto', beta=.2), PresetConfigs.minimal(data_path='rows.jsonl')])
def test_the_printed_file_is_the_config_it_was_printed_from(config, tmp_path):
    (tmp_path/'a.yaml').write_text(text := settings_yaml(config))
    assert config_of_file(tmp_path/'a.yaml')==config
    told = 'train it with', 'What follows'
    lines = [line for line in text.splitlines() if not any(t in line for t in told)]
    every = '\n'.join(line.replace('# ', '', 1) if line.strip().startswith('# ') else line for line in lines)
    (tmp_path/'b.yaml').write_text(every) # every comment taken away
    assert config_of_file(tmp_path/'b.yaml')==config
    assert all('# ' in line for line in text.splitlines()[1:] if line.strip())


def test_config_prints_and_checks(rows, tmp_path, capsys):
    status,out,_ = said(capsys, 'config', '--model', 'sage-tiny', '--data', rows, '--preset', 'cpu', '--set', 'seed=7')
    assert status==0
    (tmp_path/'a.yaml').write_text(out)
    assert read_yaml(tmp_path/'a.yaml')['seed']==7
    status,out,_ = said(capsys, 'config', tmp_path/'a.yaml')
    assert status==0 and 'given by hand' in out
    (tmp_path/'b.yaml').write_text('model_name: sage-tiny\nrank: 4\n')
    status,_,error = said(capsys, 'config', tmp_path/'b.yaml')
    assert status==1 and 'did you mean `lora.r`' in error
    (tmp_path/'c.yaml').write_text(f'model_name_or_path: sage-tiny\ndataset_name: {rows}\noutput_dir: x\n'
                                   f'use_peft: true\n')
    status,out,_ = said(capsys, 'config', tmp_path/'c.yaml')
    assert status==0 and 'a config of TRL' in out and not Path('x').exists()


# --- what is printed works as printed

def test_the_commands_that_are_printed_can_be_typed(tmp_path, monkeypatch):
    from sage_finetune.cli import _short
    from sage_finetune.core.machine import program_name
    here = tmp_path/'a b'/'.venv'/'bin'/'sage-finetune'
    here.parent.mkdir(parents=True)
    here.write_text('#!/bin/sh\n')
    here.chmod(0o755)
    monkeypatch.chdir(tmp_path/'a b')
    monkeypatch.setattr(sys, 'argv', [str(here)])
    monkeypatch.setenv('PATH', '/usr/bin')
    assert program_name()=='.venv/bin/sage-finetune' # as after `make quickstart`
    monkeypatch.setenv('PATH', f'{here.parent}:/usr/bin')
    assert program_name()=='sage-finetune' # where a shell finds it
    monkeypatch.setattr(sys, 'argv', ['pytest'])
    assert program_name()=='sage-finetune'
    assert _short(tmp_path/'a b')==f"'{tmp_path}/a b'"


def test_short_options_of_earlier_days(rows, tmp_path, capsys):
    status,_,error = said(capsys, 'start', '-t', 'qa', '-m', 'sage-tiny', '-d', rows, '-o', tmp_path/'run', '--auto',
                          '--max-steps', 1)
    assert status==0, error
    assert said(capsys, 'merge', tmp_path/'run', '-o', tmp_path/'merged', '--rows', 0)[0]==0
    assert 'trained' in said(capsys, 'list', '-d', tmp_path)[1]
    assert said(capsys, 'clean', tmp_path/'run', '-f')[0]==0 and not (tmp_path/'run').exists()

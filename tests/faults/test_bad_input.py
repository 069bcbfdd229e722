"""Settings, files of other tools, records, rows and requests that nobody should write, made by the hundred

Whatever a person, a tool or a damaged disk puts into a file is taken with a reason or refused in one line. Each family
is tried with a few dozen files in `make test`; `make test-slow` tries two thousand in all.
"""
import copy
import json
import random
import warnings
from pathlib import Path

import pytest

from sage_finetune.config import config_from_meta, SageError
from sage_finetune.core.machine import last_words
from sage_finetune.core.run_folder import list_runs, RunFolder
from sage_finetune.core.settings import value_words
from sage_finetune.serving import request
from sage_finetune.rows.formats import to_messages
from sage_finetune.runs.run import compare, Run
from sage_finetune.runs.tasks import config_of_file

deep = [1]
for _ in range(400): deep = [deep]
odd = [None, [], {}, '', ' ', 'x', -1, 0, 1, 2**63, 10**400, -10**400, 1e308, -0.5, float('inf'), float('nan'),
       True, False, [1, 2],
       ['a', None], {'a': {'b': []}}, {'': 0}, deep, 'caf\udce9', '\x00', '\x1b[2J\x1b[31m', '\u202egpj', 'x'*5000,
                                                            '../../etc',
       '/dev/null', '10**400', '1e400', 'null', '微调', [[]], [{}], '{"a": 1}', '${HOME}', '<b>', 'true']


def changed(given, chance, times=2):
    "A copy of an object with a few values replaced, keys renamed or left out"
    out = json.loads(json.dumps(given))
    for _ in range(chance.randint(1, times)):
        at = out
        while True:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            if not keys: break
            key = chance.choice(list(keys))
            if isinstance(at[key], (dict, list)) and at[key] and chance.random()<.6:
                at = at[key]
                continue
            what = chance.random()
            if what<.7: at[key] = copy.deepcopy(chance.choice(odd))
            elif isinstance(at, dict) and what<.85: at[chance.choice(['', 'x', ' '+key, key.upper(),
                                                            '\x1b[2J'])] = at.pop(key)
            else: at.pop(key)
            break
    return out


def damaged(text, chance):
    "Text as bytes, cut, with bytes turned, doubled or put in"
    data = bytearray(text.encode('utf-8', 'backslashreplace'))
    for _ in range(chance.randint(1, 3)):
        at,what = chance.randrange(len(data)+1), chance.random()
        if what<.3: del data[at:]
        elif what<.6 and at<len(data): data[at] ^= 1<<chance.randrange(8)
        elif what<.8: data[at:at] = data[max(0, at-20):at]
        else: data[at:at] = chance.choice([b'\x00', b'\xff', b'{', b'"', b'[', b'&a ', b'*a', b'\n', b': ', b'\xe5'])
    return bytes(data)


def text_of(value, chance):
    return damaged(json.dumps(value), chance) if chance.random()<.3 else json.dumps(value).encode()


def in_words(work):
    "What a command would say of `work`: None, or one line; anything but a refusal in words is a fault of ours"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: work()
        except (SageError, ValueError, OSError) as e:
            line,status = last_words(e)
            assert status==1 and line.startswith('error: ') and '\x1b' not in line and len(line)<3000, line
            return line


ours = dict(model_name='sage-tiny', data_path='rows.json', output_dir='run', max_steps=4, learning_rate=1e-3,
            num_train_epochs=2,
            per_device_train_batch_size=2, seed=1, fp16=False, lora=dict(r=4, target_modules='all-linear',
                                                            lora_dropout=.1),
            save_steps=2, test_size=.1, columns=dict(frage='question'), report_to='none', optim='adamw_torch')
factory = dict(model_name_or_path='sage-tiny', stage='sft', do_train=True, finetuning_type='lora',
               lora_target='all', lora_rank=8,
               dataset='mine', dataset_dir='.', template='qwen', cutoff_len=128, output_dir='out', max_steps=1,
                   val_size=.1,
               learning_rate=1e-4, quantization_bit=None, lora_alpha=16, mix_strategy='concat', warmup_ratio=.1,
                   bf16=True)
trl = dict(model_name_or_path='sage-tiny', output_dir='out', use_peft=True, dataset_name='rows.json', lora_r=8,
           lora_alpha=16,
           lora_target_modules=['q_proj'], learning_rate=2e-4, max_length=128, warmup_steps=0,
               assistant_only_loss=True)
described = dict(mine=dict(file_name='rows.json', formatting='alpaca', columns=dict(prompt='instruction',
                                                            response='output'),
                           num_samples=2, split='train'))
meta = dict(task_type='qa', model='sage-tiny', framework='native', format='qa', dataset='rows.json', output_dir='run',
            config=dict(learning_rate=1e-3, lora=dict(r=8)))
records = {'training_config.json': ours | dict(_given=['seed'], _changes=[dict(setting='fp16', asked=1, used=0,
                                                            reason='x')],
                                               _versions=dict(torch='2'), _machine='cpu', _data='a-b'),
           'results.json': dict(steps=4, loss_before=2.0, loss_after=1.5, train_loss=1.2, seconds=3.0, best_step=2),
           'data_report.json': dict(read=4, used=3, dropped=[dict(line=2, reason='too long', file='a')], tokens=10,
                                    examples=3,
                                    held_out=1, learned_tokens=4, longest=5, notes=['a note']),
           'finetune_meta.json': meta}
rows = [dict(instruction=f'{i}?', input='', output=f'{i}!') for i in range(4)]
talk = dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='b', tool_calls=[
    dict(id='x', type='function', function=dict(name='f', arguments=dict(a=1)))]), dict(role='tool', content='1',
                                                            tool_call_id='x'),
    dict(role='assistant', content=[dict(type='text', text='c')])], tools=[dict(type='function',
                                                            function=dict(name='f'))])
asked = dict(model='code', messages=[dict(role='user', content='hi')], max_tokens=5, temperature=.5, stop=['a'],
             stream=False, n=1,
             seed=3, logprobs=False, tools=[], tool_choice='none', response_format=dict(type='text'),
                 stream_options=None)


def settings_file(kind):
    def work(folder, chance):
        given = dict(ours=ours, factory=factory, trl=trl)[kind]
        (folder/'rows.json').write_text(json.dumps(rows))
        about = changed(described, chance) if kind=='factory' and chance.random()<.5 else described
        (folder/'dataset_info.json').write_text(json.dumps(about))
        file = folder/f'given.{chance.choice(["json", "yaml"])}'
        file.write_bytes(text_of(changed(given, chance) if given is not factory or chance.random()<.7 else given,
                                 chance))
        in_words(lambda: config_of_file(file, quiet=True))
    return work


def meta_file(folder, chance):
    (folder/'finetune_meta.json').write_bytes(text_of(changed(meta, chance), chance))
    (folder/'rows.json').write_text(json.dumps(rows))
    in_words(lambda: config_from_meta(folder))


def record_files(folder, chance):
    for name in ('one', 'two'):
        run = RunFolder(folder/name)
        run.path.mkdir()
        for file,content in records.items():
            worse = changed(content, chance) if chance.random()<.5 else content
            (run.path/file).write_bytes(text_of(worse, chance) if chance.random()<.5 else json.dumps(worse).encode())
        lines = [json.dumps(dict(step=i, loss=2.0-i/10, epoch=i/4)) for i in range(4)]
        run.metrics.write_bytes(damaged('\n'.join(lines)+'\n',
                                        chance) if chance.random()<.5 else '\n'.join(lines).encode())
    in_words(lambda: list_runs(folder))
    for work in (lambda: str(Run(folder/'one')), lambda: Run(folder/'one')._repr_html_(),
                 lambda: Run(folder/'one').data_report,
                 lambda: compare(folder/'one', folder/'two')): in_words(work)


def one_row(folder, chance): in_words(lambda: to_messages(changed(talk, chance, 3), chance.choice([None,
                                                            'messages'])))


def one_request(folder, chance):
    "What the server's process makes of a body: a request, or a status of 4xx"
    try: request.read_request(request.read_body(text_of(changed(asked, chance, 3), chance)), 'code')
    except request.BadRequest as e: assert e.status in range(400, 500)


families = dict(ours=settings_file('ours'), factory=settings_file('factory'), trl=settings_file('trl'),
                meta=meta_file,
                records=record_files, row=one_row, request=one_request)


@pytest.mark.parametrize('family', families)
@pytest.mark.parametrize('part', [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 11))])
def test_what_nobody_should_write_is_refused_in_one_line(family, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for i in range(30):
        chance = random.Random(f'{family}-{part}-{i}')
        (folder := tmp_path/str(i)).mkdir()
        try: families[family](folder, chance)
        except Exception as e:
            files = {p.name: value_words(p.read_bytes()) for p in folder.rglob('*') if p.is_file()}
            raise AssertionError(f'{family}-{part}-{i}: {type(e).__name__}: {e}; {files}') from e


@pytest.mark.parametrize('key,value', [('_data', {'a': 1}), ('_versions', {'torch': ['2']}),
                                       ('_versions', {'peft': {}}), ('_machine', ['cpu'])])
def test_records_of_another_form_are_compared_as_text_or_refused(tmp_path, key, value):
    for name in ('one', 'two'):
        (tmp_path/name).mkdir()
        for file,content in records.items():
            worse = content | {key: value} if name=='one' and file=='training_config.json' else content
            (tmp_path/name/file).write_text(json.dumps(worse))
        (tmp_path/name/'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
    said = in_words(lambda: str(compare(tmp_path/'one', tmp_path/'two')))
    assert said is None or key in said or 'one' in said

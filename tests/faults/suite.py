"""Operations and faults: what is done, where it is broken, and what is held against what came of it

Each fault that is tried is one line of a log (`SAGE_FAULTS_LOG`), under a checksum of the code; a suite that was
interrupted goes on where it was. `table.py` makes the table of it.
"""
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

from inject import signal_of, stops
from quick import two_layers
from rooms import lies_in, Room, Wanted
import sage_finetune
from sage_finetune.config import LoRAConfig, TrainingConfig
from sage_finetune.core.machine import goes_on
from sage_finetune.core.run_folder import write_meta
from sage_finetune.rows.formats import create_sample_data

# What is said to `sage-finetune`, and the state that it begins with
operations = dict(
    train=(['run', 'run'], 'asked'),
    merge=(['merge', 'run', '--rows', '2'], 'trained'),
    export=(['export', 'run', '--output', 'out'], 'merged'),
    export_adapter=(['export', 'run', '--adapter', '--output', 'out', '--base', 'someone/base'], 'merged'),
    clean=(['clean', 'run', '--force', '--for-good'], 'merged'),
    serve=(['serve', 'run', '--engine', 'native', '--port', '0', '--max-new-tokens', '4'], 'merged'),
    quickstart=(['quickstart', 'qa', '--data', 'few.jsonl', '--model', two_layers, '--output', 'quick'], 'asked'),
    inspect=(['inspect', 'rows.jsonl', '--model', two_layers, '--plot', 'lengths.png'], 'asked'),
    compare=(['compare', 'run', 'other', '--plot', 'curves.png'], 'two'),
    list=(['list', '--dir', '.'], 'two'),
    verify=(['verify', 'run', '--output', 'verified.json'], 'trained'))
# Two processes at once: the first stands still at a moment while the second runs; the state, and what both say
pairs = dict(
    train_train=('asked', 'train', 'train'), merge_merge=('trained', 'merge', 'merge'),
    export_export=('merged', 'export', 'export'), train_clean=('asked', 'train', 'clean'),
    clean_train=('merged', 'clean', 'train'), merge_clean=('trained', 'merge', 'clean'),
    clean_merge=('merged', 'clean', 'merge'), export_clean=('merged', 'export', 'clean'),
    merge_export=('merged', 'merge', 'export'), same_cache=('both', 'train', 'other'),
    same_damaged_cache=('damaged', 'train', 'other'))
words_of = {name: words for name,(words,_) in operations.items()} | dict(other=['run', 'other'])
done = ('stopped after the last step; the run is complete|stopped; nothing more was done|'
        'and the same command begins again|the same command serves again|the same command, with a new folder')


def code():
    "A checksum of the package and of what tries it"
    h,files = hashlib.sha256(),[*Path(sage_finetune.__file__).parent.rglob('*.py'), *Path(__file__).parent.glob('*.py')]
    for p in sorted(p for p in files if p.name!='table.py'): h.update(p.read_bytes())
    return h.hexdigest()[:12]


class Suite:
    "A room, its states, and what each operation comes to without a fault"
    def __init__(self, folder):
        self.room,self.wanted,self.first,self.moments = Room(folder),{},{},{}
        data = create_sample_data(self.room.path/'rows.jsonl', 'qa', num_samples=24)
        (self.room.path/'few.jsonl').write_text(''.join(open(data, encoding='utf-8').readlines()[:6]))
        config = TrainingConfig(model_name=two_layers, data_path='rows.jsonl', output_dir='run', test_size=0.25,
                                max_steps=4, save_steps=2, eval_steps=2, logging_steps=1, per_device_train_batch_size=4,
                                gradient_accumulation_steps=1, learning_rate=5e-3, report_to='none', load_in_8bit=False,
                                fp16=False, lora=LoRAConfig(r=4, lora_dropout=0.1))
        write_meta(self.room.path/'run', two_layers, data, task_type='qa', config=config)
        (self.room.path/'run'/'mine.txt').write_text('not of the package')
        self.room.keep('asked')
        self.make('trained', ['run', 'run'])
        self.make('merged', operations['merge'][0])
        self.room.begin('trained')
        shutil.copytree(self.room.path/'run', self.room.path/'other')
        self.room.keep('two')

        self.room.begin('asked')
        write_meta(self.room.path/'other', two_layers, data, task_type='qa', config=config)
        self.room.keep('both')
        assert self.room.run(['run', 'other']).status==0
        shutil.rmtree(self.room.path/'other')
        shutil.copytree(self.room.store/'both'/'other', self.room.path/'other')
        for arrow in self.room.path.glob('cache/data/*/examples.arrow'):
            held = bytearray(arrow.read_bytes())
            held[len(held)//2] ^= 1
            arrow.write_bytes(held)
        self.room.keep('damaged')

    def make(self, state, words):
        came = self.room.run(words)
        assert came.status==0, came.said
        self.room.keep(state)

    def usual(self, name):
        "What an operation comes to: it is done twice, once counted"
        if name in self.wanted: return self.wanted[name]
        words,begins = operations[name]
        came,lie = [],[]
        for _ in range(2):
            self.room.begin(begins)
            came.append(self.room.run(words))
            lie.append(lies_in(self.room.path))
        for one in came: assert one.status==(143 if name=='serve' else 0), (one.status, one.said)
        self.first[name],self.moments[name] = came[1],came[1].moments
        self.wanted[name] = Wanted(*lie)
        return self.wanted[name]

    def row(self, name, at):
        "The row of the table that a moment belongs to"
        return name if name!='train' or not at else self.moments['train'][at-1][1]

    def points(self, name, mode, most):
        "Some moments of an operation, spread over its rows: (row, moment)"
        self.usual(name)
        chance = random.Random(f'{name}-{mode}')
        if mode=='anywhen':
            n = most if most<10**6 else 60
            cpu = self.first[name].cpu*1000
            return [(name, max(1, round(cpu*(i+chance.random())/n))) for i in range(n)]
        rows = {}
        for at in range(1, len(self.moments[name])+1): rows.setdefault(self.row(name, at), []).append(at)
        found = []
        for row,all_ in rows.items():
            n = min(most, len(all_))
            found += [(row, all_[min(len(all_)-1, int((i+chance.random())*len(all_)/n))]) for i in range(n)]
        return found

    def one(self, name, mode, at):
        "What comes of one fault, and of the same command afterwards: (outcome, words)"
        self.usual(name)
        words,begins = operations[name]
        self.room.begin(begins)
        came = self.room.run(words, mode, at)
        if came is None: return 'hangs', ''
        fault = self.after_fault(name, mode, at, came)
        if fault: return fault
        again = self.room.run(words)
        if again is None: return 'hangs', 'the second time'
        return self.after_again(name, came, again) or ('survived', came.last if came.status else '')

    def after_fault(self, name, mode, at, came):
        said = came.said[-700:]
        if 'Traceback' in came.said or 'fault of sage_finetune' in came.said: return 'traceback', said
        if mode=='clock' and came.status not in (0, 143): return 'other', f'the clock matters: {said}'
        found,before = lies_in(self.room.path),lies_in(self.room.store/operations[name][1])
        if name!='clean' and (lost := self.lost(name, found, before)): return 'lost work', lost
        asked = signal_of(at) if mode=='anywhen' else mode
        if asked in stops:
            if came.status not in (0, stops[asked], 143 if name=='serve' else 0):
                return 'silent', f'status {came.status}: {said}'
            stopped = came.status and (name!='serve' or came.answer is None)
            if stopped and not (goes_on in came.last or re.search(done, came.last)):
                return 'silent', f'no word of where it stopped: {said}'
        refused = came.status!=(143 if name=='serve' else 0)
        if mode in ('denied', 'full', 'half') and refused and not self.in_one_line(came): return 'silent', said
        if mode=='dies' or refused: return None
        return self.wrong(name, came, found)

    def in_one_line(self, came):
        "The last line is an error that names a place, and what to do"
        return came.last.startswith('error: ') and re.search(r'[;:,] ?[a-z`(]', came.last[7:])

    def lost(self, name, found, before):
        "What was there, is of use, and is gone or another: weights, rows, settings of a person"
        keep = lambda f: f.startswith(('run/lora_weights/adapter_model', 'other/', 'rows', 'few')) or f.endswith(
            ('mine.txt', 'finetune_meta.json')) or name!='merge' and f.startswith('run/merged_model/')
        gone = (f for f,values in before.items() if keep(f) and found.get(f)!=values)
        return next((f'{f} is gone or another' for f in gone), None)

    def wrong(self, name, came, found):
        "Whether what is said to be done is not as it should be"
        usual = self.first[name]
        if name=='serve':
            return None if came.answer in (None, usual.answer) else ('wrong result', f'answer {came.answer!r}')
        if name=='clean': return None
        results = lambda f: not f.startswith('cache/') and '/.' not in f
        if differs := self.wanted[name].differs(found, results):
            # the clock that went back is in what is written; what could not be written must have been told
            told = re.search('note: |warning|cannot write', came.said)
            if not told: return 'wrong result', f'{differs}; {came.said[-300:]}'
        return None

    def after_again(self, name, came, again):
        said = again.said[-700:]
        if 'Traceback' in again.said: return 'traceback', f'the second time: {said}'
        if name=='clean':
            # what is not of a run stays, and perhaps the lock, where it was its removal that failed
            run = self.room.path/'run'
            left = sorted(p.name for p in run.iterdir() if p.name not in ('.lock', '.lock.held'))
            if left!=['mine.txt']: return 'does not go on', f'left {left}: {said}'
            return None
        if again.status!=(143 if name=='serve' else 0): return 'does not go on', said
        if name=='serve' and again.answer!=self.first[name].answer: return 'wrong result', again.answer
        differs = self.wanted[name].differs(lies_in(self.room.path))
        return ('wrong result', f'afterwards: {differs}') if differs else None


    def pair_points(self, name, most):
        "Some moments of the first process of two"
        begins,first,_ = pairs[name]
        if name not in self.moments: # reads of the cache are moments too
            self.room.begin(begins)
            came = self.room.run(words_of[first], 'waits', 10**9)
            self.moments[name] = came.moments
        n = self.moments[name]
        chance,some = random.Random(name), min(most, n)
        return [min(n, 1+int((i+chance.random())*n/some)) for i in range(some)]

    def two(self, name, at):
        "What comes of two processes, and of the same commands afterwards: (outcome, words)"
        begins,first,second = pairs[name]
        self.room.begin(begins)
        before = lies_in(self.room.store/begins)
        one = self.room.start(words_of[first], 'waits', at)
        stands = one.until_it_waits()
        two = self.room.start(words_of[second])
        other = two.end(60) # it may wait for the first
        if stands: one.go_on()
        came = [one.end(), other or two.end()]
        if None in came: return 'hangs', ''
        said = ' | '.join(c.last for c in came)
        for c in came:
            if 'Traceback' in c.said or 'fault of sage_finetune' in c.said: return 'traceback', c.said[-700:]
            if c.status and not self.in_one_line(c): return 'silent', c.said[-300:]
        if all(c.status for c in came): return 'other', f'neither has come to an end: {said}'
        if 'damaged' in came[0].said+came[1].said and begins!='damaged': return 'wrong result', said
        if lost := self.lost_by_two(before, (first, second), came): return 'lost work', f'{lost}; {said}'
        return self.after_two((first, second), came) or ('survived', said)

    def lost_by_two(self, before, names, came):
        found = lies_in(self.room.path)
        keep = [f for f in before if f.endswith('mine.txt') or 'clean' not in names
                and f.endswith(('adapter_model.safetensors', 'rows.jsonl', 'finetune_meta.json'))]
        if gone := [f for f in keep if found.get(f)!=before[f]]: return f'{gone[0]} is gone or another'
        if 'clean' not in names: return None
        cleaned,worked = (came[names.index(n)].status==0 for n in ('clean', next(n for n in names if n!='clean')))
        made = [f for f in found if f.startswith('run/') and f!='run/mine.txt' and '.lock' not in f]
        if worked and names[0]!='clean' and not cleaned and not made: return 'it was removed, and nobody said so'
        whole = 'run/finetune_meta.json' in found or 'run/training_config.json' in found
        return f'{made[0]} is there, and no run that it belongs to' if made and not whole else None

    def after_two(self, names, came):
        "Both commands once more, one after the other"
        if 'clean' in names and came[names.index('clean')].status==0:
            again = self.room.run(words_of['clean'])
            left = sorted(p.name for p in (self.room.path/'run').iterdir() if not p.name.startswith('.lock'))
            return None if left==['mine.txt'] else ('does not go on', f'left {left}: {again.last}')
        for name in (n for n in names if n!='clean'):
            again = self.room.run(words_of[name])
            if again.status: return 'does not go on', again.said[-500:]
        found = lies_in(self.room.path)
        for name in (n for n in names if n not in ('clean', 'other')):
            mine = lambda f: not f.startswith(('cache/', 'other/', 'out/' if name=='merge' else 'other/'))
            differs = self.wanted[name].differs(found, mine)
            if differs: return 'wrong result', f'afterwards: {differs}'
        if 'other' in names:
            weights = [found[f'{n}/lora_weights/adapter_model.safetensors'] for n in ('run', 'other')]
            if weights[0]!=weights[1]: return 'wrong result', 'the two runs differ'


def log_file():
    return Path(os.environ.get('SAGE_FAULTS_LOG') or Path(os.environ['SAGE_TESTS'])/'faults.jsonl')

def tried(log, version):
    "{(operation, mode, moment): outcome} of a log, of this code"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {(l['operation'], l['mode'], l['at']): l['outcome'] for l in lines if l['code']==version}

def note(log, **what):
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') as f: f.write(json.dumps(what)+'\n')

"""One byte is flipped in every file of a finished run, of what was made from it, and of the cache, one after the other

Each reader of the file then says so, or comes to what it came to before. `pytest -s -m slow
tests/runs/test_run_flipped_bytes.py` prints the table: for each file at how many places the byte was told, at how many
it was harmless (and why), and at how many it was silent. The fast part takes a few files of each kind.
"""
import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from quick import two_layers
from sage_finetune.core.disk import SageError
from sage_finetune.core.run_folder import list_runs, RunFolder, write_meta
from sage_finetune.serving.export import export_folder
from sage_finetune.inference.generate import load_for_chat
from sage_finetune.inference.merging import merge_run
from sage_finetune.serving.serve import _check_served, what_to_serve
from sage_finetune.base.loading import load_tokenizer
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.runs.run import Run
from sage_finetune.runs.tasks import trainer_of
from sage_finetune.runs.verify import verify_resume

harmless = {'README.md': 'text for people; no program reads it',
            'loss.png': 'a picture, drawn again by every run; what it shows is in metrics.jsonl',
            'tfevents': "TensorBoard's own file; nothing here reads it",
            'training_args.bin': 'read by nothing here; told where a checkpoint is gone on from'}

settings = dict(test_size=.1, max_steps=6, save_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                learning_rate=5e-3, logging_steps=2, report_to='tensorboard', lora=dict(r=4, lora_dropout=.1))


# What each reader comes to

def digest(obj): return hashlib.sha256(json.dumps(obj, sort_keys=True, default=str).encode()).hexdigest()
def bytes_of(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}

def model_of(loaded):
    "The numbers of a loaded model, how it writes a conversation, and when it stops"
    model,tokenizer = loaded
    h = hashlib.sha256()
    for n,t in sorted(model.state_dict().items()):
        h.update(n.encode()+t.contiguous().view(torch.uint8).numpy().tobytes())
    text = tokenizer.apply_chat_template([dict(role='user', content='Add 1 and 2.\n好')], tokenize=False)
    ids,settings = tokenizer(text)['input_ids'],model.generation_config.to_dict()
    return h.hexdigest(),text,ids,digest(tokenizer.get_vocab()),settings

def chat(place): return model_of(load_for_chat(place.run, adapter=True))
def chat_merged(place): return model_of(load_for_chat(place.run))
def chat_exported(place): return model_of(load_for_chat(place.run/'exported'/'adapter', base=two_layers))

def merge(place):
    merge_run(place.run, place.run.parent/'again', rows=1)
    made = bytes_of(place.run.parent/'again')
    shutil.rmtree(place.run.parent/'again')
    return {n: d for n,d in made.items() if n not in ('checksums.json', 'merge_report.json')} # which name the time

def exported(kind):
    def export(place):
        made = bytes_of(export_folder(place.run, place.run.parent/'out', kind, base='me/two-layers'))
        shutil.rmtree(place.run.parent/'out')
        return made
    export.__name__ = f'export_{kind}'
    return export

def served(adapter):
    def serve(place):
        for note in _check_served(what_to_serve(place.run, adapter)): warnings.warn(note) # lines of its log
        return True
    serve.__name__ = 'serve_adapter' if adapter else 'serve_merged'
    return serve

def outcome(folder):
    from sage_finetune.training.callbacks import read_metrics
    f = RunFolder(folder)
    adapter = (f.lora_weights/'adapter_model.safetensors').read_bytes().hex()
    losses = [(m['step'], k, m[k]) for m in read_metrics(f.metrics) for k in ('loss', 'eval_loss') if k in m]
    results = {k: v for k,v in json.loads(f.results.read_text()).items() if k!='seconds'}
    return digest([adapter, losses, results])

def go_on(place):
    "The same command for a finished run"
    said,trainer = [],trainer_of(place.run, quiet=True)
    trainer.say = lambda what: said.append(str(what))
    trainer.train()
    for line in said:
        if 'passed over' in line: warnings.warn(line)
    return outcome(place.run)

def go_on_cut_off(place):
    "The same command for a run that was killed after its first checkpoint"
    f = RunFolder(place.run)
    for p in (f.lora_weights, f.merged_model, f.checkpoints/'checkpoint-6'): shutil.rmtree(p)
    for p in (f.results, f.loss_curve, place.run/'checksums.json'): p.unlink()
    return go_on(place)

def listed(place):
    found = [(i.name, i.task, i.model, i.state, i.loss) for i in list_runs(place.run.parent)]
    for _,_,_,state,_ in found: # the list has a place for words
        if ',' in state or ':' in state: warnings.warn(state)
    return found
def read_back(place):
    run = Run(place.run)
    report = run.data_report
    return digest([run.config.to_dict(), run.results, run.metrics, report and report.to_dict(), run.machine])
def verified(place):
    found = verify_resume(place.run)
    if found.faults: warnings.warn('; '.join(found.faults))
    return [str(c) for c in found.compared]

def prepared(place):
    "A new run on the same rows, prepared before"
    trainer = trainer_of(place.run, quiet=True)
    trainer.tokenizer = load_tokenizer(two_layers)
    trainer.prepare_data()
    return digest([list(trainer.dataset), list(trainer.eval_dataset), trainer.data_report.examples])

chat_readers = chat, served(True), exported('adapter'), merge
readers = {
    'lora_weights': (*chat_readers, exported('merged'), go_on, listed, read_back),
    'merged_model': (chat_merged, served(False), exported('merged'), go_on, listed),
    'exported': (chat_exported,),
    'checkpoints': (go_on, go_on_cut_off, verified),
    'logs': (go_on, listed),
    'cache': (prepared, go_on_cut_off),
    '.': (listed, read_back, go_on, exported('merged'), exported('adapter'), chat, merge)}


# A byte is flipped

def linked(source, to):
    "A copy; large files, which are never written into, share their bytes"
    large = os.path.getsize(source)>30_000
    os.link(source, to) if large else shutil.copy2(source, to)

class Place:
    "A copy of everything, in which one byte may be another"
    def __init__(self, made, folder):
        self.made,self.run,self.cache = made,folder/'runs'/'sums',folder/'cache'

    def fresh(self):
        for own,source in ((self.run.parent, self.made/'runs'), (self.cache, self.made/'cache')):
            shutil.rmtree(own, ignore_errors=True)
            shutil.copytree(source, own, copy_function=linked)

    def path(self, name): return (self.cache.parent if name.startswith('cache/') else self.run)/name

def places(data, more=0):
    "Where a byte is flipped: the first, one in the header, the middle one, the last, and some between"
    n = len(data)
    return sorted({0, min(20, n-1), n//2, n-1, *(n*i//(more+1) for i in range(1, more+1))})

def flipped(data, at, bit): return data[:at]+bytes([data[at]^bit])+data[at+1:]

def told_or(reader, place):
    "What a reader comes to, and what it says"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try: found = reader(place)
        except (SageError, ValueError, OSError) as e: return None,[f'{type(e).__name__}: {e}']
    words = [str(w.message) for w in said if issubclass(w.category, UserWarning)]
    return found,words

class Flipping:
    "What was told, and what was silent"
    def __init__(self, made, folder):
        self.place,self.before,self.rows,self.silent,self.said = Place(made, folder),{},{},[],{}
        self.usual = {}

    def expected(self, reader):
        name = reader.__name__
        if name not in self.before:
            self.place.fresh()
            self.before[name],self.usual[name] = told_or(reader, self.place)
            assert self.before[name] is not None, (name, self.usual[name])
        return self.before[name],self.usual[name]

    def flip(self, name, at, bit=1, some=None):
        "One byte, each reader; returns 'told', 'harmless' or 'silent'"
        kind = name.partition('/')[0] if '/' in name else '.'
        results = []
        for reader in readers[kind] if some is None else some:
            before,usual = self.expected(reader)
            self.place.fresh()
            path = self.place.path(name)
            data = flipped(path.read_bytes(), at, bit)
            path.unlink() # its bytes may be shared
            path.write_bytes(data)
            found,words = told_or(reader, self.place)
            new = [w for w in words if w not in usual]
            results.append('told' if new else 'harmless' if found==before else 'silent')
            if new: self.said.setdefault(name, new[0])
            if results[-1]=='silent': self.silent.append((name, at, bit, reader.__name__))
        how = 'silent' if 'silent' in results else 'told' if 'told' in results else 'harmless'
        self.rows.setdefault(name, []).append(how)
        return how

    def line(self, name):
        of = lambda name: next((why for part,why in harmless.items() if part in name), 'comes to the same')
        all_,said = self.rows[name],self.said.get(name) or of(name)
        return (f"{name:58} {all_.count('told'):>5} {all_.count('harmless'):>9} {all_.count('silent'):>7}  "
                f"{' '.join(said.replace(str(self.place.run.parent.parent), '').split())[:110]}")

    def table(self):
        lines = [f"{'file':58} {'told':>5} {'harmless':>9} {'silent':>7}  first words, or why it is harmless"]
        lines += map(self.line, self.rows)
        lines += [f'silent: {name}, byte {at} ^ {bit}: {reader}' for name,at,bit,reader in self.silent]
        total = [sum(r.count(k) for r in self.rows.values()) for k in ('told', 'harmless', 'silent')]
        return '\n'.join([*lines, f'{len(self.rows)} files: {total[0]} told, {total[1]} harmless, {total[2]} silent'])


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A finished run with a merged model and an export, and what is in the cache; paths of a run hold where it lies"
    base = tmp_path_factory.mktemp('flipped')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SAGE_CACHE', str(base/'cache'))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        run = base/'runs'/'sums'
        write_meta(run, two_layers, create_sample_data(run/'training_data_sums.json', 'qa', num_samples=24),
                   task_type='qa', config=settings)
        trainer_of(run, quiet=True).train()
        merge_run(run, rows=1)
        export_folder(run, None, 'adapter', base='me/two-layers')
        shutil.copytree(base/'runs', base/'made'/'runs')
        shutil.copytree(base/'cache', base/'made'/'cache')
        yield base
        torch.set_num_threads(threads)

@pytest.fixture(scope='module')
def flipping(made):
    found = Flipping(made/'made', made)
    yield found
    print('\n'+found.table())


few = ['lora_weights/adapter_model.safetensors', 'lora_weights/adapter_config.json', 'lora_weights/witness.json',
       'merged_model/config.json', 'merged_model/tokenizer.json', 'exported/adapter/contract.json',
       'checkpoints/checkpoint-3/optimizer.pt', 'checkpoints/checkpoint-6/receipt.json',
       'results.json', 'metrics.jsonl', 'finetune_meta.json', 'checksums.json', 'data_report.json']

@pytest.mark.parametrize('name', few)
def test_a_flipped_byte_is_told(name, flipping):
    flipping.expected(listed)
    at = len(flipping.place.path(name).read_bytes())*2//3
    assert flipping.flip(name, at, some=readers[name.partition('/')[0] if '/' in name else '.'][:2])=='told', name

def test_a_flipped_byte_of_the_cache_is_told(flipping):
    flipping.expected(prepared)
    for path in sorted(flipping.place.cache.glob('data/*/*')):
        name = path.relative_to(flipping.place.cache.parent).as_posix()
        assert flipping.flip(name, path.stat().st_size//2, some=[prepared])=='told', name
        if path.name=='checksums.json': continue
        assert 'prepared again' in flipping.said[name]

@pytest.mark.slow
def test_no_flipped_byte_is_silent(flipping):
    flipping.place.fresh()
    root = flipping.place.run
    files = [p.relative_to(root).as_posix() for p in sorted(root.rglob('*')) if p.is_file()]
    cached = [p for p in sorted(flipping.place.cache.rglob('*')) if p.is_file()]
    files += [p.relative_to(root.parent.parent).as_posix() for p in cached]
    only = re.compile(os.environ.get('SAGE_FLIP', '')) # to try some again
    for name in [n for n in files if only.search(n)]:
        data = flipping.place.path(name).read_bytes()
        for i,at in enumerate(places(data)): flipping.flip(name, at, bit=(1, 16, 2, 4)[i%4])
        if len(data)<10_000 and '/' not in name: # the quick readers, at many places
            for at in places(data, 40): flipping.flip(name, at, 1, [listed, read_back])
        print(flipping.line(name), flush=True) # it takes minutes
    assert flipping.silent==[]
    not_said = [n for n,all_ in flipping.rows.items() if 'told' not in all_ and not any(h in n for h in harmless)]
    assert not_said==[], 'a file at which nobody looks is named in `harmless`'

"What leaves the machine: the folder, the adapter alone, the commits that reach a hub, GGUF, templates for Ollama"
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_finetune.base.ollama import ollama_template
from sage_finetune.config import LoRAConfig, resolve_model, SageError, TrainingConfig
from sage_finetune.serving.export import (
    export_files, export_folder, export_gguf, gguf_report, push_to_hub)
from sage_finetune.core.run_folder import write_meta
from sage_finetune.inference.generate import load_for_chat
from sage_finetune.merge_chat import merge_run
from sage_finetune.rows.formats import create_sample_data
from sage_finetune.rows.template import render
from sage_finetune.trainer import LoRATrainer

_trl = find_spec('trl')
templates = sorted(Path(_trl.origin).parent.glob('chat_templates/*.jinja')) if _trl else []
BASE = 'someone/sage-tiny'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of three steps on the embedded model, merged, with a checkpoint and a log beside it"
    folder = tmp_path_factory.mktemp('export')/'sums'
    data = create_sample_data(folder/'sums.json', 'qa', num_samples=40)
    config = TrainingConfig(model_name='sage-tiny', data_path=data, output_dir=folder, max_steps=3,
                            per_device_train_batch_size=8, gradient_accumulation_steps=1,
                            learning_rate=5e-3, lora=LoRAConfig(r=4))
    write_meta(folder, 'sage-tiny', data, task_type='qa', config=config)
    LoRATrainer(config, quiet=True).train()
    merge_run(folder)
    (folder/'merged_model'/'old.bin').write_bytes(b'pickle')
    (folder/'lora_weights'/'notes.txt').write_text('mine')
    return folder


def texts(folder):
    return {p.name: p.read_text(encoding='utf-8') for p in folder.iterdir()
            if p.suffix not in ('.safetensors', '.gguf')}


def private_words(run): return [str(run), str(run.parent), str(Path.home())+'/', platform.node(), '_machine']


@torch.inference_mode()
def logits(model): return model(torch.arange(5, 40)[None]).logits


def test_an_exported_model_is_the_merged_one_and_says_nothing_of_this_machine(run, tmp_path):
    out = export_folder(run, tmp_path/'out', license='apache-2.0')
    names = {p.name for p in out.iterdir()}
    assert {'model.safetensors', 'config.json', 'generation_config.json', 'tokenizer.json', 'chat_template.jinja',
            'README.md'} <= names
    assert not names & {'old.bin', 'merge_report.json', 'training_config.json'}
    for name,text in texts(out).items(): assert not [w for w in private_words(run) if w in text], name
    assert torch.equal(logits(load_for_chat(out)[0]), logits(load_for_chat(run)[0]))
    card = ModelCard.load(out/'README.md')
    assert (card.data.license == 'apache-2.0' and card.data.library_name == 'transformers'
            and card.data.base_model is None)
    assert all(part in card.text for part in ('## Data', '| rows read | 40 |', '## Training',
                                              '| learning_rate | 0.005 |', '## Figures', 'held-out loss',
                                              '## Licence'))
    again = export_folder(run, out)
    assert again == out and ModelCard.load(out/'README.md').data.license is None
    with pytest.raises(SageError, match='which was not written here, so it is left alone'):
        export_folder(run, run)


def test_an_adapter_alone_is_taken_by_peft_and_names_a_base_for_others(run, tmp_path):
    from peft import PeftModel
    out = export_folder(run, tmp_path/'adapter', 'adapter', base=BASE)
    assert 'notes.txt' not in {p.name for p in out.iterdir()}
    asked = json.loads((out/'adapter_config.json').read_text())
    assert asked['base_model_name_or_path'] == BASE == ModelCard.load(out/'README.md').data.base_model
    for name,text in texts(out).items(): assert not [w for w in private_words(run) if w in text], name
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(
        resolve_model('sage-tiny'), dtype=torch.float32), out).eval()
    assert torch.allclose(logits(model), logits(load_for_chat(run, adapter=True)[0]), atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.parametrize('fault,words', [('template', 'chat template has changed'), ('weights', 'is cut short'),
                                         ('secret', 'looks like a secret')])
def test_a_planted_fault_stops_an_export(fault, words, run, tmp_path):
    copy = tmp_path/'sums'
    shutil.copytree(run, copy)
    merged,more = copy/'merged_model',{}
    if fault=='template': (merged/'chat_template.jinja').write_text('{{ messages[0].content }}')
    if fault=='weights': os.truncate(merged/'model.safetensors', 10**5)
    if fault=='secret': more = dict(license='other', license_name='hf_'+'aBcDeFgHiJ'*3+'kLmN')
    with pytest.raises(SageError, match=words): export_folder(copy, tmp_path/'out', **more)
    assert not (tmp_path/'out').exists()


class Hub(BaseHTTPRequestHandler):
    "As much of a hub as a push needs; it keeps what it is sent"
    def log_message(self, *args): pass

    def reply(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def take(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.server.seen.append((self.command, self.path, body, self.headers.get('Authorization')))
        return body

    def do_GET(self):
        self.take()
        if not self.headers.get('Authorization'): return self.reply(dict(error='who are you?'), 401)
        self.reply(dict(id='me/sums', private=not self.server.public, sha='0'*40, siblings=[]))

    def do_PUT(self):
        oid = self.path.rpartition('/')[2]
        self.server.blobs[oid] = self.take()
        self.reply({})

    def do_POST(self):
        body,here = self.take(),f'http://127.0.0.1:{self.server.server_port}'
        if not self.headers.get('Authorization'): return self.reply(dict(error='who are you?'), 401)
        if self.path.endswith('/repos/create'):
            return self.reply(dict(url=f'{here}/me/sums', name='me/sums', id='1'), 409 if self.server.public else 200)
        if self.path.endswith('/validate-yaml'): return self.reply(dict(errors=[], warnings=[]))
        if '/preupload/' in self.path:
            mode = lambda f: 'lfs' if f['path'].endswith('.safetensors') else 'regular'
            return self.reply(dict(files=[dict(path=f['path'], uploadMode=mode(f), shouldIgnore=False, oid=None)
                                          for f in json.loads(body)['files']]))
        if self.path.endswith('/objects/batch'):
            found = [o | dict(actions=dict(upload=dict(href=f"{here}/blob/{o['oid']}")))
                     for o in json.loads(body)['objects']]
            return self.reply(dict(transfer='basic', objects=found))
        if '/commit/' in self.path:
            return self.reply(dict(commitUrl=f'{here}/me/sums/commit/{"1"*40}', commitOid='1'*40,
                                   pullRequestUrl=None, success=True))
        return self.reply({})


@pytest.fixture
def hub():
    with ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
        server.seen,server.blobs,server.public = [],{},False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


TOKEN = 'hf_'+'t0ken'*7


@pytest.fixture
def pushed(hub, run, monkeypatch, tmp_path):
    "Push to the hub above; the switch that keeps this suite off the network is open for that"
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_DISABLE_XET', True)
    return lambda **more: push_to_hub(run, 'me/sums', endpoint=f'http://127.0.0.1:{hub.server_port}',
                                      **dict(token=TOKEN) | more)


def committed(hub):
    "Files of the one commit → their content"
    commits = [body for verb,path,body,_ in hub.seen if '/commit/' in path]
    assert len(commits) == 1
    lines = [json.loads(l) for l in commits[0].splitlines()]
    files = {l['value']['path']: base64.b64decode(l['value']['content']) for l in lines if l['key']=='file'}
    return files | {l['value']['path']: hub.blobs[l['value']['oid']] for l in lines if l['key']=='lfsFile'}


def test_a_push_is_private_and_whole_and_holds_no_token(hub, run, pushed, capfd):
    assert pushed(license='mit').endswith('/me/sums/commit/'+'1'*40)
    created = next(json.loads(body) for _,path,body,_ in hub.seen if path.endswith('/repos/create'))
    assert created.get('visibility', 'private' if created.get('private') else 'public') == 'private'
    files = committed(hub)
    assert set(files) == set(export_files(run, license='mit'))
    weights = (run/'merged_model'/'model.safetensors').read_bytes()
    assert files['model.safetensors'] == weights and hashlib.sha256(weights).hexdigest() in hub.blobs
    assert not [n for n in files if n.endswith(('.bin', '.pt', '.pkl', '.ckpt', '.pth'))]
    assert not [1 for _,path,body,_ in hub.seen if TOKEN.encode() in body or TOKEN in path]
    assert (TOKEN not in ''.join(capfd.readouterr())
            and not [p for p in run.parent.rglob('*') if p.is_file() and TOKEN.encode() in p.read_bytes()])
    assert b'me/sums' in files['README.md']


def test_an_adapter_is_pushed_with_a_base_that_others_can_load(hub, pushed):
    with pytest.raises(SageError, match='is only on this machine: say where others find it'): pushed(kind='adapter')
    pushed(kind='adapter', base=BASE)
    assert json.loads(committed(hub)['adapter_config.json'])['base_model_name_or_path'] == BASE


def test_what_the_hub_refuses_is_one_line(hub, run, pushed, monkeypatch):
    hub.public = True
    with pytest.raises(SageError, match='is there already and is public'): pushed()
    assert not [1 for _,path,_,_ in hub.seen if '/commit/' in path], 'nothing is sent to a public repository unasked'
    pushed(private=False)
    hub.public = False
    with pytest.raises(SageError, match='does not let you write me/sums: log in'): pushed(token=False)
    with pytest.raises(ValueError, match='[Rr]epo'): push_to_hub(run, 'a/b/c', token=TOKEN)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(SageError, match='the Hub cannot be reached'): pushed()
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(SageError, match='HF_HUB_OFFLINE=1'): pushed()


converter = '''
import argparse, pathlib, sys
p = argparse.ArgumentParser()
for name in ("model", "--outfile", "--outtype"): p.add_argument(name)
a = p.parse_args()
assert (pathlib.Path(a.model)/"model.safetensors").is_file()
if a.outtype == "bf16":
    print("working")
    sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
pathlib.Path(a.outfile).write_bytes(b"GGUF" + a.outtype.encode())
'''


def test_a_converter_is_run_and_its_error_is_passed_on(run, tmp_path, monkeypatch):
    """A stand-in with the converter's command line: the real one is no package, and refuses the embedded model's
    vocabulary
    """
    (tmp_path/'llama.cpp').mkdir()
    (tmp_path/'llama.cpp'/'convert_hf_to_gguf.py').write_text(converter)
    monkeypatch.setenv('LLAMA_CPP', str(tmp_path/'llama.cpp'))
    with pytest.raises(SageError, match='the converter refuses .*pre-tokenizer was not recognized'):
        export_gguf(run, tmp_path/'out', 'bf16')
    assert not (tmp_path/'out').exists()
    out = export_gguf(run, tmp_path/'out', 'q8_0', prove=False)
    assert (sorted(p.name for p in out.iterdir())
            == ['Modelfile', 'README.md', 'checksums.json', 'gguf_report.json', 'sums.gguf']
            and (out/'sums.gguf').read_bytes() == b'GGUFq8_0')
    text = (out/'Modelfile').read_text()
    assert (text.startswith('FROM ./sums.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n')
            and 'PARAMETER stop "<|im_end|>"' in text and 'PARAMETER num_ctx 2048' in text)
    assert 'not compared with anything' in str(gguf_report(out)) and 'not compared' in (out/'README.md').read_text()
    monkeypatch.delenv('LLAMA_CPP')
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr('sage_finetune.base.llama_cpp.find_spec', lambda name: None)
    with pytest.raises(SageError, match=r'gguf, xllamacpp is not installed: pip install "sage-finetune\[gguf\]"'):
        export_gguf(run, tmp_path/'out', 'q4_k_m')
    with pytest.raises(SageError, match='no converter to GGUF here'): export_gguf(run, tmp_path/'out')


def executed(template, messages):
    "What Go's text/template makes of the part of its language that is used here"
    tokens = re.split(r'({{.*?}})', template)
    def block(i, dot, system):
        "Run from `i` to the end or else of the block; (text, place after it)"
        out = []
        while i<len(tokens):
            t = tokens[i]
            action = t[2:-2].strip() if t.startswith('{{') else None
            if action is None:
                out.append(t)
                i += 1
            elif action=='end' or action.startswith('else'): return ''.join(out),i
            elif action.startswith('if '):
                text,i = branch(i, action, dot, system)
                out.append(text)
            elif action.startswith('range'):
                for m in messages:
                    text,after = block(i+1, m, system)
                    out.append(text)
                i = after+1
            else:
                out.append({'.System': system, '.Content': dot and dot['content']}.get(action, action.strip('"')))
                i += 1
        return ''.join(out),i
    def branch(i, action, dot, system):
        "The first of the branches whose condition holds"
        chosen = None
        while True:
            condition = action.removeprefix('else').strip()
            holds = not condition or (bool(system) if '.System' in condition else dot['role']==condition.split('"')[1])
            text,i = block(i+1, dot, system)
            if holds and chosen is None: chosen = text
            action = tokens[i][2:-2].strip()
            if action=='end': return chosen or '',i+1
    system = '\n\n'.join(m['content'] for m in messages if m['role']=='system')
    return block(0, None, system)[0]


def test_the_small_go_interpreter():
    assert executed('{{ if .System }}[{{ .System }}]{{ else }}-{{ end }}{{ range .Messages }}{{ if eq .Role "user" '
                    '}}<{{ .Content }}>{{ end }}{{ end }}{{ "{{" }}',
                    [dict(role='user', content='a')]) == '-<a>{{'


@pytest.mark.skipif(not templates, reason='TRL is not installed')
def test_templates_of_real_models_become_templates_for_ollama_or_are_refused(capsys):
    talks = [[('user', 'one')], [('user', 'one'), ('assistant', 'two'), ('user', 'three')],
             [('system', 'sys'), ('user', 'one')],
             [('system', 'sys'), ('user', 'one'), ('assistant', 'two'), ('user', 'three'), ('assistant', 'four'),
              ('user', 'five')]]
    right,refused,tok = [],{},AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))
    for path in templates:
        tok.chat_template = path.read_text(encoding='utf-8')
        try: text = ollama_template(tok)
        except ValueError as e:
            refused[path.stem] = str(e)
            continue
        for talk in talks:
            messages = [dict(role=r, content=c) for r,c in talk]
            assert executed(text, messages) == render(messages, tok, add_generation_prompt=True), path.stem
        right.append(path.stem)
    with capsys.disabled():
        print(f'\n{len(right)} of {len(templates)} templates in the language of Ollama, refused: '
              f'{", ".join(refused) or "none"}')
    assert len(right) > len(templates)//2
    assert all('in more than one way' in e or 'refuses this conversation' in e for e in refused.values()), refused

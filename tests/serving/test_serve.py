"A server that was really started, asked by the real `openai` client: the answers of `chat`, many clients, signals"
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

openai = pytest.importorskip('openai')

from quick import fork_servers, Forked, forked
from sage_finetune.serving import chat_api, serve as module
from sage_finetune.serving.client import models_at, stream_from
from sage_finetune.core.disk import write_json
from sage_finetune.config import LoRAConfig, resolve_model, SageError, TrainingConfig
from sage_finetune.inference.generate import answers, load_for_chat, stream_answer
from sage_finetune.serving.serve import Served, serving, start_server
from sage_finetune.merge_chat import merge_run
from sage_finetune.trainer import LoRATrainer

needs_posix = pytest.mark.skipif(os.name!='posix', reason='needs signals and processes as POSIX has them')

# What a server may spoil: white space at the ends, a blank line, marks that stand for a call or a thought,
# characters of several tokens
LEARNED = {'Complete: def add(a, b):': '    return a + b', 'Two lines, please.': 'one\n\n  two',
           'How is a call written?': 'Like this: <tool_call>\n{"name": "f"}\n</tool_call> and so on.',
           'Think and say three.': '<think>\none two\n</think>\n\nthree',
           'Greet me.': '你好 🐟!'}
TALKS = [[dict(role='user', content=q)] for q in (*LEARNED, 'What is Python?')]
TALKS += [[dict(role='system', content='Be brief.'), *TALKS[0]],
          [*TALKS[1], dict(role='assistant', content='one'), *TALKS[3]]]


@pytest.fixture(scope='module', autouse=True)
def quick_servers():
    "Servers are forked; the lessons of the notebook start a real one"
    if not forked: return (yield)
    before = fork_servers(module)
    yield
    module.subprocess = before


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run on a copy of the embedded model, merged"
    folder = tmp_path_factory.mktemp('serve')
    shutil.copytree(resolve_model('sage-tiny'), folder/'base')
    (folder/'rows.json').write_text(json.dumps([dict(question=q, answer=a) for q,a in LEARNED.items()]*20),
                                    encoding='utf-8')
    config = TrainingConfig(model_name=str(folder/'base'), data_path=folder/'rows.json', output_dir=folder/'code',
                            max_steps=60, per_device_train_batch_size=5,
                            gradient_accumulation_steps=1, learning_rate=5e-3, test_size=0, report_to='none',
                            lora=LoRAConfig(r=16, lora_alpha=32, target_modules='all-linear'))
    LoRATrainer(config, quiet=True).train()
    merge_run(folder/'code')
    return folder/'code'


@pytest.fixture(scope='module')
def expected(run):
    "What `chat` says to each of `TALKS`"
    model,tokenizer = load_for_chat(run)
    whole = [a.text for a in answers(model, tokenizer, TALKS, 48, batch_size=1)]
    assert whole == [''.join(stream_answer(model, tokenizer, t, 48)) for t in TALKS]
    assert whole[:4] == list(LEARNED.values())[:4], 'the run has not learned what the tests look for'
    return whole


@pytest.fixture(scope='module')
def server(run):
    with serving(run) as server: yield server


def client(server, key='none'):
    return openai.OpenAI(base_url=f'{server.url}/v1', api_key=key, max_retries=0, timeout=60)


def ask(server, messages, key='none', **more):
    return client(server, key).chat.completions.create(
        model=server.model, messages=messages, **dict(max_tokens=48, temperature=0) | more)


def said(server, messages, **more): return ask(server, messages, **more).choices[0].message.content


def streamed(server, messages, **more):
    return ''.join(c.choices[0].delta.content or '' for c in ask(server, messages, stream=True, **more) if c.choices)


def test_answers_are_those_of_chat(server, expected):
    assert [said(server, t) for t in TALKS] == expected
    assert [streamed(server, t) for t in TALKS] == expected
    assert [''.join(stream_from(server.url, t, 48)) for t in TALKS] == expected
    without = client(server).chat.completions.create(model=server.model, messages=TALKS[5], max_tokens=48)
    assert without.choices[0].message.content == expected[5], (
        'where no temperature is named, the likeliest token is taken')


def test_twenty_clients_at_once_get_right_answers(server, expected):
    def one(i): return (streamed if i%2 else said)(server, TALKS[i%len(TALKS)])
    with ThreadPoolExecutor(20) as many: got = list(many.map(one, range(20)))
    assert got == [expected[i%len(TALKS)] for i in range(20)]


def test_what_comes_beside_the_text(server, expected):
    whole = ask(server, TALKS[0])
    assert (whole.choices[0].finish_reason == 'stop'
            and whole.usage.total_tokens == whole.usage.prompt_tokens+whole.usage.completion_tokens)
    short = ask(server, TALKS[0], max_tokens=2)
    assert short.choices[0].finish_reason == 'length' and short.usage.completion_tokens == 2
    cut = ask(server, TALKS[2], stop=[' and', 'never'])
    assert cut.choices[0].message.content == expected[2].partition(' and')[0] == streamed(
        server, TALKS[2], stop=[' and', 'never'])
    assert cut.choices[0].finish_reason == 'stop'
    chunks = list(ask(server, TALKS[0], stream=True, stream_options=dict(include_usage=True)))
    assert chunks[0].choices[0].delta.role == 'assistant' and chunks[-2].choices[0].finish_reason == 'stop'
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    drawn = [said(server, TALKS[5], temperature=1.5, seed=s) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [m.id for m in client(server).models.list()] == ['code'] == models_at(f'{server.url}/v1')
    assert client(server).models.retrieve('code').id == 'code'


FUNCTION = dict(type='function', function=dict(name='add', parameters=dict(type='object', properties={})))
BAD = [
    (dict(model='gpt-4'), openai.NotFoundError, 'model', 'model_not_found', "there is 'code'"),
    (dict(temperature=9), openai.BadRequestError, 'temperature', 'decimal_above_max_value', 'value <= 2, but got 9'),
    (dict(temperature='hot'), openai.BadRequestError, 'temperature', 'invalid_type', 'but got a string instead'),
    (dict(messages=[]), openai.BadRequestError, 'messages', 'empty_array', 'empty array'),
    (dict(messages=[dict(role='user', content='word '*3000)]), openai.BadRequestError, 'messages',
     'context_length_exceeded', 'the model takes 2,048'),
    (dict(n=30), openai.BadRequestError, 'n', 'integer_above_max_value', 'value <= 16, but got 30'),
    (dict(stop=[*'abcde']), openai.BadRequestError, 'stop', 'array_above_max_length', 'maximum length 4'),
    (dict(logprobs=True), openai.BadRequestError, 'logprobs', 'unsupported_parameter', "'logprobs' is not supported"),
    (dict(response_format=dict(type='json_object')), openai.BadRequestError, 'response_format', 'unsupported_value',
     "does not support 'json_object'"),
    (dict(tools=[FUNCTION]), openai.BadRequestError, 'tools', 'unsupported_parameter', "'tools' is not supported"),
    (dict(extra_body=dict(top_k=5)), openai.BadRequestError, 'top_k', 'unknown_parameter', "parameter: 'top_k'"),
]


@pytest.mark.parametrize('change,error,param,code,words', BAD, ids=[f'{p} {c}' for _,_,p,c,_ in BAD])
def test_a_bad_request_is_refused_by_name(server, change, error, param, code, words):
    for stream in (False, True):
        with pytest.raises(error) as refused:
            client(server).chat.completions.create(
                **dict(model=server.model, messages=TALKS[0], stream=stream, max_tokens=4) | change)
        assert (refused.value.param, refused.value.code, refused.value.type) == (param, code, 'invalid_request_error')
        assert words in refused.value.message


def test_several_answers_seeds_and_functions_that_may_not_be_called(server, expected):
    three = ask(server, TALKS[0], n=3)
    assert [c.message.content for c in three.choices] == expected[:1]*3
    assert [c.index for c in three.choices] == [0, 1, 2]
    one = ask(server, TALKS[0])
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 3*one.usage.completion_tokens
    drawn = [[c.message.content for c in ask(server, TALKS[5], n=2, temperature=1.5, seed=5).choices] for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]
    pieces = {}
    for chunk in ask(server, TALKS[5], n=2, temperature=1.5, seed=5, stream=True):
        for c in chunk.choices: pieces[c.index] = pieces.get(c.index, '')+(c.delta.content or '')
    assert [*pieces.values()] == drawn[0]
    assert said(server, TALKS[0], tools=[FUNCTION], tool_choice='none', response_format=dict(type='text'),
                logprobs=False, presence_penalty=0, user='me') == expected[0]


def test_a_text_is_continued_as_it_is(server, run):
    model,tokenizer = load_for_chat(run)
    ids = tokenizer('def add(')['input_ids']
    out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(out[0][len(ids):], skip_special_tokens=True)
    here = client(server).completions
    whole = here.create(model=server.model, prompt='def add(', max_tokens=8)
    assert (whole.choices[0].text, whole.object, whole.usage.prompt_tokens) == (text, 'text_completion', len(ids))
    assert ''.join(c.choices[0].text for c in here.create(model=server.model, prompt=ids, max_tokens=8,
                                                          stream=True)) == text
    two = here.create(model=server.model, prompt=['def add(', 'import '], max_tokens=3, n=2)
    assert [c.index for c in two.choices] == [0, 1, 2, 3] and two.choices[0].text == two.choices[1].text
    for more,param in ((dict(echo=True), 'echo'), (dict(suffix='x'), 'suffix'), (dict(best_of=2), 'best_of'),
                       (dict(logprobs=1), 'logprobs'), (dict(prompt=[10**6]), 'prompt'), (dict(prompt=''), 'prompt')):
        with pytest.raises(openai.BadRequestError) as refused:
            here.create(**dict(model=server.model, prompt='a', max_tokens=2) | more)
        assert refused.value.param == param


def test_a_body_that_is_no_json_and_an_unknown_address(server):
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen
    for path,body,status in (('/v1/chat/completions', b'{', 400), ('/v1/chat/completions', b'[]', 400),
                             ('/v1/nothing', None, 404), ('/v1/chat/completions', None, 405)):
        with pytest.raises(HTTPError) as refused: urlopen(Request(server.url+path, body))
        assert refused.value.code == status


def test_a_client_that_goes_away_halts_its_answer(run, monkeypatch):
    "Here the application runs in a thread, with a model that never ends by itself, so that tokens can be counted"
    generate,written = chat_api.generate_answers,[]
    monkeypatch.setattr('sage_finetune.inference.generate.stop_ids', lambda *a: [10**6])
    monkeypatch.setattr(chat_api, 'generate_answers', lambda *a: written.append(generate(*a)) or written[-1])
    engine,port = chat_api.Engine(*load_for_chat(run)),module.free_port('127.0.0.1', 0)
    server = chat_api.web_server(chat_api.chat_app(engine, 'code'), engine, port=port)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started: time.sleep(0.01)
    here = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none', max_retries=0)
    ask = (lambda client,most,**more: client.chat.completions.create(
        model='code', messages=TALKS[5], max_tokens=most, **more))
    try:
        assert ask(here, 60).choices[0].finish_reason == 'length'
        with ask(here, 1900, stream=True) as talk: next(iter(talk))
        with pytest.raises(openai.APITimeoutError): ask(here.with_options(timeout=0.3), 1900)
        assert ask(here, 3).usage.completion_tokens == 3
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
    tokens = [answer.tokens for answer, in written]
    assert (tokens[0], tokens[-1]) == (60, 3) and all(n<1900 for n in tokens)


def test_the_log_lies_in_the_run_folder_and_holds_no_conversation(server, run):
    log = (run/'logs'/'serve.log').read_text()
    assert server.log == run/'logs'/'serve.log' and 'POST /v1/chat/completions' in log
    assert [l for l in log.splitlines() if not re.match(r'\d{4}-\d\d-\d\d [\d:,]+ (info|warning|error): \S', l)] == []
    assert 'return a + b' not in log and 'Complete' not in log and '\x1b' not in log


def test_a_second_server_on_the_port_is_refused(server, run):
    with pytest.raises(SageError, match='is in use: stop the program that has it, or give another port'):
        start_server(run, port=int(server.url.rpartition(':')[2]))
    assert said(server, TALKS[0]) == LEARNED[TALKS[0][0]['content']]


def children_of(pid):
    "Processes that a process started"
    return [int(p.name) for p in Path('/proc').iterdir() if p.name.isdigit()
            and f'PPid:\t{pid}\n' in (read(p/'status') or '')]


def read(path):
    try: return path.read_text()
    except OSError: return None


@needs_posix
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
@pytest.mark.slow
def test_killed_and_started_again_on_the_same_port_with_a_key_that_is_shown_nowhere_and_the_adapter(
        run, expected, tmp_path, monkeypatch):
    first,key = start_server(run, port=0, log=tmp_path/'log'),'key-4711-secret'
    port = int(first.url.rpartition(':')[2])
    first.process.kill()
    first.process.wait()
    with pytest.raises(SageError, match='nothing answers at'): list(stream_from(first.url, TALKS[0]))
    assert first.stop() == -signal.SIGKILL
    monkeypatch.setattr(module, 'subprocess', subprocess) # a new interpreter has a command line of its own
    with serving(run, port=port, api_key=key, adapter=True, log=tmp_path/'log') as again:
        assert said(again, TALKS[0],
                    key=key) == expected[0] == ''.join(stream_from(again.url, TALKS[0], 48, api_key=key))
        for wrong in ('none', key[:-1]):
            with pytest.raises(openai.AuthenticationError, match='the key is missing or wrong'):
                said(again, TALKS[0], key=wrong)
        with pytest.raises(SageError, match='refuses .401.'): models_at(again.url)
        pid = again.process.pid
        assert key not in ''.join(read(Path(f'/proc/{p}/cmdline')) for p in (pid, *children_of(pid)))
    assert not [p for p in (*run.parent.rglob('*'), *tmp_path.rglob('*'))
                if p.is_file() and key.encode() in p.read_bytes()]


script = '''
import sys
from quick import fork_servers
from sage_finetune.serving import serve as module
fork_servers(module)
module.serve(sys.argv[1], port=0, log=sys.argv[2], say=lambda line: print(line, flush=True))
'''


@needs_posix
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
def test_ctrl_c_an_end_and_a_kill_leave_no_server_behind(run, tmp_path):
    signals = signal.SIGINT,signal.SIGTERM,signal.SIGKILL
    started = [Forked([sys.executable, '-c', script, run, tmp_path/s.name], stdout=subprocess.PIPE,
                      stderr=subprocess.STDOUT, text=True) for s in signals]
    addresses = [p.stdout.readline().split()[4].removesuffix('/v1') for p in started]
    servers = [children_of(p.pid) for p in started]
    assert all(len(s)==1 for s in servers) and [models_at(a) for a in addresses] == [['code']]*3
    for p,s in zip(started, signals): p.send_signal(s)
    assert [p.wait(30) for p in started] == [0, 0, -signal.SIGKILL]
    give_up = time.monotonic()+30
    while ((left := [s for s, in servers if Path(f'/proc/{s}').exists()
                     and 'zombie' not in read(Path(f'/proc/{s}/status'))]) and time.monotonic()<give_up):
        time.sleep(0.1)
    assert not left
    said = [p.stdout.read() for p in started]
    assert all(s.endswith('stopped; the same command serves again\n') for s in said[:2])
    assert 'Traceback' not in ''.join(said)


def follow(folder, base=None, engine='native'):
    "What happens before anything is served, in this process"
    order = dict(name='code', folder=str(folder), base=base, log='', host='127.0.0.1', port=0, api_key=None,
                 engine=engine, max_new_tokens=8, ignore_contract=False, allow_host=(), options=())
    if engine=='native': module._follow(order)
    else: module._other_engine(Served('code', folder, base, folder/'log'), order)


FAULTS = {
    'a changed template': ('merged_model', lambda d: (d/'chat_template.jinja').write_text(
        (d/'chat_template.jinja').read_text().replace('<|im_start|>', '<|im_start|> ')),
                           'the chat template has changed'),
    'another tokenizer': ('merged_model', lambda d: swap_words(d/'tokenizer.json'), 'another tokenizer'),
    'a shard cut short': ('merged_model', lambda d: cut(d/'model.safetensors'), 'model.safetensors is cut short'),
    'an adapter cut short': ('lora_weights', lambda d: cut(d/'adapter_model.safetensors'),
                             'adapter_model.safetensors is cut short'),
    'another base': ('lora_weights', lambda d: other_weights(d.parent/'base'/'model.safetensors'),
                     'is not the base it was trained on'),
}


def cut(file): os.truncate(file, file.stat().st_size//2)


def swap_words(file):
    words = json.loads(file.read_text(encoding='utf-8'))
    vocabulary = words['model']['vocab']
    a,b = [k for k in vocabulary if len(k)>3][:2]
    vocabulary[a],vocabulary[b] = vocabulary[b],vocabulary[a]
    file.write_text(json.dumps(words), encoding='utf-8')


def other_weights(file):
    from safetensors.torch import load_file, save_file
    save_file({k: t+1 for k,t in load_file(file).items()}, file, metadata=dict(format='pt'))


@pytest.mark.parametrize('fault', FAULTS)
def test_a_planted_fault_is_caught_by_name_before_anything_is_served(fault, run, tmp_path):
    kind,plant,words = FAULTS[fault]
    shutil.copytree(run.parent/'base', tmp_path/'base')
    shutil.copytree(run/kind, tmp_path/kind)
    base = None
    if kind=='lora_weights':
        base = str(tmp_path/'base')
        settings = json.loads((tmp_path/kind/'training_config.json').read_text())
        write_json(tmp_path/kind/'training_config.json', settings | dict(model_name=base))
    plant(tmp_path/kind)
    for engine in ('native', 'vllm'):
        with pytest.raises(SageError, match=words) as error: follow(tmp_path/kind, base, engine=engine)
        assert '\n' not in str(error.value)


def test_a_server_that_cannot_start_says_why_in_one_line(run, tmp_path):
    shutil.copytree(run/'merged_model', tmp_path/'broken')
    cut(tmp_path/'broken'/'model.safetensors')
    with pytest.raises(SageError) as error: start_server(tmp_path/'broken', port=0, log=tmp_path/'log')
    assert ('the server did not start: ' in str(error.value) and 'model.safetensors is cut short' in str(error.value)
            and '\n' not in str(error.value))
    with pytest.raises(SageError, match='did not answer within 0.01 s'):
        start_server(run, port=0, log=tmp_path/'log', timeout=0.01)


@pytest.mark.slow
def test_transformers_serve_can_be_asked_for(run, tmp_path):
    pytest.importorskip('fastapi')
    with pytest.raises(SageError, match='takes no adapter'):
        start_server(run, port=0, engine='transformers', adapter=True, log=tmp_path/'log')
    with serving(run, engine='transformers', log=tmp_path/'log') as other:
        assert said(other, TALKS[1]) == LEARNED[TALKS[1][0]['content']]
        assert isinstance(models_at(other.url), list)
        assert 'transformers' in (read(Path(f'/proc/{other.process.pid}/cmdline')) or 'transformers'), (
            'it is the process that was started, with nothing in between')
    assert not other.running


FAKE = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Up(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print(json.dumps(dict(argv=sys.argv[1:], key=os.environ.get('VLLM_API_KEY'), pid=os.getpid())), flush=True)
HTTPServer(('127.0.0.1', int(sys.argv[sys.argv.index('--port')+1])), Up).serve_forever()
"""


@needs_posix
def test_vllm_is_started_waited_for_and_stopped_and_gets_its_options(run, tmp_path, monkeypatch):
    "A program of that name that says how it was called"
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin'/'vllm').write_text(FAKE.format(python=sys.executable))
    (tmp_path/'bin'/'vllm').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path/"bin"}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setattr(module, 'find_spec', lambda name: name)
    more = dict(engine='vllm', adapter=True, api_key='key-4711-secret', log=tmp_path/'log')
    with serving(run, options=['--max-model-len', 512], **more) as server:
        told = json.loads(next(l for l in server.log.read_text().splitlines() if l.startswith('{')))
        assert server.engine=='vllm' and told['pid']==server.process.pid, 'nothing stands in between'
        assert told['argv'][-2:]==['--max-model-len', '512'] and told['key']=='key-4711-secret'
        assert 'key-4711-secret' not in told['argv'] and told['argv'][told['argv'].index('--allowed-origins')+1]=='[]'
    assert server.process.wait(1)==-signal.SIGTERM
    config = json.loads((run/'lora_weights'/'adapter_config.json').read_text())
    monkeypatch.setattr(module, 'read_json', lambda file: config | dict(bias='all'))
    with pytest.raises(SageError, match='bias=all.: merge it first'): start_server(run, port=0, **more)
    assert told['pid'] not in [int(p.name) for p in Path('/proc').glob('[0-9]*')]


def test_options_of_the_command_line(capsys):
    from sage_finetune.cli import main
    for words,said in ((['--', '--dtype', 'half'], 'are for vLLM and transformers: add `--engine vllm`'),
                       (['fast'], '`options` must begin with an option'),
                       (['--allow-host', 'http://x'], '`allow_host` must be a name such as ui.example')):
        assert main(['serve', 'sage-tiny', '--engine', 'native', '--port', '0', *words]) == 1
        assert said in capsys.readouterr().err


class Scripted(BaseHTTPRequestHandler):
    "A server that says what its address asks for"
    replies = {
        'cut': b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n',
        'error': b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
        b'data: {"error": {"message": "out of memory"}}\n\n',
        'odd': ': hello\r\n\r\nevent: x\r\ndata: {"choices": []}\r\n\r\ndata: {"choices": [{"delta": {"content": '
        '"鱼"}, "finish_reason": "stop"}]}\r\n\r\n'.encode(),
    }

    def do_GET(self): self.reply(b'{"data": [{"id": "one"}, {"id": "two"}]}')
    def do_POST(self): self.reply(self.replies[self.path.split('/')[1]])
    def log_message(self, *args): pass

    def reply(self, body):
        self.send_response(200)
        self.end_headers()
        for i in range(len(body)):
            self.wfile.write(body[i:i+1])
            self.wfile.flush()


def test_the_client_takes_any_stream_and_notices_one_that_breaks_off():
    with ThreadingHTTPServer(('127.0.0.1', 0), Scripted) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{other.server_port}'
        assert models_at(url) == ['one', 'two']
        assert list(stream_from(f'{url}/odd', TALKS[0])) == ['鱼']
        for path,words in (('cut', 'broke off in the middle'), ('error', 'broke off: out of memory')):
            pieces = stream_from(f'{url}/{path}/v1', TALKS[0])
            assert next(pieces) == 'half'
            with pytest.raises(SageError, match=words): next(pieces)
        other.shutdown()

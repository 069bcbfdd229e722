"What a server is asked from outside: other hosts, other pages, too much, too slowly, nonsense; and how answers end"
import http.client
import json
import os
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

openai = pytest.importorskip('openai')
pytest.importorskip('uvicorn')
from starlette.testclient import TestClient

from quick import fork_servers, forked
from sage_finetune.config import resolve_model
from sage_finetune.serving import chat_api, serve
from sage_finetune.inference.generate import load_for_chat
from sage_finetune.serving.request import BadRequest, read_body, read_request
from sage_finetune.serving.serve import free_port, start_server

HI = dict(messages=[dict(role='user', content='hi')], max_tokens=2)
needs_proc = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')


@pytest.fixture
def quick_servers(monkeypatch):
    "Servers are forked"
    monkeypatch.setattr(serve, 'subprocess', serve.subprocess)
    if forked: fork_servers(serve)


@pytest.fixture(scope='module')
def loaded(): return load_for_chat(resolve_model('sage-tiny'))


@contextmanager
def running(loaded, **more):
    "A server in a thread of this process: its engine and its port"
    engine,port = chat_api.Engine(*loaded, **more),free_port('127.0.0.1', 0)
    server = chat_api.web_server(chat_api.chat_app(engine, 'tiny'), engine, port=port)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started: time.sleep(0.01)
    try: yield engine,port,server
    finally:
        server.should_exit = True
        engine.close()
        thread.join()


@pytest.fixture
def here(loaded):
    with running(loaded) as (engine, port, server): yield port


@pytest.fixture(scope='module')
def web(loaded):
    engine = chat_api.Engine(*loaded, 2)
    yield TestClient(chat_api.chat_app(engine, 'tiny'), base_url='http://127.0.0.1:8000')
    engine.close()


def raw(port, *parts, pause=0, timeout=20):
    "What comes back until the server closes or is silent"
    with socket.create_connection(('127.0.0.1', port), timeout=timeout) as s:
        for part in parts:
            try: s.sendall(part)
            except OSError: break
            time.sleep(pause)
        found = b''
        try:
            while piece := s.recv(65536):
                found += piece
                head,_,body = found.partition(b'\r\n\r\n')
                length = [int(l.split(b':')[1]) for l in head.lower().split(b'\r\n') if l.startswith(b'content-length')]
                if length and len(body)>=length[0]: break
        except (TimeoutError, ConnectionError): pass
        return found


def status(reply): return int(reply.split(b' ', 2)[1]) if reply else None


def request(port, method='POST', path='/v1/chat/completions', body=None, headers=(), timeout=60):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=timeout)
    connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, dict(headers))
    reply = connection.getresponse()
    return reply.status,{k.lower(): v for k,v in reply.getheaders()},reply.read()


REFUSED = ['evil.example', 'localhost.evil.example', '127.0.0.1.nip.io', '192.168.0.5', '0.0.0.0', 'me@localhost',
           'local host', 'evil.example:80', '[::1', 'localhost:99999999', '']
OWN = ['localhost', 'LOCALHOST:8000', 'localhost.', '127.0.0.1', '127.9.9.9:1', '[::1]:80']
HOSTS = {h: 403 for h in REFUSED} | {h: 200 for h in OWN}


@pytest.mark.parametrize('host', HOSTS)
def test_only_own_names_are_answered(web, host):
    assert web.get('/v1/models', headers=dict(host=host)).status_code == HOSTS[host]
    refused = web.post('/v1/chat/completions', json=HI, headers=dict(host=host))
    assert refused.status_code == HOSTS[host]
    if HOSTS[host]==403: assert refused.json()['error']['code'] == 'host_not_allowed'


PAGES = [dict(origin='http://evil.example'), dict(origin='https://127.0.0.1:8000.evil.example'), dict(origin='null'),
         dict(origin='http://localhost:3000'), dict(origin='https://127.0.0.1'), dict(origin='file://'),
         dict(origin='chrome-extension://abc'), {'sec-fetch-site': 'cross-site'}, {'sec-fetch-site': 'same-site'},
         dict(origin='http://[::1'), dict(origin='')]


@pytest.mark.parametrize('headers', PAGES, ids=lambda h: ' '.join(h.values()) or 'empty')
def test_pages_of_other_origins_are_refused(web, headers):
    refused = web.post('/v1/chat/completions', json=HI, headers=headers)
    assert (refused.status_code, refused.json()['error']['code']) == (403, 'origin_not_allowed')
    assert not [k for k in refused.headers if k.startswith('access-control')]


def test_programs_and_the_server_s_own_origin_are_answered(web):
    for headers in ({}, dict(origin='http://127.0.0.1:8000'), dict(origin='http://localhost:8000'),
                    {'sec-fetch-site': 'none'}, {'sec-fetch-site': 'same-origin'}):
        reply = web.get('/v1/models', headers=headers)
        assert reply.status_code == 200 and not [k for k in reply.headers if k.startswith('access-control')]
    preflight = web.options('/v1/chat/completions', headers=dict(origin='http://evil.example'))
    assert preflight.status_code == 403


def test_a_host_that_is_allowed_and_a_server_on_every_address(loaded):
    engine = chat_api.Engine(*loaded)
    get = lambda app,**headers: TestClient(app, base_url='http://127.0.0.1').get('/health', headers=headers).status_code
    app = chat_api.chat_app(engine, 'tiny', allow_host=('UI.example', 'other.example:81'))
    assert [get(app, host=h) for h in ('ui.example', 'ui.example:5', 'other.example:81', 'other.example', 'x.ui.e')
            ] == [200, 200, 200, 403, 403]
    assert get(app, origin='https://ui.example') == 200 and get(app, origin='http://other.example') == 403
    everywhere = chat_api.chat_app(engine, 'tiny', host='0.0.0.0')
    assert [get(everywhere, host=h) for h in ('10.1.2.3:8000', '[fe80::1]', socket.gethostname(), 'evil.example')
            ] == [200, 200, 200, 403]
    engine.close()


def test_a_request_without_a_host_or_with_two(here):
    assert status(raw(here, b'GET /health HTTP/1.1\r\n\r\n')) == 400
    assert status(raw(here, b'GET /health HTTP/1.0\r\n\r\n')) == 403
    assert status(raw(here, b'GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n')) == 400
    assert status(raw(here, b'GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n')) == 404


def test_what_is_no_http_gets_an_error_of_the_api(here):
    for head in (b'nonsense\r\n\r\n', b'GET /a b HTTP/1.1\r\n\r\n', b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n',
                 b'GET / HTTP/1.1\r\nHost: localhost\r\nX: '+b'a'*70000+b'\r\n\r\n',
                 b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n'):
        reply = raw(here, head)
        assert status(reply) == (431 if b'aaaa' in head else 400), head[:40]
        assert json.loads(reply.partition(b'\r\n\r\n')[2])['error']['type'] == 'invalid_request_error'
    assert request(here, 'GET', '/health')[0] == 200


def test_a_body_is_refused_by_its_length_before_it_is_read(here):
    head = b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n'
    began = time.monotonic()
    for n in (2**20+1, 10**9, 10**15): # nothing of it was sent, and the answer is there
        assert status(raw(here, head % n)) == 413
    assert time.monotonic()-began<10
    assert status(raw(here, head % 10**400)) in (400, 413)


def test_a_body_in_chunks_is_refused_as_soon_as_it_is_too_long(here):
    head = b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n'
    chunk = b'%x\r\n' % 2**18 + b' '*2**18 + b'\r\n'
    reply = raw(here, head, *[chunk]*6)
    assert status(reply) == 413 and json.loads(reply.partition(b'\r\n\r\n')[2])['error']['code'] == 'request_too_large'
    small = json.dumps(HI).encode()
    assert status(raw(here, head, b'%x\r\n%s\r\n0\r\n\r\n' % (len(small), small))) == 200
    assert status(raw(here, head, b'zz\r\n')) in (400, None)


def test_a_slow_head_and_a_slow_body_are_given_up(here, monkeypatch):
    monkeypatch.setattr(chat_api, '_head_seconds', 0.4)
    monkeypatch.setattr(chat_api, '_body_seconds', 0.4)
    for parts in ([b''], [b'GET /hea'], [b'GET /health HTTP/1.1\r\n', b'Host: localhost\r\n'],
                  [b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n', b'GET /hea', b'lt', b'h']):
        began = time.monotonic()
        raw(here, *parts, b'X', pause=0.3)
        assert time.monotonic()-began<4, parts
    head = b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n'
    assert status(raw(here, head, b'{', pause=0.1)) == 408
    assert request(here, 'GET', '/health')[0] == 200


def test_more_connections_than_allowed_are_closed(here, monkeypatch):
    monkeypatch.setattr(chat_api, '_most_connections', 3)
    open = [socket.create_connection(('127.0.0.1', here)) for _ in range(3)]
    time.sleep(0.2)
    assert raw(here, b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n') == b''
    for s in open: s.close()
    time.sleep(0.2)
    assert request(here, 'GET', '/health')[0] == 200


# --- bodies

JSON = {'no JSON': b'{', 'no object': b'[]', 'a number': b'5', 'nothing': b'', 'null': b'null', 'two': b'{}{}',
        'zip': b'\x1f\x8b'}


@pytest.mark.parametrize('kind', JSON)
@pytest.mark.parametrize('path', ['/v1/chat/completions', '/v1/completions'])
def test_what_is_no_json_object(web, kind, path):
    reply = web.post(path, content=JSON[kind])
    assert reply.status_code == 400 and reply.json()['error']['type'] == 'invalid_request_error'


def body_with(field, text):
    "A body in which a field holds a text of JSON"
    return '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "%s": %s}' % (field, text)


ODD = ['NaN', 'Infinity', '-Infinity', '1e999', '9'*5000, '-'+'9'*400, '"\\ud800"', '"a\\udfffb"', '['*100000,
       '{"a":'*3000, '['*70+']'*70, '{"a": 1, "a": 2}', '[{"b": NaN}]']


@pytest.mark.parametrize('field', ['seed', 'stop', 'tools', 'metadata', 'prompt', 'user', 'never heard', 'n'])
@pytest.mark.parametrize('text', ODD, ids=lambda t: t[:12])
def test_values_that_json_does_not_have_are_refused_by_their_field(field, text):
    with pytest.raises(BadRequest) as refused: read_body(body_with(field, text).encode())
    assert refused.value.status == 400 and refused.value.param.startswith(field)
    assert len(str(refused.value))<600 and str(refused.value).isprintable()


def test_bytes_that_are_no_text_and_keys_given_twice_are_named_in_any_depth():
    for body,param in ((b'{"messages": [{"role": "user", "content": "\xff"}]}', 'messages[0].content'),
                       (b'{"messages": [{"role": "user", "role": "tool"}]}', 'messages[0].role'),
                       (b'{"seed": 1, "seed": 1}', 'seed'), (b'{"metadata": {"\xe4": 1}}', 'metadata'),
                       (b'{"stream_options": {"include_usage": NaN}}', 'stream_options.include_usage'),
                       (b'{"tools": [[[1, 1e999]]]}', 'tools[0][0][1]')):
        with pytest.raises(BadRequest) as refused: read_body(body)
        assert refused.value.param == param
    assert read_body('\ufeff{"user": "\U0001f41f \\ud83d\\udc1f"}'.encode())['user'] == '\U0001f41f \U0001f41f'


VALUES = [True, False, 0, -1, 1.5, 1e308, 10**30, -2**63, '', 'x', '\x00\x1b[2J', '\u202e', [], [1], ['x'], [None], {},
          dict(a=1), [[]], [{}], 'a'*5000, [dict(type='text')], dict(type='text'), dict(type='function')]
WHOLE = dict(model='tiny', messages=[
    dict(role='system', content='Be brief.'), dict(role='user', content=[dict(type='text', text='hi')]),
    dict(role='assistant', content=None, tool_calls=[
        dict(id='c', type='function', function=dict(name='f', arguments='{}'))]),
    dict(role='tool', tool_call_id='c', content='1'), dict(role='user', content='so?', name='me')],
    max_tokens=1, temperature=1.0, top_p=.5, stop=['.'], seed=1, stream=False, n=1, user='me', metadata=dict(a='b'),
    store=False, tools=[dict(type='function', function=dict(name='f', parameters=dict(type='object')))],
    tool_choice='none', response_format=dict(type='text'), logit_bias={}, presence_penalty=0, logprobs=False,
    parallel_tool_calls=True)


def places(value, path=()):
    "Every place in a body"
    if path: yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key,v in inner: yield from places(v, (*path, key))


def put(value, path, new):
    "A copy with another value at one place"
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]: inner = inner[key]
    inner[path[-1]] = new
    return copy


def test_a_value_of_another_kind_at_any_place_is_refused_by_name_or_honoured():
    "Every place of a body with every odd value: about 1,200 requests; nothing but a refusal in words, with the field"
    counts = dict(refused=0, read=0)
    for path in places(WHOLE):
        for new in VALUES:
            body = json.dumps(put(WHOLE, path, new)).encode()
            try: read_request(read_body(body), 'tiny')
            except BadRequest as e:
                counts['refused'] += 1
                assert 400<=e.status<500 and str(e).isprintable() and len(str(e))<=500
                field = (e.param or '').split('[')[0].split('.')[0]
                assert field in (path[0], 'tool_choice', 'tools'), (path, new, e)
            else: counts['read'] += 1
    assert counts['refused']>800 and counts['read']>50, counts


def test_odd_requests_over_http_never_fail_the_server(web, caplog):
    draw = random.Random(1)
    every = [(p, v) for p in places(WHOLE) for v in VALUES]
    for path,new in draw.sample(every, 120):
        reply = web.post('/v1/chat/completions', json=put(WHOLE, path, new))
        assert reply.status_code in (200, 400, 404), (path, new, reply.text)
        if reply.status_code!=200: assert {*reply.json()['error']} == {'message', 'type', 'param', 'code'}
    for temperature in (1e-320, 1e-9, 5e-5, 2):
        reply = web.post('/v1/chat/completions', json=HI | dict(temperature=temperature, top_p=0, seed=-5))
        assert reply.status_code == 200
    assert [r for r in caplog.records if r.exc_info] == []


def test_missing_fields_and_unknown_ones(web):
    for path,body,param,code in (
            ('chat/completions', {}, 'messages', 'missing_required_parameter'),
            ('completions', {}, 'prompt', 'missing_required_parameter'),
            ('chat/completions', HI | dict(best='x'), 'best', 'unknown_parameter'),
            ('completions', dict(prompt='a', messages=[]), 'messages', 'unknown_parameter'),
            ('chat/completions', HI | dict(stream_options=dict(include_usage=True)), 'stream_options', None),
            ('chat/completions', HI | dict(stream=True, stream_options=dict(x=1)), 'stream_options.x',
             'unknown_parameter'),
            ('chat/completions', HI | dict(max_completion_tokens=3), 'max_tokens', 'invalid_parameter_combination')):
        reply = web.post(f'/v1/{path}', json=body)
        assert (reply.status_code, reply.json()['error']['param'], reply.json()['error']['code']) == (400, param, code)
    for path,method,code in (('/v1/nothing', 'GET', 'unknown_url'), ('/v1/models/gpt', 'GET', 'model_not_found'),
                             ('/v1/models', 'DELETE', 'method_not_supported'),
                             ('/v1/completions', 'GET', 'method_not_supported')):
        reply = web.request(method, path)
        assert reply.status_code == (405 if 'method' in code else 404) and reply.json()['error']['code'] == code


# --- ends of answers

@pytest.fixture
def endless(monkeypatch):
    "A model that never ends by itself"
    monkeypatch.setattr('sage_finetune.inference.generate.stop_ids', lambda *a: [10**6])


def events(reply):
    "The events of a stream, as JSON or [DONE]"
    lines = [l[6:].strip() for l in reply if l.startswith(b'data: ')]
    return [l.decode() if l==b'[DONE]' else json.loads(l) for l in lines]


def stream(port, **more):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    connection.request('POST', '/v1/chat/completions', json.dumps(HI | dict(stream=True, max_tokens=1500) | more))
    return connection.getresponse()


def test_an_answer_that_is_stopped_never_looks_whole(loaded, endless):
    with running(loaded) as (engine, port, server), ThreadPoolExecutor(4) as many:
        whole = many.submit(request, port, body=HI | dict(max_tokens=1500))
        while not engine.waiting: time.sleep(0.01)
        first = many.submit(lambda: stream(port).read())
        time.sleep(0.5)
        engine.halt()
        server.should_exit = True
        assert whole.result()[0] == 503 and whole.result()[1]['retry-after']
        assert b'server_stopping' in first.result()
    with running(loaded) as (engine, port, server):
        reply = stream(port)
        lines = [next(reply) for _ in range(9)]
        server.should_exit = True
        found = events([*lines, *reply])
        assert '[DONE]' not in found and found[-1]['error']['code'] == 'server_stopping'
        reasons = [c['finish_reason'] for e in found if e.get('choices') for c in e['choices']]
        assert [r for r in reasons if r] == ['error']


def test_the_openai_client_raises_where_an_answer_was_stopped(loaded, endless):
    with running(loaded) as (engine, port, server):
        client = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none', max_retries=0)
        with pytest.raises(openai.APIError, match='The server is stopping'):
            for i,_ in enumerate(client.chat.completions.create(model='tiny', messages=HI['messages'], stream=True,
                                                                max_tokens=1500)):
                if i==3: engine.halt()


def test_who_waits_is_told_so_by_the_status(loaded):
    hold = threading.Event()
    with running(loaded, most_waiting=2) as (engine, port, server), ThreadPoolExecutor(2) as many:
        engine.worker.submit(hold.wait, 20)
        waiting = [many.submit(request, port, body=HI | dict(stream=s)) for s in (True, False)]
        while engine.taken<2: time.sleep(0.01)
        full,headers,body = request(port, body=HI)
        assert full == 503 and headers['retry-after'] == '5'
        assert json.loads(body)['error']['code'] == 'server_overloaded'
        engine.halt()
        hold.set()
        assert [w.result()[0] for w in waiting] == [503, 503]
        assert all(w.result()[1]['retry-after'] for w in waiting)
        assert request(port, body=HI)[0] == 503
        patience = time.monotonic()+20 # the worker takes them off its list after the clients have read
        while (engine.taken or engine.waiting) and time.monotonic()<patience: time.sleep(0.01)
    assert engine.taken == 0 and not engine.waiting


@pytest.mark.parametrize('streamed', [False, True])
def test_a_fault_of_ours_is_an_error_one_line_and_no_end(loaded, monkeypatch, caplog, streamed):
    def fails(*args):
        args[8]('Six')
        raise RuntimeError('CUDA error:\nout of order')
    monkeypatch.setattr(chat_api, 'generate_answers', fails)
    with running(loaded) as (engine, port, server):
        found,_,body = request(port, body=HI | dict(stream=streamed))
        assert b'CUDA error: out of order' in body and b'[DONE]' not in body and b'server_error' in body
        assert found == (200 if streamed else 500) and (b'"finish_reason": "error"' in body) == streamed
        monkeypatch.undo()
        assert request(port, body=HI)[0] == 200, 'the next one is answered'
    record, = [r for r in caplog.records if r.exc_info]
    line = serve._Line().format(record)
    assert '\n' not in line and 'Traceback' not in line
    assert 'RuntimeError: CUDA error: out of order (test_chat_api' in line


def test_a_template_that_fails_is_the_client_s_mistake(loaded, monkeypatch, web):
    def fails(messages, tokenizer): raise TypeError('can only concatenate str')
    monkeypatch.setattr(chat_api, 'encode_question', fails)
    reply = web.post('/v1/chat/completions', json=HI | dict(stream=True))
    assert (reply.status_code, reply.json()['error']['param']) == (400, 'messages')


def test_clients_that_go_away_while_they_wait_leave_nothing_behind(loaded):
    hold = threading.Event()
    with running(loaded) as (engine, port, server):
        engine.worker.submit(hold.wait, 20)
        body = json.dumps(HI | dict(stream=True)).encode()
        head = b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n' % len(body)
        gone = [socket.create_connection(('127.0.0.1', port)) for _ in range(5)]
        for s in gone: s.sendall(head+body)
        while engine.taken<5: time.sleep(0.01)
        for s in gone: s.close()
        give_up = time.monotonic()+10
        while engine.taken and time.monotonic()<give_up: time.sleep(0.05)
        assert engine.taken == 0
        hold.set()
        assert request(port, body=HI)[0] == 200
    assert not engine.waiting


# --- a process of its own

def figures(pid):
    "Resident memory in MB, threads and open files of a process"
    text = Path(f'/proc/{pid}/status').read_text()
    number = lambda key: int(text.split(f'{key}:')[1].split()[0])
    return number('VmRSS')/1024,number('Threads'),len(os.listdir(f'/proc/{pid}/fd'))


def peak(pid): return int(Path(f'/proc/{pid}/status').read_text().split('VmHWM:')[1].split()[0])/1024


@needs_proc
def test_a_huge_body_leaves_the_memory_as_it_is_and_the_log_tidy(tmp_path, quick_servers):
    server = start_server('sage-tiny', port=0, log=tmp_path/'log')
    port = int(server.url.rpartition(':')[2])
    try:
        assert request(port, body=HI)[0] == 200
        before = peak(server.process.pid)
        assert request(port, body=b' '*200_000_000)[0] == 413
        chunks = (b' '*2**20 for _ in range(200))
        try: assert request(port, body=chunks, headers={'Transfer-Encoding': 'chunked'})[0] == 413
        except (BrokenPipeError, ConnectionResetError): pass # it did not wait for the end
        assert request(port, body=b'['*900_000)[0] == 400
        assert request(port, body=b'{"metadata": ['+b'{},'*300_000+b'{}]}')[0] == 400
        raw(port, b'nonsense\r\n\r\n')
        raw(port, b'POST /v1/%0a%1b[31m HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n')
        assert peak(server.process.pid)-before<80
        assert request(port, body=HI)[0] == 200
    finally: server.stop()
    log = (tmp_path/'log').read_text()
    assert 'Traceback' not in log and log.isascii() and '\x1b' not in log
    assert [l for l in log.splitlines() if not re.match(r'\d{4}-\d\d-\d\d [\d:,]+ (info|warning|error): \S', l)] == []


@needs_proc
@pytest.mark.slow
def test_five_hundred_requests_two_hundred_at_once_and_no_growth(tmp_path):
    server = start_server('sage-tiny', port=0, log=tmp_path/'log')
    port,pid = int(server.url.rpartition(':')[2]),server.process.pid
    kinds = [(HI, 200), (HI | dict(stream=True), 200), (HI | dict(n=2), 200), (b'{', 400), (HI | dict(seed='x'), 400)]
    def one(i):
        body,expected = kinds[i%len(kinds)]
        found,_,text = request(port, body=body, timeout=500)
        return found==expected and (b'[DONE]' in text) == (i%len(kinds)==1)
    try:
        with ThreadPoolExecutor(200) as many: # the first round makes what stays: buffers, code, caches
            assert all(many.map(one, range(200)))
        before = figures(pid)
        with ThreadPoolExecutor(200) as many: assert all(many.map(one, range(500)))
        time.sleep(6) # connections that are kept alive are closed after 5 s
        after = figures(pid)
        print('memory (MB), threads, files before and after:', before, after)
        assert after[0]-before[0]<15 and after[1]<=before[1] and after[2]<=before[2]+2
    finally: server.stop()

"A teacher behind OpenAI's API: what it proposes, what is kept, and what happens when it is stopped, lies or is gone"
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from quick import fork_servers, forked
from sage_finetune.core.disk import SageError
from sage_finetune.serving import serve as serve_module
from sage_finetune.serving.serve import serving
from sage_finetune.rows.formats import to_messages
from sage_finetune.synthetic.teacher import (
    cut_passages, Generated, generate_rows, groundedness, pairs_in, Passage, read_passages, sift, teacher_prompt,
    why_dropped)

secret = 'sk-VerySecretKeyOfThisTest0123456789'
GARDEN = {f'bed_{i}.md': f'# Bed {i}\n\nThe bed number {i} is {3+i} m long and holds {name}.\nIt is watered on {day}, '
          f'and {name} are cut in the {i}th week of {month}. Nobody walks there after rain.\n'
          for i, (name, day, month) in enumerate([('tulips', 'Monday', 'April'), ('leeks', 'Friday', 'August'),
                                                  ('roses', 'Sunday', 'June'), ('beans', 'Tuesday', 'July')], 1)}


def honest(text):
    "Two grounded facts and one made up, about the passage in a prompt"
    number = text.split('The bed number ')[1].split()[0]
    length, name = text.split(f'number {number} is ')[1].split()[0], text.split(' holds ')[1].split('.')[0]
    pairs = [(f'How long is bed {number}?', f'What is the length of the bed {number}?', f'It is {length} m long.'),
             (f'What grows in bed number {number}?', f'Which plants does bed {number} hold?', name),
             (f'Who planted bed {number}?', '', 'Two sisters from Bologna did, in 1911.')]
    return '\n'.join(json.dumps(dict(question=q, other=o, answer=a)) for q, o, a in pairs)


class Teacher(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.0'
    def log_message(self, *args): pass

    def do_GET(self): self.say(json.dumps(dict(data=[dict(id='big/teacher')])), 'application/json')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.server.asked.append(body['messages'][0]['content'])
        if len(self.server.asked)>self.server.most: return self.send_error(503, 'the teacher is tired')
        piece = dict(choices=[dict(delta=dict(content=self.server.answer(body['messages'][0]['content'])))])
        end = dict(choices=[dict(delta={}, finish_reason='stop')])
        self.say(f'data: {json.dumps(piece)}\n\ndata: {json.dumps(end)}\n\ndata: [DONE]\n\n', 'text/event-stream')

    def say(self, text, kind):
        self.send_response(200)
        self.send_header('Content-Type', kind)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def teacher():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Teacher)
    server.asked, server.most, server.answer = [], 10**9, honest
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def garden(tmp_path):
    for name, text in GARDEN.items(): (tmp_path/'garden'/name).parent.mkdir(exist_ok=True) or (
        tmp_path/'garden'/name).write_text(text)
    return tmp_path/'garden'


def rows(path): return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_have_a_source_the_numbers_add_up_and_the_exam_stands_apart(teacher, garden, tmp_path):
    (garden/'keys.txt').write_text('password = "hunter2-8fj2Kd9sLq0xPz"\n'*9)
    out = tmp_path/'rows.jsonl'
    found = generate_rows(garden, teacher.url, out, exam=1.0, api_key=secret)
    assert (len(teacher.asked), found.passages, found.proposed, len(found.rows), len(found.exam))==(4, 4, 12, 8, 8)
    assert found.dropped==Counter({'not grounded in the passage': 4}) and 'keys.txt' in found.passed
    assert len(found.rows)+sum(found.dropped.values())==found.proposed
    assert rows(out)==found.rows and rows(tmp_path/'rows.exam.jsonl')==found.exam
    for r in found.rows:
        name, line = r['source'].rsplit(':', 1)
        assert int(line)==1 and r['teacher']=='teacher' and groundedness(r['answer'], (garden/name).read_text())>=.6
        assert to_messages(r)[-1]['content']==r['answer'] # it is a format that is trained on
    trained = {r['question'] for r in found.rows}
    assert not trained & {r['question'] for r in found.exam}
    assert {r['answer'] for r in found.exam}<={r['answer'] for r in found.rows}
    report = json.loads((tmp_path/'rows.report.json').read_text())
    assert report['rows']==8 and report['dropped']=={'not grounded in the passage': 4}
    assert all(secret not in p.read_text() for p in tmp_path.glob('rows*'))
    assert '8 rows by teacher' in str(found)


def test_it_goes_on_where_it_was_stopped_and_asks_nothing_twice(teacher, garden, tmp_path):
    out = tmp_path/'rows.jsonl'
    teacher.most = 2
    with pytest.raises(SageError, match='503.*2 of 4 passages are answered and kept, the same command goes on'):
        generate_rows(garden, teacher.url, out)
    assert not out.exists() and len(rows(tmp_path/'rows.replies.jsonl'))==2
    with open(tmp_path/'rows.replies.jsonl', 'a') as f: f.write('{"key": "half a li')
    teacher.most, teacher.asked = 10**9, []
    found = generate_rows(garden, teacher.url, out)
    assert (len(teacher.asked), found.known)==(2, 2) and len(found.rows)==8
    whole = generate_rows(garden, teacher.url, tmp_path/'other.jsonl')
    assert (whole.rows, whole.exam)==(found.rows, found.exam)
    teacher.asked = []
    assert generate_rows(garden, teacher.url, out).known==4 and teacher.asked==[]
    (garden/'bed_1.md').write_text(GARDEN['bed_1.md'].replace('Monday', 'Thursday')) # only what changed is asked anew
    assert generate_rows(garden, teacher.url, out).known==3 and len(teacher.asked)==1
    assert generate_rows(garden, teacher.url, out, questions=2).known==0


@pytest.mark.parametrize('answer,why', [
    (lambda text: 'I am sorry.', 'no reply held a question'), (lambda text: '{"question": "x"}', 'no reply held'),
    (lambda text: '{"question": "What does the passage say?", "answer": "tulips"}', '4 asks about the passage itself'),
    (lambda text: '{"question": "How old?", "answer": "99 years old"}', '4 not grounded in the passage')])
def test_a_teacher_that_is_of_no_use_writes_nothing(teacher, garden, tmp_path, answer, why):
    teacher.answer = answer
    with pytest.raises(SageError, match=f'wrote no row that holds .*{why}'):
        generate_rows(garden, teacher.url, tmp_path/'rows.jsonl')
    assert not (tmp_path/'rows.jsonl').exists()


def test_copies_are_dropped_across_passages_and_files():
    beds = [Passage(f'{n}:1', 'The long bed holds tulips.') for n in 'abc']
    reply = ['{"question": "What does the long bed hold?", "answer": "tulips"}',
             '{"question": "what does the long bed hold", "answer": "Tulips"}',
             '{"question": "Tell me: what does the long bed hold?", "answer": "tulips."}']
    found = sift(beds, reply)
    assert isinstance(found, Generated) and len(found.rows)==2 and found.dropped=={'nearly asked already': 1}


def test_the_exam_never_asks_what_is_trained():
    passage = Passage('a:1', 'The well is 9 m deep and the barn is red.')
    same = [dict(question='How deep is the well?', other='How deep is the well', answer='9 m'),
            dict(question='Which colour has the barn?', other='How deep is the well?', answer='red'),
            dict(question='What colour is the barn painted in?', other='', answer='red')]
    found = sift([passage], [json.dumps(dict(pairs=same))], exam=1.0)
    assert len(found.rows)==3 and found.exam==[]


@pytest.mark.parametrize('pair,why', [
    (dict(question='How deep?', answer='10 m'), 'not grounded'), (dict(question='q', answer='9 m '*200), 'too long'),
    (dict(question='Above, how deep?', answer='9 m'), 'passage itself'),
    (dict(question='Key?', answer='ghp_'+'a1B2'*9), 'secret'), (dict(question='How deep is it?', answer='9 m'), '')])
def test_why_a_pair_is_dropped(pair, why):
    found = why_dropped(pair, Passage('a:1', 'The well is 9 m deep.'), [])
    assert why in found and bool(why)==bool(found)


@pytest.mark.parametrize('answer,passage,low,high', [
    ('水井深9米', '水井深9米，在谷仓后面。', 1, 1),
    ('3.5', 'It is 3.5 m', 1, 1), ('3.6', 'It is 3.5 m', 0, 0),
    ('def add', 'def add(a, b)', 1, 1), ('Watered daily', 'We are watering daily.', 1, 1), ('No.', 'Yes.', 0, 0)])
def test_grounded(answer, passage, low, high): assert low<=groundedness(answer, passage)<=high


def test_passages_hold_every_line_once_and_say_where_they_are(tmp_path):
    text = '\n'.join(f'line {i} of a long list of things' if i%7 else '' for i in range(200))
    cut = cut_passages(text, 'a.md', 300)
    assert [l for p in cut for l in p.text.splitlines() if l]==[l for l in text.splitlines() if l]
    for p in cut: assert text.splitlines()[int(p.source.split(':')[1])-1]==p.text.splitlines()[0]
    (tmp_path/'empty.md').write_text('too short')
    with pytest.raises(SageError, match='nothing to ask about'): read_passages(tmp_path)
    assert pairs_in('')==[] and 'a.md' in teacher_prompt(cut[0])[0]['content']


def test_our_own_server_on_the_embedded_model(garden, tmp_path):
    "It is no teacher: what it says is read, counted, kept for the next call, and nothing that does not hold is a row"
    before = fork_servers(serve_module) if forked else None
    try:
        with serving('sage-tiny', max_new_tokens=24) as server:
            for _ in range(2):
                with pytest.raises(SageError, match=r'wrote no row that holds \(2 passages'):
                    generate_rows(garden, server.url, tmp_path/'rows.jsonl', most=2, max_new_tokens=24)
    finally:
        if before: serve_module.subprocess = before
    assert [r['source'].split(':')[0] for r in rows(tmp_path/'rows.replies.jsonl')]==['bed_1.md', 'bed_3.md']

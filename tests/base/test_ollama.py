"""A Modelfile as Ollama reads it

No published package brings Ollama itself, or its reader: of what PyPI and npm have, the clients speak to a server, and
`owist-modelfile-lint` checks names and values. So the file is read here by the rules of Ollama's own reader
(`parser/parser.go`, as published in 2026: a rune at a time, quotation marks taken off without any escape, what cannot
be printed dropped), and its template is run by Go's own `text/template`, which is the engine that Ollama uses, where a
Go is at hand (`apt install golang-go`).
"""
import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sage_finetune.base.ollama import modelfile, ollama_template
from sage_finetune.config import resolve_model
from sage_finetune.rows.template import render

COMMANDS = 'from', 'license', 'template', 'system', 'adapter', 'renderer', 'parser', 'parameter', 'message', 'requires'
PARAMETERS = dict(temperature=float, repeat_penalty=float, num_ctx=int, stop=str) # of those that Ollama knows
_trl = find_spec('trl')
templates = sorted(Path(_trl.origin).parent.glob('chat_templates/*.jinja')) if _trl else []
talks = ([('user', 'a')], [('system', 'Be brief.\nAlways.'), ('user', 'a')],
         [('user', 'a'), ('assistant', 'b\n\nc "d"'), ('user', '你好?')],
         [('system', 's'), ('user', 'a'), ('assistant', 'b'), ('user', 'c'), ('assistant', 'd'), ('user', 'e')])


def unquoted(text):
    "The value of a command; None while a quotation is open"
    for mark in ('"""', '"'):
        if not text.startswith(mark): continue
        return text[len(mark):-len(mark)] if len(text)>=2*len(mark) and text.endswith(mark) else None
    return text


def read_modelfile(text):
    "[(command, value)] as Ollama's reader finds them"
    out,rest = [],text
    while rest := rest.lstrip(' \t\r\n'):
        if rest[0]=='#':
            rest = rest.partition('\n')[2]
            continue
        name,_,rest = rest.partition(' ')
        assert name.lower() in COMMANDS, name
        if name.lower()=='parameter':
            name,_,rest = rest.partition(' ')
            assert name in PARAMETERS, name
        value = ''
        for i,c in enumerate(rest):
            if c in '\r\n' and unquoted(value.strip()) is not None: break
            value += c if c.isprintable() or c in ' \t\r\n' else ''
        else: i = len(rest)
        found = unquoted(value.strip())
        assert found is not None, 'a quotation is open at the end'
        out.append((name.lower(), found))
        rest = rest[i:]
    assert [n for n,_ in out].count('from')==1
    return out


@pytest.fixture(scope='module')
def tok(): return AutoTokenizer.from_pretrained(resolve_model('sage-tiny'))


def said(tok, some=slice(None)):
    "A Modelfile for each real template that one can be written for: {name: its text and the template}"
    out,why = {},{}
    for file in templates[some]:
        tok.chat_template = file.read_text(encoding='utf-8')
        try: out[file.stem] = modelfile(tok, './a b.gguf', 2048),ollama_template(tok)
        except ValueError as e: why[file.stem] = str(e)
        except Exception as e: why[file.stem] = type(e).__name__
    return out,why


@pytest.mark.parametrize('some', [slice(0, 72, 18), pytest.param(slice(None), marks=pytest.mark.slow)])
def test_ollama_reads_what_was_written(some, tok):
    own = tok.chat_template
    try: found,why = said(tok, some)
    finally: tok.chat_template = own
    for text,template in [(modelfile(tok, './a b.gguf', 2048), ollama_template(tok)), *found.values()]:
        given = read_modelfile(text)
        assert given[:2]==[('from', './a b.gguf'), ('template', template)]
        for name,value in given[2:]: assert PARAMETERS[name](value) is not None
        assert dict(given)['num_ctx']=='2048' and [v for n,v in given if n=='stop']
    if templates: assert len(found)>=len(templates[some])/2 and all(' ' in w for w in why.values())


@pytest.mark.parametrize('word', ['say "now"', '"', '""x""', 'a\nb', '  two  '])
def test_a_word_that_ends_an_answer_is_read_as_it_is(word, tok, monkeypatch):
    from sage_finetune.base import ollama
    monkeypatch.setattr(ollama, '_stop_words', lambda *a: [word])
    assert read_modelfile(modelfile(tok))[-1]==('stop', word)


@pytest.mark.parametrize('odd', ['\u200b', '\u3000', '\x07', '\ue123'])
def test_what_ollama_would_drop_is_refused(odd, tok):
    own = tok.chat_template
    tok.chat_template = own.replace('<|im_start|>', f'<|im_start|>{odd}', 1)
    try:
        with pytest.raises(ValueError, match='Ollama drops'): modelfile(tok)
    finally: tok.chat_template = own


GO = '''package main
import ("encoding/json"; "os"; "strings"; "text/template")
type Message struct { Role, Content string }
type Talk struct { System string; Messages []*Message }
type Task struct { Template string; Talks []Talk }
func main() {
  var tasks []Task
  if err := json.NewDecoder(os.Stdin).Decode(&tasks); err != nil { panic(err) }
  out := [][]string{}
  for _, task := range tasks {
    made, said := template.Must(template.New("").Parse(task.Template)), []string{}
    for _, talk := range task.Talks {
      var b strings.Builder
      values := map[string]any{"System": talk.System, "Messages": talk.Messages}
      if err := made.Execute(&b, values); err != nil { panic(err) }
      said = append(said, b.String())
    }
    out = append(out, said)
  }
  json.NewEncoder(os.Stdout).Encode(out)
}
'''


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('go') is None, reason='no Go here: apt install golang-go')
def test_go_itself_writes_what_the_chat_template_writes(tok, tmp_path):
    own = tok.chat_template
    try:
        found,_ = said(tok)
        tok.chat_template = own
        found['own'] = None,ollama_template(tok)
        tasks,wanted = [],[]
        for name,(_,template) in found.items():
            tok.chat_template = own if name=='own' else next(f for f in templates if f.stem==name).read_text('utf-8')
            forms = [[dict(role=r, content=t) for r,t in talk] for talk in talks]
            adds = tok.bos_token and tok('a')['input_ids'][:1]==[tok.bos_token_id]
            begin = tok.bos_token if adds else ''
            wanted.append([render(m, tok, add_generation_prompt=True).removeprefix(begin) for m in forms])
            tasks.append(dict(Template=template, Talks=[dict(
                System='\n\n'.join(m['content'] for m in f if m['role']=='system'),
                Messages=[dict(Role=m['role'], Content=m['content']) for m in f]) for f in forms]))
    finally: tok.chat_template = own
    (tmp_path/'main.go').write_text(GO, encoding='utf-8')
    done = subprocess.run(['go', 'run', 'main.go'], input=json.dumps(tasks), capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode==0, done.stderr
    assert json.loads(done.stdout)==wanted and len(wanted)>20
    print(f'{len(wanted)} templates, {sum(map(len, wanted))} prompts')

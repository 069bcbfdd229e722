"Dull edges of `rows.repo_files` and `synthetic.codebase`: odd trees, odd bytes, and secrets that must never come out"
import json, os, random, shutil, subprocess, sys, warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from sage_finetune.synthetic.code_facts import code_facts, LANGUAGES, markdown_facts, notebook_facts
from sage_finetune.synthetic.codebase import (
    code_files, held_out_rows, held_out_wordings, read_codebase, train_rows, WORDINGS
)
from sage_finetune.core.repo_files import find_files, find_secret, is_generated, is_secret_name, largest_file

STACK = ('"A stack"\nclass Stack(list):\n    "Last in, first out."\n    def push(self, item):\n'
         '        "Put `item` on top."\n')
NEEDS_PARSERS = pytest.mark.skipif(find_spec('tree_sitter') is None, reason='needs the extra `code`')

def tree(root, **files):
    "Write files whose names are keys with `__` for `/` and `_dot_` for a dot"
    for name,text in files.items(): put(root, name.replace('__', '/').replace('_dot_', '.'), text)

def put(root, name, data=''):
    path = root/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path

def everything(book):
    "All that a reading lets out: rows, report, record, HTML, errors"
    return json.dumps([train_rows(book.facts, n_wordings=8), held_out_rows(book.facts), book.to_dict()],
                      ensure_ascii=False) + str(book) + repr(book) + book._repr_html_()

# What git ignores

PATTERNS = ['*.py', '!a.py', '/a/', 'b/', '!b/', 'a/b.py', '**/c.py', 'c*', '!/c.py', 'b/*', '!b/a.py', '[ab].py',
            'a/**', '# note', '', ' ', '\\!a.py', 'd ', '*', '!*/',
            '!*.py', '**/a', 'a/**/b', '?.py', '[!a].py', 'a*/', '/**/c.py', '!a/**', '**', '!b', 'b/**/', 'a/*/',
            '*/b.py', 'a.py ', '/', '//', 'b//']

@pytest.mark.skipif(not shutil.which('git'), reason='git is what we compare with')
@pytest.mark.parametrize('seed', range(12))
def test_ignores_what_git_ignores(tmp_path, seed):
    rng = random.Random(seed)
    folders = ['', 'a/', 'b/', 'a/b/', 'b/a/', 'c/']
    for folder in folders:
        for name in 'abc': put(tmp_path, f'{folder}{name}.py', 'x = 1')
    for folder in ['', *rng.sample(folders[1:], 3)]:
        put(tmp_path, f'{folder}.gitignore', '\n'.join(rng.choices(PATTERNS, k=4)))
    env = {**os.environ, 'HOME': str(tmp_path/'home'), 'XDG_CONFIG_HOME': str(tmp_path/'home'),
           'GIT_CONFIG_NOSYSTEM': '1', 'GIT_CONFIG_GLOBAL': os.devnull}
    git = lambda *args: subprocess.run(['git', *args], cwd=tmp_path, env=env, capture_output=True, text=True,
                                       check=True).stdout
    git('init', '-q')
    put(tmp_path, '.git/info/exclude', rng.choice(['', 'c.py', '/b/\n!a.py']))
    listed = {n for n in git('ls-files', '-o', '--exclude-standard').splitlines() if n.endswith('.py')}
    assert set(find_files(tmp_path, {'.py'}).names)==listed

NEEDS_GIT = pytest.mark.skipif(not shutil.which('git'), reason='git is asked')

def checkout(folder):
    subprocess.run(['git', 'init', '-q', folder], check=True)
    return lambda *args: subprocess.run(['git', *args], cwd=folder, check=True, capture_output=True)

@NEEDS_GIT
def test_in_a_checkout_git_is_asked(tmp_path, monkeypatch):
    git = checkout(tmp_path)
    tree(tmp_path, _dot_gitignore='made/\n*_gen.py\n', a_dot_py='', kept_gen_dot_py='', lost_gen_dot_py='',
         made__b_dot_py='', mine_dot_py='', only__x_gen_dot_py='')
    (tmp_path/'empty').mkdir()
    put(tmp_path, 'list/ignore', 'mine.py')
    git('add', '-f', 'kept_gen.py') # what is tracked is never left out
    git('config', 'core.excludesFile', str(tmp_path/'list/ignore')) # a list of one's own is not asked
    monkeypatch.setenv('GIT_DIR', str(tmp_path/'elsewhere')) # nor is what a hook of git sets
    found = find_files(tmp_path, {'.py'})
    assert found.names==['a.py', 'kept_gen.py', 'mine.py']
    assert found.skipped=={'.git/': 'hidden', 'lost_gen.py': 'ignored by git', 'made/': 'ignored by git',
                           'only/x_gen.py': 'ignored by git'}

@NEEDS_GIT
def test_a_checkout_inside_a_checkout_has_its_own_rules(tmp_path):
    checkout(tmp_path)
    (tmp_path/'sub').mkdir()
    checkout(tmp_path/'sub')
    tree(tmp_path, _dot_gitignore='x.py', x_dot_py='', sub___dot_gitignore='y.py', sub__x_dot_py='', sub__y_dot_py='')
    assert find_files(tmp_path, {'.py'}).names==['sub/x.py']

@NEEDS_GIT
def test_a_folder_that_git_leaves_out_may_be_named(tmp_path):
    checkout(tmp_path)
    tree(tmp_path, _dot_gitignore='.venv/\n*.py', _dot_venv__pkg__a_dot_py='', _dot_venv__b_dot_py='')
    assert find_files(tmp_path/'.venv'/'pkg', {'.py'}).names==['a.py']
    assert find_files(tmp_path/'.venv', {'.py'}).names==['b.py', 'pkg/a.py']

@NEEDS_GIT
def test_without_git_the_files_are_the_same(tmp_path, monkeypatch):
    checkout(tmp_path)
    tree(tmp_path, _dot_gitignore='*.py\n!lib/\n!kept.py\nout/', kept_dot_py='', lost_dot_py='', out__kept_dot_py='',
         lib___dot_gitignore='!*.py\n/b.py', lib__a_dot_py='', lib__b_dot_py='')
    names = find_files(tmp_path, {'.py'}).names
    monkeypatch.setenv('PATH', '')
    assert names==find_files(tmp_path, {'.py'}).names==['kept.py', 'lib/a.py']

def test_nested_and_negated(tmp_path):
    tree(tmp_path, _dot_gitignore='*.py\n!kept.py\nshut/\n!shut/kept.py\n', lost_dot_py='', kept_dot_py='',
         shut__kept_dot_py='', open___dot_gitignore='!*.py\n', open__back_dot_py='')
    found = find_files(tmp_path, {'.py'})
    assert found.names==['kept.py', 'open/back.py']
    assert found.skipped=={'lost.py': 'ignored by git', 'shut/': 'ignored by git'}

def test_rules_above_hold_unless_they_leave_out_the_folder_itself(tmp_path):
    tree(tmp_path, _dot_git__HEAD='', _dot_gitignore='.venv/\nsecretly.py\n', src__a_dot_py='',
         src__secretly_dot_py='', _dot_venv__pkg__secretly_dot_py='')
    assert find_files(tmp_path/'src', {'.py'}).names==['a.py']
    assert find_files(tmp_path/'.venv'/'pkg', {'.py'}).names==['secretly.py']

@pytest.mark.parametrize('data', [b'\xff\xfe*\x00', b'!\n\\\n[z-a]\n[[:x:]]\n*.py', b'\xef\xbb\xbf*.py', b'*.py\r\n'])
def test_odd_rules(tmp_path, data):
    put(tmp_path, '.gitignore', data)
    put(tmp_path, 'a.py', '')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(find_files(tmp_path, {'.py'}).names)==(0 if b'*.py' in data else 1)

def test_a_folder_called_gitignore(tmp_path):
    put(tmp_path, '.gitignore/x.py')
    put(tmp_path, 'a.py')
    assert find_files(tmp_path, {'.py'}).names==['a.py']

# Odd trees

def test_links(tmp_path):
    root,outside = tmp_path/'root',tmp_path/'outside'
    put(root, 'a.py', STACK)
    put(outside, 'theirs.py', STACK)
    for name,target in dict(loop='.', up='..', out=outside, dead='nowhere').items(): (root/name).symlink_to(target)
    for name,target in {'copy.py': root/'a.py', 'out.py': outside/'theirs.py', 'self.py': 'self.py',
                        'dead.py': 'nowhere.py'}.items():
        (root/name).symlink_to(target)
    (root/'deep').mkdir()
    (root/'deep'/'back').symlink_to('../deep')
    book = read_codebase(root)
    assert book.files==['a.py']
    assert book.skipped=={'copy.py': 'link: to another place in the folder', 'dead.py': 'link: to nothing',
                          'out.py': 'link: out of the folder',
                          'self.py': 'link: to nothing', 'loop/': 'link: to another place in the folder',
                          'out/': 'link: out of the folder',
                          'up/': 'link: out of the folder', 'deep/back/': 'link: to another place in the folder'}
    assert book.other=={'no ending': 1} # `dead`

def test_root_may_be_a_link(tmp_path):
    put(tmp_path, 'real/a.py', STACK)
    (tmp_path/'link').symlink_to('real')
    assert [f.source for f in read_codebase(tmp_path/'link').facts]==[
        f.source for f in read_codebase(tmp_path/'real').facts]!=[]

@pytest.mark.skipif(os.name=='nt' or hasattr(os, 'geteuid') and os.geteuid()==0, reason='root may read everything')
def test_unreadable(tmp_path):
    shut,folder = put(tmp_path, 'shut.py', STACK),tmp_path/'closed'
    put(tmp_path, 'closed/a.py')
    put(tmp_path, 'open.py', STACK)
    shut.chmod(0)
    folder.chmod(0)
    try: book = read_codebase(tmp_path)
    finally: folder.chmod(0o700)
    assert (book.files==['open.py'] and book.skipped
            =={'shut.py': 'cannot be read: permission denied', 'closed/': 'cannot be read: permission denied'})

def test_unreadable_by_any_user(tmp_path, monkeypatch):
    put(tmp_path, 'shut/a.py')
    put(tmp_path, 'gone.py', STACK)
    put(tmp_path, 'open.py', STACK)
    listdir,opened = os.listdir,open
    def no_list(path):
        return (listdir(path) if Path(path).name!='shut'
                else (_ for _ in ()).throw(PermissionError(13, 'Permission denied')))
    def no_open(path, *args, **kw):
        return (opened(path, *args, **kw) if Path(path).name!='gone.py'
                else (_ for _ in ()).throw(FileNotFoundError(2, 'No such file')))
    monkeypatch.setattr(os, 'listdir', no_list)
    monkeypatch.setattr('builtins.open', no_open)
    book = read_codebase(tmp_path)
    assert (book.files==['open.py'] and book.skipped
            =={'shut/': 'cannot be read: permission denied', 'gone.py': 'cannot be read: no such file'})

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path/'pipe.py')
    os.mkfifo(tmp_path/'.gitignore')
    assert read_codebase(tmp_path).skipped=={'pipe.py': 'no ordinary file'}

def test_names_that_cannot_be_printed(tmp_path):
    put(tmp_path, 'new\nline.py', STACK)
    put(tmp_path, '数据 a.py', STACK)
    try: (tmp_path/os.fsdecode(b'\xff.py')).write_text(STACK)
    except OSError: pass # some file systems refuse it
    book = read_codebase(tmp_path)
    assert book.files==['数据 a.py'] and set(book.skipped.values())=={'its name cannot be printed'}
    everything(book).encode()

def test_deep_and_wide(tmp_path):
    deep = tmp_path
    for _ in range(150): deep = deep/'d'
    put(deep, 'a.py', STACK)
    for i in range(2000): put(tmp_path, f'pictures/{i}.png')
    for i in range(500): put(tmp_path, f'data/{i}.py', b'\0')
    book = read_codebase(tmp_path)
    assert len(book.files)==1 and book.other=={'.png': 2000} and len(book.skipped)==500
    assert len(str(book).splitlines())==1+5+10+1+3 and '… and 490 more' in str(book)
    assert len(book.to_dict()['skipped'])==500

def test_whole_folders_are_one_entry(tmp_path):
    for n in ('node_modules/x/y.js', 'vendor/a.go', 'my-env/pyvenv.cfg', 'my-env/lib/a.py', 'target/CACHEDIR.TAG',
              'target/a.rs', 'a.egg-info/x.py',
              '.ipynb_checkpoints/a.ipynb', '.tox/a.py', 'tests/a.py', 'ok.py'): put(tmp_path, n)
    assert read_codebase(tmp_path).skipped=={'.ipynb_checkpoints/': 'notebook checkpoints', '.tox/': 'hidden',
        'a.egg-info/': 'made by tools',
        'my-env/': 'virtual environment', 'node_modules/': 'vendored', 'target/': 'made by tools',
        'tests/': 'tests', 'vendor/': 'vendored'}

# Odd files

def test_huge(tmp_path):
    put(tmp_path, 'just.py', STACK+'#'*(largest_file-len(STACK)))
    put(tmp_path, 'over.py', STACK+'#'*(largest_file-len(STACK)+1))
    book = read_codebase(tmp_path)
    assert book.files==['just.py'] and book.skipped=={'over.py': 'larger than 1 MiB'}

def test_encodings(tmp_path):
    latin = '# -*- coding: latin-1 -*-\n"Zoë"\n'
    for name,data in {'bom.py': STACK.encode('utf-8-sig'), 'crlf.py': STACK.replace('\n', '\r\n'),
                      'latin.py': latin.encode('latin-1'), 'utf16.py': STACK.encode('utf-16'),
                      'gbk.md': '# 数据\n\n说明。'.encode('gbk'), 'ok.md': '# 数据\n\n说明。还有。'}.items():
        put(tmp_path, name, data)
    book = read_codebase(tmp_path)
    assert book.files==['bom.py', 'crlf.py', 'ok.md']
    assert {n: r.split(':')[0] for n,r in book.skipped.items()}=={
        'gbk.md': 'not UTF-8 text', 'latin.py': 'not UTF-8 text', 'utf16.py': 'binary'}
    assert [f.answer for f in book.facts if f.kind=='section']==['说明。']
    assert {f.source for f in book.facts if f.subject.startswith('Stack.push')}=={'bom.py:4', 'crlf.py:4'}

def test_half_a_character(tmp_path):
    put(tmp_path, 'a.py', 'def f():\n    "Half \\ud800 of it."\n')
    put(tmp_path, 'b.ipynb', json.dumps(dict(cells=[dict(cell_type='markdown', source='# Half \ud800\n\nAll of it.')])))
    book = read_codebase(tmp_path)
    assert book.left_out=={'half a character (a lone surrogate)': 2}
    everything(book).encode()

def test_no_warning_gets_out(tmp_path):
    put(tmp_path, 'a.py', 'def f():\n    "A \\d digit."\n    return 1 is 1\n')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(read_codebase(tmp_path).facts)==3

def test_names_that_say_what_a_file_is(tmp_path):
    for n in ('a.min.js', 'package-lock.json', 'a_test.go', 'a.spec.ts', 'StackTest.java', 'test_a.py',
              '.hidden.py', 'min.js'):
        put(tmp_path, n)
    book = read_codebase(tmp_path)
    assert book.skipped | {'min.js': ''}=={'.hidden.py': 'hidden', 'StackTest.java': 'tests',
                                           'a.min.js': 'minified', 'a.spec.ts': 'tests', 'a_test.go': 'tests',
                                            'test_a.py': 'tests', 'min.js': ''}

def test_one_file(tmp_path):
    assert len(read_codebase(put(tmp_path, 'a.py', STACK)).facts)==8
    assert read_codebase(put(tmp_path, 'a.xyz', 'x')).skipped=={'a.xyz': 'no reader: .xyz'}
    assert read_codebase(put(tmp_path, '.env', 'A=b')).skipped=={'.env': 'looks like a secret: its name'}
    with pytest.raises(FileNotFoundError, match='codebase not found'): read_codebase(tmp_path/'none')
    with pytest.raises(FileNotFoundError, match='codebase not found'): code_files(tmp_path/'none')

# Secrets

VALUE = 'Zq7' + 'kW3v' # mixes letters and digits; stands nowhere else
PLANTED = {
    'assigned': 'pass' f'word = "{VALUE}-x"', 'typed': 'pass' f'word: str = "{VALUE}"',
    'keyed': '"api_' f'key": "{VALUE}{VALUE}"', 'address': f'u = "postgres://me:{VALUE}@db"',
    'github': 'gh' f'p_{VALUE*6}', 'fine': 'github' f'_pat_{VALUE*4}', 'openai': 'sk' f'-proj-{VALUE*3}',
    'old': 'sk' f'-{VALUE*5}', 'slack': 'xo' f'xb-12345-{VALUE*2}', 'hub': 'h' f'f_{VALUE*5}',
    'aws': 'AK' f'IA{(VALUE*3).upper()[:16]}', 'pem': '-----BEGIN ' f'PRIVATE KEY-----\n{VALUE*6}\n-----END '
    'PRIVATE KEY-----', 'google': 'AI' f'za{VALUE*5}', 'gitlab': 'gl' f'pat-{VALUE*4}'}

@pytest.mark.parametrize('kind', PLANTED)
@pytest.mark.parametrize('name', ['a.py', 'a.md', 'a.js', 'a.ipynb', 'a.go'])
def test_a_planted_secret_never_comes_out(tmp_path, kind, name):
    line = PLANTED[kind]
    text = {'a.py': f'def f():\n    """Uses {line}"""\n', 'a.md': f'# Use\n\nTry {line} first.\n',
            'a.js': f'/** Uses {line} */\nfunction f() {{}}\n', 'a.go': f'// F uses {line}\nfunc F() {{}}\n',
            'a.ipynb': json.dumps(dict(cells=[dict(cell_type='markdown', source=[
                '# Use\n', '\n', *f'Try {line} first.'.splitlines(True)])]), indent=1)}[name]
    put(tmp_path, name, text)
    put(tmp_path, 'ok.py', STACK)
    book = read_codebase(tmp_path)
    assert VALUE.lower() not in everything(book).lower()
    assert book.skipped[name].startswith('looks like a secret: ') and book.files==['ok.py']
    assert find_secret(text).split('line ')[1].isdigit()

@pytest.mark.parametrize('name', ['.env', '.env.local', 'id_rsa', 'id_ed25519', 'server.key', 'cert.pem',
                                  'credentials.json', 'client_secret_1.json', '.netrc', '.npmrc', 'prod.tfvars',
                                  'service-account.json'])
def test_a_secret_by_name(tmp_path, name):
    put(tmp_path, f'conf/{name}', VALUE)
    book = read_codebase(tmp_path)
    assert book.skipped=={f'conf/{name}': 'looks like a secret: its name'} and VALUE not in everything(book)

@pytest.mark.parametrize('name', ['id_rsa.pub', '.env.example', 'secrets.py', 'credentials.py', 'monkey.py',
                                  'keys.md', 'tokenizer.json'])
def test_no_secret_by_name(name): assert not is_secret_name(name)

def test_a_parser_error_does_not_quote_the_file(tmp_path):
    put(tmp_path, 'a.py', f'def f(:\n    x = {VALUE}\n')
    put(tmp_path, 'b.ipynb', f'{{"cells": [{VALUE}')
    book = read_codebase(tmp_path)
    assert len(book.skipped)==2 and VALUE not in everything(book)

def test_html_is_escaped(tmp_path):
    put(tmp_path, '<b>x.py', b'\0')
    assert '<b>x' not in read_codebase(tmp_path)._repr_html_()

# The record

def test_the_record_adds_up(tmp_path):
    put(tmp_path, 'a.py', STACK)
    put(tmp_path, 'b.md', '# A\n\nOne.\n\n## A\n\nTwo.\n')
    put(tmp_path, 'c.py', 'def (')
    book = read_codebase(tmp_path)
    told = book.to_dict()
    assert json.loads(json.dumps(told))==told
    assert sum(told['files'].values())==sum(told['kinds'].values())==len(book.facts)==9
    assert told['left_out']=={'defined twice': 1} and list(told['skipped'])==['c.py']
    assert all(r['source'].rpartition(':')[0] in told['files'] for r in train_rows(book.facts))

def test_wordings_are_kept_apart():
    assert all(len(w)==10 and not set(w[:-held_out_wordings]) & set(w[-held_out_wordings:]) for w in WORDINGS.values())

# Other languages

def test_without_parsers_the_files_are_told(tmp_path):
    put(tmp_path, 'a.go', 'package a')
    put(tmp_path, 'a.py', STACK)
    code = ('import sys; sys.modules["tree_sitter"] = None\n'
            'from sage_finetune.synthetic.codebase import read_codebase; '
            'b = read_codebase(sys.argv[1]); print(b.skipped, b.files)')
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip()=="{'a.go': 'needs `pip install sage-finetune[code]`'} ['a.py']", done.stderr

def test_parsers_are_imported_only_for_their_files(tmp_path):
    put(tmp_path, 'a.py', STACK)
    code = ('import sys\nfrom sage_finetune.synthetic.codebase import read_codebase; read_codebase(sys.argv[1]); '
            'print([m for m in sys.modules if m.startswith(("tree_sitter", "torch", "transformers"))])')
    assert subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True,
                          text=True).stdout.strip()=='[]'

@NEEDS_PARSERS
@pytest.mark.parametrize('suffix', LANGUAGES)
def test_every_grammar_loads(suffix): assert code_facts('', f'a{suffix}')==[]

@NEEDS_PARSERS
@pytest.mark.parametrize('file,text,expected', [
    ('a.js', 'class A { get x() {} set x(v) {} static async get() {} constructor(a) {} _own() {} #p() {} }',
     ['A', 'A.get']),
    ('a.js', 'const A = class { m() {} }; foo(() => { function inner() {} });', []),
    ('a.ts', 'export interface I extends J { m(a: number): void }\n'
     'export abstract class A { protected p() {} q() {} }', ['A', 'A.q', 'I', 'I.m']),
    ('a.go', 'package a\ntype hidden struct{}\nfunc (h hidden) Shown(int) {}\nfunc F() { g := func() {} }\n',
     ['F', 'hidden.Shown']), ('a.rs', 'pub(crate) fn own() {}\npub fn f() { fn inner() {} }\n'
                              'impl T for S { fn t(&self) {} }\nimpl S { pub fn new() -> S { S } }', ['S::new', 'f']),
    ('A.java', 'class A { void own() {} private class B { public void m() {} } public void n() { '
     'new C() { public void o() {} }; } }', ['A', 'A.n']),
    ('a.cpp', 'class A { void own(); public: void m(); protected: void p(); };\nstruct S { int n() const; };\n'
     'static void f() {}\nvoid ns::g(int a) {}', ['A', 'A::m', 'S', 'S::n', 'ns::g']),
    ('a.c', 'static int own(void) { return 0; }\nint f(void) { return 1; }\nint declared(int a);\n'
     'struct s { struct t { int a; } t; };', ['f', 's']),
])
def test_what_is_public(file, text, expected):
    assert sorted({f.subject for f in code_facts(text, file)})==sorted(expected)

@NEEDS_PARSERS
@pytest.mark.parametrize('file,text,expected', [
    ('a.go', 'package a\n\n// F does it.\n// In two lines.\nfunc F() {}\n', 'F does it.'),
    ('a.go', 'package a\n\n// About nothing.\n\nfunc F() {}\n', None),
    ('a.go', 'package a\n\n//go:noinline\nfunc F() {}\n', None),
    ('a.go', 'package a\n\n// Things of all sorts.\ntype (\n\tA struct{}\n\tB struct{}\n)\n', None),
    ('a.js', '// a plain comment\nfunction f() {}', None),
    ('a.js', '/** Copyright 2020 us. */\nfunction f() {}', None),
    ('a.js', '/** @param a something */\nfunction f(a) {}', None),
    ('a.js', '/** Does `x`. */\nexport default function f(a) {}', 'Does `x`.'),
    ('a.rs', '/// Does it.\n#[inline]\n#[must_use]\npub fn f() {}', 'Does it.'),
    ('a.rs', '//// no doc\npub fn f() {}', None),
    ('a.hpp', '/// Does it.\ntemplate <class T>\nclass A { };', 'Does it.'),
    ('a.c', '/*! \\brief Does it. */\nint f(void) { return 0; }', 'Does it.'),
    ('a.c', 'int x; /** About x. */\nint f(void) { return 0; }', None),
    ('A.java', '/**\n * Gives {@link Foo} back.\n * <p>And more.\n */\n@Deprecated\npublic class A {}',
     'Gives `Foo` back.'),
])
def test_purposes(file, text, expected):
    assert next((f.answer for f in code_facts(text, file) if f.kind=='purpose'), None)==expected

# Anything at all

SNIPPETS = [b'def f(', b'class A:', b'"""', b'# x\n', b'```\n', b'\n\n', b'/**', b'*/', b'class A {', b'}',
            b'f() {}', b'(' * 300, b'[' * 300, b'-' * 300, b'\xff', b'\0', b'\xed\xa0\x80',
            b'{"cells": [', b'{"cell_type": "code", "source": 3}', b'lambda: ' * 200, b'1' * 5000, b'\\ud800',
            b'pass' b'word = "x1y2z3"', b'function f(a, {b}) {}', b'\xe4\xb8\xad', b'%%x\n', b'{@link ', b'<!--']
ANY_BYTES = st.one_of(st.binary(max_size=200),
                      st.lists(st.one_of(st.sampled_from(SNIPPETS), st.binary(max_size=8)), max_size=12).map(b''.join),
                      st.text(max_size=200).map(lambda s: s.encode('utf-8', 'surrogatepass')))

@settings(max_examples=int(os.environ.get('SAGE_EXAMPLES', 150)), deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture], database=None, derandomize=True)
@given(data=ANY_BYTES, suffix=st.sampled_from(['.py', '.md', '.js', '.ts', '.tsx', '.go', '.rs', '.java', '.c',
                                               '.cpp', '.ipynb']))
def test_any_bytes_in_any_file(tmp_path, data, suffix):
    root = tmp_path/'any'
    shutil.rmtree(root, ignore_errors=True)
    put(root, f'a{suffix}', data)
    book = read_codebase(root)
    assert len(book.files)+len(book.skipped)==1 # read, or passed over with a reason
    everything(book).encode()
    assert '\n' not in ''.join(book.skipped.values())

@settings(max_examples=int(os.environ.get('SAGE_EXAMPLES', 150)), deadline=None, database=None, derandomize=True)
@given(cells=st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=20),
                          lambda x: st.lists(x, max_size=4) | st.dictionaries(
                              st.sampled_from(['cells', 'cell_type', 'source', 'metadata', 'kernelspec',
                                               'language']), x, max_size=4), max_leaves=12))
def test_any_json_as_a_notebook(cells):
    try: notebook_facts(json.dumps(dict(cells=cells, metadata=cells)), 'a.ipynb')
    except ValueError as e: assert 'not a notebook' in str(e)

@settings(max_examples=int(os.environ.get('SAGE_EXAMPLES', 150)), deadline=None, database=None, derandomize=True)
@given(text=st.text(max_size=300), suffix=st.sampled_from(['.py', '.md', '.js']))
def test_finding_is_total(text, suffix):
    assert isinstance(find_secret(text), str) and isinstance(is_generated(text, suffix), bool)
    markdown_facts(text, 'a.md')

"Secrets are found whatever stands around them, and the quick way finds what the slow one does"
import random

import pytest

from sage_finetune.core import repo_files
from sage_finetune.core.repo_files import find_secret

# each is put together here, so that this file holds none
secrets = {
    'private key': '-----BEGIN EC PRIVATE' ' KEY-----\nMHcCAQEEIOq0sYk3bZ0',
    'AWS key': 'AS' 'IA'+'Q7RT'*4, 'GitHub token': 'gh' 'o_'+'a1B2c3D4e5'*3, 'GitLab token': 'gl' 'pat-'+'x7-K_'*4,
    'OpenAI or Anthropic key': 'sk' '-ant-'+'aZ09-_'*4, 'Hugging Face token': 'h' 'f_'+'Ab1'*11,
    'Slack token': 'hooks.slack' '.com/services/T0AB/B1CD/e2fg', 'Google key': 'AI' 'za'+'Sy-_9'*7,
    'Stripe key': 'r' 'k_live_'+'4eC39HqL'*2, 'npm or PyPI token': 'np' 'm_'+'0aZ'*12,
    'password or key': 'pass' 'phrase := "correct7horse"', 'password in an address': 'amqp' '://eva:s3cretly@host/x'}


@pytest.mark.parametrize('around', [('', ''), ('# 微调 ſ K\n\n', '\n'), ("x = '", "'\r\n"), ('\u2028(', ') # İ')],
                         ids=['alone', 'below', 'quoted', 'odd'])
@pytest.mark.parametrize('kind', secrets)
def test_each_kind_is_found_with_its_line(kind, around):
    before,after = around
    assert find_secret(before+secrets[kind]+after)==f"{kind}, line {before.count(chr(10))+1}"


@pytest.mark.parametrize('word', ['PAſſWORD', 'toKen', 'Api-\u212aey', 'PWD', 'Secret_Access_Key'])
def test_letters_that_stand_for_others_hide_nothing(word):
    "`re.I` takes a long s for an s, and the sign of Kelvin for a k"
    assert find_secret(f'{word} = "hunter2swordfish"')=='password or key, line 1'


def slowly(text):
    "The same, with every form tried at every character"
    found = [(m.start(), kind) for kind,form in repo_files._tokens.items() if (m := form.search(text))]
    for kind,form,as_word in (('password or key', repo_files._given, ''),
                              ('password in an address', repo_files._address, 'password')):
        found += [(m.start(), kind) for m in form.finditer(text)
                  if not repo_files._is_stand_in(m[2], as_word or m[1])][:1]
    return f"{min(found)[1]}, line {text.count(chr(10), 0, min(found)[0])+1}" if found else ''


pieces = [*secrets.values(), 'token', 'key', 'password', 'api_', 'secret', 'pwd', ' = ', ': ', ' := ', '"', "'", '\\"',
          'hunter2', 'your-password', 'https://', '://', 'a:b1c2d3@', '@host', '\n', '\n\n', '\r', '\t', ' ', 'public',
          'str', '[]', '微', 'ſ', '\u212a', 'İ', '\u2028', '\x0b', 'def f(x): return x', '#', '<x>', 'test']

@pytest.mark.parametrize('seed', range(12))
def test_the_quick_way_finds_what_the_slow_one_does(seed):
    dice = random.Random(seed)
    for _ in range(200):
        text = ''.join(dice.choices(pieces, k=dice.randint(1, 30)))
        assert find_secret(text)==slowly(text), ascii(text)

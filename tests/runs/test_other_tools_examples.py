"""What TRL, LLaMA-Factory and axolotl document themselves, every command and LoRA example of it: translated, or refused
by the name of a setting and with a reason. `benchmarks/other_tools.py` trains each of them for two steps
"""
import json
from pathlib import Path

import documented
import pytest

from sage_finetune.base.tiny_vision import tiny_vision_model
from sage_finetune.core.disk import SageError
from sage_finetune.runs.other_tools import translated

KEPT = Path(__file__).parents[2]/'benchmarks'/'other_tools.json'
PARTS = 12
slips = 'context_parapllel_size', 'test_value', 'video_cache_dir' # of the examples themselves, or of a script of theirs


def asked():
    "(tool, name, what makes its file) for each"
    for name,words in documented.commands().items(): yield 'trl', name, documented.of_trl, words
    for tool,make in documented.made.items():
        for name,settings in documented.examples(tool).items(): yield tool, name, make, settings


@pytest.fixture(scope='module')
def vision(tmp_path_factory): return tiny_vision_model(tmp_path_factory.mktemp('vision')/'model')


@pytest.mark.parametrize('part', [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, PARTS))])
def test_each_is_translated_or_refused_by_name(part, vision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = documented.Place(tmp_path, vision)
    for tool,name,make,given in [*asked()][part::PARTS]:
        file = make(given, place)
        try: t = translated(file)
        except SageError as e:
            why = str(e).partition('asks for what is not here: ')[2]
            assert why and '(' in why, (tool, name, str(e))
            assert '(unknown' not in why or any(s in why for s in slips), (tool, name, why)
        else: assert t.tool.startswith(dict(trl='TRL', llamafactory='LLaMA-Factory').get(tool, tool)), (tool, name)


def test_what_came_of_each_is_kept():
    "The table in the docs is about these commands and examples, and no others"
    kept = json.loads(KEPT.read_text(encoding='utf-8'))
    for tool in ('trl', *documented.made):
        names = {name for of,name,*_ in asked() if of==tool}
        assert {n.removesuffix(' --use_peft') for n in kept[tool]}==names


def test_a_list_that_is_written_is_the_list_that_is_read(tmp_path, monkeypatch):
    found = {'a.yml': dict(x=1, y=2, z=None), 'b.yml': dict(x=1, y=3), 'c.yml': dict(y=3, w=False)}
    (tmp_path/'t.json').write_text(documented.as_text(found), encoding='utf-8')
    monkeypatch.setattr(documented, 'DATA', tmp_path)
    assert documented.examples('t')=={'a.yml': dict(x=1, y=2), 'b.yml': dict(x=1, y=3), 'c.yml': dict(y=3, w=False)}

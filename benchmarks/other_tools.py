"""What of other tools runs here, counted: the settings of TRL, LLaMA-Factory and axolotl by what becomes of each, and
their documented commands and examples, each really trained on the embedded model

`python benchmarks/other_tools.py` prints two tables in Markdown; `--settings` leaves out the runs (4 minutes).
"""
import argparse
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests'), str(ROOT/'tests'/'runs')]

from sage_finetune.core.beforehand import tool_table  # noqa: E402

TABLES = ('trl-sft', 'trl-dpo', 'trl-kto', 'trl-orpo', 'llamafactory', 'llamafactory-v1', 'axolotl', 'unsloth')
WHAT = {'test_a_command_of_trl_runs': 'documented commands of TRL (SFT, DPO, KTO, ORPO)',
        'test_an_example_of_llama_factory_runs': 'forms of LLaMA-Factory\'s examples (v0 and v1)',
        'test_an_example_of_llama_factory_runs_with_its_hyperparameters': 'LoRA and QLoRA SFT files of LLaMA-Factory',
        'test_a_file_that_merges_merges': 'merge files of LLaMA-Factory',
        'test_an_example_of_axolotl_runs': 'LoRA and QLoRA examples of axolotl (SFT, DPO, KTO)'}


def fate(row):
    "What becomes of a setting: it has a place here, bears on nothing, or only one value of it can be honoured"
    if {'to', 'values', 'hand'} & {*row}: return 'mapped'
    return 'refused unless off' if 'off' in row else 'without effect'


def settings():
    "One row a table; those of TRL are the fields of the installed version"
    from test_other_tools import scripts_of_trl
    theirs = scripts_of_trl()
    for name in TABLES:
        rows = tool_table(name).settings
        script = name.removeprefix('trl-')
        known = theirs.get(script, rows) if name.startswith('trl-') else rows
        counts = Counter(fate(rows[n]) if n in rows else 'unknown' for n in known)
        yield name, len(known), *(counts[k] for k in ('mapped', 'without effect', 'refused unless off', 'unknown'))


class Results:
    "Which tests passed, by function"
    def __init__(self): self.counts, self.failed = {}, []

    def pytest_runtest_logreport(self, report):
        if report.when!='call' and report.passed: return
        name = re.sub(r'\[.*', '', report.nodeid.rpartition('::')[2])
        if name not in WHAT: return
        self.counts.setdefault(name, Counter())[report.outcome] += 1
        if report.failed: self.failed.append(report.nodeid)


def runs():
    "One row a kind of command or file: how many there are, and how many trained"
    import pytest
    results = Results()
    files = [str(ROOT/'tests'/'runs'/f'test_other_tools{n}.py') for n in ('', '_documented')]
    pytest.main(['-q', '-n0', '-m', 'slow or not slow', '-k', ' or '.join(WHAT), *files], plugins=[results])
    print('\n'.join(results.failed), file=sys.stderr)
    for name, told in WHAT.items():
        counts = results.counts.get(name, Counter())
        yield told, sum(counts.values()), counts['passed']


def markdown(head, rows): return '\n'.join('| '+' | '.join(map(str, r))+' |' for r in (head, ['---']*len(head), *rows))


if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--settings', action='store_true')
    only = parser.parse_args().settings
    head = ['settings of', 'there are', 'mapped', 'without effect', 'refused unless off', 'unknown']
    print(markdown(head, settings()))
    if not only: print('\n'+markdown(['documented', 'there are', 'run here'], runs()))

"""A fault at every moment of writing, in every command: no wrong result, no lost work, one line that names it, and the
same command goes on to the same bits

`make test-faults` tries some hundreds, spread over all moments, and prints the table; `SAGE_FAULTS=every` tries each
moment there is, another number as many of each part of a command. `make test` tries a few.
"""
import os

import pytest

import suite as faults
from inject import modes
from quick import few, forked
from rooms import alike, Wanted

pytestmark = pytest.mark.skipif(forked is None, reason='needs processes as POSIX has them')

wished = os.environ.get('SAGE_FAULTS', '5')
most = 10**9 if wished=='every' else int(wished)


@pytest.fixture(scope='module')
def suite(tmp_path_factory):
    made = faults.Suite(tmp_path_factory.mktemp('faults'))
    yield made
    made.room.close()


def steady(work, *args):
    "torch's pool of threads may not survive a fork, which says nothing of this package: the point is tried again"
    for _ in range(4):
        try: made = work(*args)
        except AssertionError as e:
            if 'Invalid thread pool' not in str(e): raise
            continue
        if not (isinstance(made, tuple) and 'Invalid thread pool' in str(made[1])): return made
    raise RuntimeError('no process of four had a pool of threads')


# each mode and each part of a command once; `make test-faults` has them all with each other
modes_in_parts = [
    ('train', 'half', .6), ('train', 'SIGTERM', .5), ('train', 'denied', .95), ('merge', 'dies', .8),
    ('merge', 'full', .3), ('clean', 'SIGTERM', .5), ('clean', 'dies', .6), ('export', 'full', .3),
    ('export_adapter', 'half', .6), ('serve', 'denied', 1.), ('compare', 'full', .5), ('inspect', 'dies', .9)]


@pytest.mark.parametrize('name,mode,share', modes_in_parts)
def test_a_fault_is_survived(suite, name, mode, share):
    steady(suite.usual, name)
    n = len(suite.moments[name])
    assert n>1
    outcome,words = steady(suite.one, name, mode, max(1, round(share*n)))
    assert outcome=='survived', words


@pytest.mark.parametrize('name,share', few([('same_cache', .4), ('clean_train', .9), ('train_train', .5),
                                            ('export_export', .8), ('same_damaged_cache', .3)], 2))
def test_two_at_once_are_survived(suite, name, share):
    for n in faults.pairs[name][1:]:
        if n in faults.operations: steady(suite.usual, n)
    suite.pair_points(name, 1)
    outcome,words = steady(suite.two, name, max(1, round(share*suite.moments[name])))
    assert outcome=='survived', words


def test_what_lies_there_is_told_apart():
    one,two = {'a': {'x': 1, 'y': 2}}, {'a': {'x': 1, 'y': 3}}
    wanted = Wanted(one, two)
    assert wanted.differs({'a': {'x': 1, 'y': 4}}) is None # a time, say
    assert 'a: x differs' in wanted.differs({'a': {'x': 2, 'y': 4}})
    assert 'missing' in wanted.differs({}) and 'not there before' in wanted.differs({**one, 'b': {}})
    files,differs = alike(one, two)
    assert files=={'a': {'x': 1, 'y': differs}}
    one = {f: {'/0/memory': 5, '/0/loss': 5, '/model/vocab/time': 5} for f in ('metrics.jsonl', 'tokenizer.json')}
    files,differs = alike(one, one) # what is measured may be equal by chance; a word of that name is no measure
    assert files==one | {'metrics.jsonl': one['metrics.jsonl'] | {'/0/memory': differs}}
    kept = {f'run/checkpoints/checkpoint-{n}/weights': {'': n} for n in (2, 4)}
    stopped = {f'run/checkpoints/checkpoint-{n}/weights': {'': n} for n in (3, 4)}
    wanted = Wanted(kept, kept) # of two checkpoints that are kept, that of the stop may be one
    assert wanted.differs(stopped) is None and 'checkpoint-2/weights is missing' in wanted.differs(
        {f: v for f,v in kept.items() if '-4' in f})


def _try(log, known, operation, mode, points, one):
    "Each point that this code has not been tried at; the outcomes that are bad"
    version,bad = faults.code(), []
    for row,at in points:
        if known.get((operation, mode, at))=='survived': continue
        outcome,words = one(at)
        faults.note(log, code=version, operation=operation, row=row, mode=mode, at=at, outcome=outcome, words=words)
        if outcome!='survived': bad.append((operation, mode, at, outcome, words))
    return bad


@pytest.mark.slow
@pytest.mark.parametrize('name', faults.operations)
@pytest.mark.parametrize('mode', modes)
def test_every_fault_is_survived(suite, name, mode):
    log = faults.log_file()
    points = steady(suite.points, name, mode, most if name!='quickstart' else max(1, most//2))
    one = lambda at: steady(suite.one, name, mode, at)
    assert _try(log, faults.tried(log, faults.code()), name, mode, points, one)==[]


@pytest.mark.slow
@pytest.mark.parametrize('name', faults.pairs)
def test_every_two_at_once_are_survived(suite, name):
    log = faults.log_file()
    for n in faults.pairs[name][1:]:
        if n in faults.operations: steady(suite.usual, n)
    points = [(name, at) for at in suite.pair_points(name, 3*most)]
    both = lambda at: steady(suite.two, name, at)
    assert _try(log, faults.tried(log, faults.code()), name, 'two at once', points, both)==[]

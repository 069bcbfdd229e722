"""Everything of a release but the upload: `make release-check`

Each point is looked at, whatever the one before said. `--quick` leaves out what builds and installs.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from configparser import ConfigParser
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Fault(Exception): "Why a point does not hold, in one line"


def settings(): # The section of settings.ini
    "What a release edits"
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def output(
    *words, # A command
    folder=None, # Where it runs; the project if None
    **env, # What else its environment holds
): # What it printed
    "Run a command, which sees no checkout; its last line is the fault where it fails"
    plain = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'IN_TEST', 'SAGE_CACHE')}
    done = subprocess.run([str(word) for word in words], cwd=folder or ROOT, env=plain | env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith('WARNING')]
    if done.returncode: raise Fault(f'`{" ".join(map(str, words))}`: {lines[-1] if lines else "no word"}')
    return done.stdout


def numbers(version): return tuple(int(part) for part in version.split('.'))


def version_agrees(
    ini, # From `settings`
): # What was seen
    "settings.ini and the package name one version, above the newest release"
    version, init = ini['version'], (ROOT/ini['lib_name']/'__init__.py').read_text(encoding='utf-8')
    if not re.fullmatch(r'\d+\.\d+\.\d+', version):
        raise Fault(f'settings.ini: version {version} is not of the form 1.2.3')
    written = re.search(r'^__version__ = "(.+)"$', init, re.M)
    if not written or written[1]!=version:
        raise Fault(f'settings.ini has {version}, __init__.py has {written[1] if written else "none"}')
    last = ini['released'].strip()
    if last and numbers(version)<=numbers(last): raise Fault(f'{version} is not above {last}, which is released')
    return f'{version}, after {last or "nothing"}'


def changelog_agrees(
    ini, # From `settings`
): # What was seen
    "CHANGELOG.md has the version with its date on top, and nothing under Unreleased"
    text, version = (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), ini['version']
    parts = re.split(r'^## (.+)$', text, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2]))
    heads = [*sections]
    if not heads or heads[0]!='[Unreleased]': raise Fault('CHANGELOG.md does not begin with "## [Unreleased]"')
    waiting = len(re.findall(r'^- ', sections[heads[0]], re.M))
    if waiting:
        raise Fault(f'CHANGELOG.md: {waiting} entries under Unreleased; give them the heading "## [{version}] - DATE"')
    newest = heads[1] if heads[1:] else ''
    if not re.fullmatch(rf'\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d', newest):
        raise Fault(f'CHANGELOG.md: below Unreleased stands "{newest}" instead of "[{version}] - YYYY-MM-DD"')
    return f'## {newest}'


def everything_is_committed(
    ini, # From `settings`
): # What was seen
    "The files are those of a commit of the branch that is released"
    changed = output('git', 'status', '--porcelain').splitlines()
    if changed: raise Fault(f'{len(changed)} files are not committed: {changed[0][3:]}')
    branch = output('git', 'rev-parse', '--abbrev-ref', 'HEAD').strip()
    if branch not in (ini['branch'], 'HEAD'):
        raise Fault(f'this is branch {branch}, and releases are made from {ini["branch"]}')
    return output('git', 'log', '-1', '--format=%h %s').strip()


def tag_is_free(
    ini, # From `settings`
): # What was seen
    "No tag of the version exists, or it names this commit"
    tag = f"v{ini['version']}"
    if output('git', 'tag', '--list', tag).strip():
        where, here = (output('git', 'rev-parse', name+'^{commit}').strip() for name in (tag, 'HEAD'))
        if where!=here: raise Fault(f'tag {tag} exists, at {where[:10]}; this is {here[:10]}')
        return f'{tag} is this commit'
    if 'origin' not in output('git', 'remote').split(): return f'{tag} is free here; there is no remote to ask'
    if output('git', 'ls-remote', '--tags', 'origin', tag).strip(): raise Fault(f'tag {tag} exists at origin')
    return f'{tag} is free'


def version_is_free(
    ini, # From `settings`
): # What was seen
    "PyPI has not this version yet"
    wanted = f"{ini['dist_name']}=={ini['version']}"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', folder, wanted],
                              capture_output=True, text=True)
    if not done.returncode: raise Fault(f'{wanted} is on the registry already: a version is never uploaded twice')
    found = re.search(r'from versions: ([^)]*)\)', done.stderr)
    if not found: raise Fault(f'the registry gives no answer: {(done.stderr.strip().splitlines() or ["no word"])[-1]}')
    return f'{wanted} is free (there: {found[1]})'


def files_are_in_step(
    ini, # From `settings`
): # What was seen
    "Addresses, maps and README are as their sources have them"
    for name in 'address', 'map', 'readme': output(sys.executable, ROOT/'tools'/f'{name}.py', '--check')
    return 'addresses, maps, README'


def distributions(
    folder, # Where they are built
    ini, # From `settings`
): # What was seen
    "sdist, and the wheel from the sdist, with every file of the package"
    output(sys.executable, '-m', 'build', '--outdir', folder/'dist')
    name, (wheel,), (sdist,) = ini['lib_name'], folder.glob('dist/*.whl'), folder.glob('dist/*.tar.gz')
    if not all(path.name.startswith(f"{name}-{ini['version']}") for path in (wheel, sdist)):
        raise Fault(f'built as {wheel.name} and {sdist.name}')
    kept = {path.relative_to(ROOT).as_posix() for path in (ROOT/name).rglob('*')
            if path.is_file() and '__pycache__' not in path.parts}
    missing = sorted(kept-{*zipfile.ZipFile(wheel).namelist()})
    if missing: raise Fault(f'the wheel lacks {missing[0]} and {len(missing)-1} others')
    return f'{wheel.name} {wheel.stat().st_size:,} bytes, {sdist.name} {sdist.stat().st_size:,} bytes'


def metadata_is_good(
    folder, # With `dist`
    ini, # From `settings`
): # What was seen
    "What PyPI would refuse or show badly: twine's strict check, in an environment of its own"
    venv.create(folder/'twine', with_pip=True)
    python = folder/'twine'/'bin'/'python'
    output(python, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', 'twine')
    told = output(python, '-m', 'twine', '--no-color', 'check', '--strict', *sorted(folder.glob('dist/*')))
    return f'twine: {told.count("PASSED")} passed'


def works_alone(
    folder, # With `dist`
    ini, # From `settings`
): # What was seen
    "The wheel with its requirements, in an empty environment, from an empty folder with an empty home"
    venv.create(folder/'empty', with_pip=True)
    at, python = folder/'cwd', folder/'empty'/'bin'/'python'
    (at/'home').mkdir(parents=True)
    env = dict(HOME=str(at/'home'), HF_HUB_OFFLINE='1')
    wheel, = folder.glob('dist/*.whl')
    output(python, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', '-c', ROOT/'constraints.txt', wheel)
    output(python, '-m', 'pip', 'check')
    code = 'import sage_finetune as s; print(s.__version__); s.LoRATrainer, s.prepare_dataset'
    version = output(python, '-c', code, folder=at, **env).split()[-1]
    if version!=ini['version']: raise Fault(f'the installed package says {version}')
    told = output(python.with_name('sage-finetune'), 'quickstart', 'code', '--max-facts', '40', folder=at, **env)
    if 'sage-finetune chat' not in told: raise Fault('quickstart did not come to its end')
    left = [path.name for path in at.iterdir() if path.name!='home']
    if left: raise Fault(f'quickstart left {left} in the working folder')
    return f'{version}: imported, and quickstart from rows to chat'


def held(
    point, # A function of the settings
    ini, # From `settings`
): # Whether it holds
    "Look at one point and print a line"
    name = point.func.__name__ if isinstance(point, partial) else point.__name__
    try: line, ok = point(ini=ini), True
    except Fault as e: line, ok = str(e), False
    print(f'{"ok   " if ok else "FAULT"}  {name.replace("_", " ")}: {line}', flush=True)
    return ok


def main(
    words=None, # Arguments; those of the command line if None
): # Exit status
    "Print one line for each point; status 1 where one does not hold"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='leave out what builds and installs')
    quick, ini = parser.parse_args(words).quick, settings()
    points = [version_agrees, changelog_agrees, everything_is_committed, tag_is_free, version_is_free,
              files_are_in_step]
    with tempfile.TemporaryDirectory() as folder:
        if not quick: points += [partial(p, Path(folder)) for p in (distributions, metadata_is_good, works_alone)]
        good = [held(point, ini) for point in points]
    print(f'{sum(good)} of {len(good)} points hold' + (': ready for the upload' if all(good) and not quick else ''))
    return int(not all(good))


if __name__=='__main__': sys.exit(main())

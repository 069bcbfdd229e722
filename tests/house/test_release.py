"`make release-check`: each point says in one line what keeps a version from being released"
import importlib.util
import shutil
import subprocess
import sys

import pytest

from layout import ROOT

spec = importlib.util.spec_from_file_location('release_tool', ROOT/'tools/release.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def git(folder, *words):
    who = '-c', 'user.name=someone', '-c', 'user.email=someone@example.org'
    subprocess.run(['git', *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project that is ready: committed, its version dated, nothing under Unreleased, no tag"
    (tmp_path/'sage_finetune').mkdir()
    (tmp_path/'sage_finetune'/'__init__.py').write_text('__version__ = "1.2.0"\n')
    settings = ['lib_name = sage_finetune', 'dist_name = sage-finetune', 'version = 1.2.0', 'released = 1.1.9',
                'branch = main']
    (tmp_path/'settings.ini').write_text('\n'.join(['[DEFAULT]', *settings, '']))
    (tmp_path/'CHANGELOG.md').write_text('# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-12-01\n\n- A\n\n'
                                         '## [1.1.9] - 2026-11-01\n')
    git(tmp_path, 'init', '-q', '-b', 'main')
    git(tmp_path, 'add', '-A')
    git(tmp_path, 'commit', '-q', '-m', 'Release 1.2.0')
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    return tmp_path


CHEAP = tool.version_agrees, tool.changelog_agrees, tool.everything_is_committed, tool.tag_is_free


def faults(): # {point: fault}
    found = {}
    for point in CHEAP:
        try: point(tool.settings())
        except tool.Fault as e: found[point.__name__] = str(e)
    return found


def replace(path, old, new): path.write_text(path.read_text().replace(old, new))


def test_a_project_that_is_ready_has_no_fault(project): assert faults()=={}


@pytest.mark.parametrize('file, old, new, told', [
    ('settings.ini', 'version = 1.2.0', 'version = 1.2.1', 'settings.ini has 1.2.1, __init__.py has 1.2.0'),
    ('settings.ini', 'version = 1.2.0', 'version = 1.2rc1', 'version 1.2rc1 is not of the form 1.2.3'),
    ('settings.ini', 'released = 1.1.9', 'released = 1.2.0', '1.2.0 is not above 1.2.0, which is released'),
    ('settings.ini', 'released = 1.1.9', 'released = 1.10.0', '1.2.0 is not above 1.10.0, which is released'),
    ('sage_finetune/__init__.py', '1.2.0', '1.1.9', 'settings.ini has 1.2.0, __init__.py has 1.1.9'),
    ('CHANGELOG.md', '## [Unreleased]\n', '## [Unreleased]\n\n### Added\n- One\n- Two\n', '2 entries under Unreleased'),
    ('CHANGELOG.md', '## [1.2.0] - 2026-12-01', '## [1.2.0] - not released yet', 'instead of "[1.2.0] - YYYY-MM-DD"'),
    ('CHANGELOG.md', '## [1.2.0] - 2026-12-01', '## [1.3.0] - 2026-12-01', 'stands "[1.3.0] - 2026-12-01" instead of'),
    ('CHANGELOG.md', '## [Unreleased]\n', '', 'does not begin with "## [Unreleased]"'),
    ('CHANGELOG.md', '\n## [1.2.0] - 2026-12-01\n\n- A\n\n## [1.1.9] - 2026-11-01\n', '', 'stands "" instead of'),
])
def test_what_is_not_ready_is_told_by_name(project, file, old, new, told):
    replace(project/file, old, new)
    found = faults()
    assert [told in line for line in found.values()].count(True)==1, found
    if 'version' not in new: assert len(found)==2, found  # it and what is not committed
    assert file in found['everything_is_committed']
    assert not any('\n' in line for line in found.values())


def test_a_tag_is_free_or_is_this_commit(project):
    git(project, 'tag', 'v1.2.0')
    assert faults()=={} and tool.tag_is_free(tool.settings())=='v1.2.0 is this commit'
    (project/'more').write_text('more')
    git(project, 'add', '-A')
    git(project, 'commit', '-q', '-m', 'More')
    assert [*faults()]==['tag_is_free'] and 'tag v1.2.0 exists, at' in faults()['tag_is_free']


def test_a_tag_at_the_remote_is_taken(project, tmp_path_factory):
    remote = tmp_path_factory.mktemp('remote')/'origin.git'
    git(project, 'tag', 'v1.2.0')
    git(project, 'clone', '-q', '--bare', str(project), str(remote))
    git(project, 'tag', '-d', 'v1.2.0')
    git(project, 'remote', 'add', 'origin', str(remote))
    assert faults()=={'tag_is_free': 'tag v1.2.0 exists at origin'}


def test_another_branch_is_told(project):
    git(project, 'checkout', '-q', '-b', 'draft')
    assert faults()=={'everything_is_committed': 'this is branch draft, and releases are made from main'}


def test_every_point_is_looked_at(project, monkeypatch, capsys):
    "A fault does not keep the points after it from being looked at; the registry is asked and may be out of reach"
    replace(project/'settings.ini', 'version = 1.2.0', 'version = 1.2.1')
    shutil.copytree(ROOT/'tools', project/'tools')
    monkeypatch.setattr(sys, 'executable', '/bin/false')
    assert tool.main(['--quick'])==1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines)==7 and lines[-1]=='1 of 6 points hold'
    assert lines[4]=='FAULT  version is free: the registry gives no answer: no word'
    assert all(line.startswith(('ok     ', 'FAULT  ')) for line in lines[:-1])

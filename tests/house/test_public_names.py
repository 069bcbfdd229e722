"Every public function and class is called by name in a lesson or a test"
import ast
import re

from layout import ROOT, is_exported, is_shown, modules, notebooks, path_of, python, source


def public(module):
    "The functions and classes that a module offers"
    tree = ast.parse(path_of(module).read_text(encoding='utf-8'))
    offered = next(ast.literal_eval(n.value) for n in tree.body
                   if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '')=='__all__')
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and n.name in offered]


def lessons():
    "The code of all cells that are not exported, of all tests and benchmarks"
    for cells in notebooks().values():
        yield from (python(source(c)) for c in cells if c['cell_type']=='code' and not is_exported(c))
    for folder in 'tests', 'benchmarks':
        yield from (path.read_text(encoding='utf-8') for path in (ROOT/folder).rglob('*.py'))


def names_used(text):
    "The names that code uses; an import, a comment or a string is no use"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name): yield node.id
        elif isinstance(node, ast.Attribute): yield node.attr


def words_of_commands(text):
    "Words in a list or a call, as a command line is written: `main(['merge', 'sums'])` calls the command `merge`"
    for node in ast.walk(ast.parse(text)):
        words = node.elts if isinstance(node, ast.List) else node.args if isinstance(node, ast.Call) else ()
        yield from (w.value for w in words if isinstance(w, ast.Constant) and isinstance(w.value, str))


def test_every_public_name_is_called():
    used = {name for text in lessons() for name in names_used(text)}
    commands = {word for text in lessons() for word in words_of_commands(text)}
    called = lambda module, name: name in used or module=='cli' and name in commands
    uncalled = {module: [n for n in public(module) if not called(module, n)] for module in modules()}
    assert {module: names for module, names in uncalled.items() if names}=={}


def test_an_import_a_comment_or_a_string_is_no_call():
    assert {*names_used("from a import b # c\n'd'\nf(g.h)")}=={'f', 'g', 'h'}


def test_the_walk_sees_every_module():
    assert len(modules())>40 and 'LoRATrainer' in public('trainer') and 'TrainingConfig' in public('config')


# The page of each shows what calls it; their own example, with its servers, signals and faults, is in the pytest files
ELSEWHERE = {
    'data': ['without_source', 'end_to_end'], 'preference': ['peak_of_step', 'predicted_pass'],
    'core.display': ['Clickable'], 'core.machine': ['no_stop_is_lost'],
    'model.adapter': ['sum_of_products', 'embedding_rate', 'load_best_adapter'], 'rows.template': ['try_template'],
    'serving.client': ['find_model', 'stream_from', 'speaker_at'], 'serving.export': ['export_files'],
    'training.batches': ['padding_of'], 'training.split': ['prepared_and_split'],
    'training.resume': ['finished_result', 'load_finished'], 'ui.live': ['LiveCallback'],
    'core.run_folder': ['folder_size', 'remove_if_empty'], 'record.curves': ['svg', 'chart'],
    'record.progress': ['say_end'], 'ui.monitor': ['watch_command'],
}


def by_name(module, names):
    "Those of `names` that another public function of the module returns, or holds"
    text = path_of(module).read_text(encoding='utf-8')
    return {n for n in names if re.search(rf'->list\[{n}\]|->{n}\b|# .*`{n}`', text)}


def lacking(module, cells):
    "The functions and classes of a module that no visible cell of its page uses"
    shown = {name for c in cells if is_shown(c) for name in names_used(python(source(c)))}
    return [n for n in public(module) if n not in shown and n not in by_name(module, public(module))]


def test_a_page_of_the_api_has_an_example_of_each_name():
    books = notebooks()
    found = {module: {*lacking(module, books[name])}-{*ELSEWHERE.get(module, ())}
             for module, name in modules().items() if module!='cli'}
    found = {module: names for module, names in found.items() if names}
    assert found=={}, 'show each in a visible cell of its page, or name it in ELSEWHERE'


def test_a_name_without_an_example_is_found():
    assert lacking('rows.turns', [])!=[] and 'role_of' in lacking('rows.turns', [])

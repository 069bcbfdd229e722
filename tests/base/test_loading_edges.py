"Folders that are no whole model: each is one line that says what is missing"
from fastcore.test import expect_fail

from sage_finetune.core.disk import SageError
from sage_finetune.base.loading import load_model, load_tokenizer, quiet_libraries


def test_folders_that_are_no_whole_model(tmp_path):
    with expect_fail(SageError, contains='cannot be loaded'): load_model(tmp_path)
    with quiet_libraries(): load_model('sage-tiny').save_pretrained(tmp_path)
    with expect_fail(SageError, contains='has no tokenizer files'): load_tokenizer(str(tmp_path))
    weights = tmp_path/'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    with expect_fail(SageError, contains='cannot be loaded'): load_model(str(tmp_path))

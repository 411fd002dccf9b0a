"""Trained tokenizers: deterministic, of the two flavours, and the trained one stands beside its data."""

import os
import subprocess
import sys

import pytest

from bench_cases.data import DataError, load_data

CODE = """
import sys
from pathlib import Path
from bench_cases.data import load_data
print(load_data("embedded", arch=sys.argv[1], task="clm", cache_dir=Path(sys.argv[2])).fingerprint)
"""


@pytest.mark.process
@pytest.mark.parametrize("arch", ["gpt2", "roberta"])
def test_training_is_deterministic_across_processes(arch, cache_dir):
    here = load_data("embedded", arch=arch, task="clm")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([sys.executable, "-c", CODE, arch, str(cache_dir)], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == here.fingerprint, done.stderr


@pytest.mark.parametrize("arch,names", [("gpt2", ("<|pad|>", "<|endoftext|>")), ("roberta", ("<pad>", "</s>"))])
def test_flavours(arch, names):
    from transformers import PreTrainedTokenizerFast

    law, web = (load_data("embedded", arch=arch, task=task) for task in ("multi_cls", "clm"))
    assert law.special == web.special and law.valid_vocab == web.valid_vocab == 2_048
    assert (law.folder / "tokenizer.json").read_bytes() == (web.folder / "tokenizer.json").read_bytes()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(law.folder / "tokenizer.json"))
    assert len(tokenizer) == law.valid_vocab
    assert tuple(tokenizer.convert_ids_to_tokens([law.special.pad, law.special.eos])) == names
    assert (law.special.bos is None) == (law.special.mask is None) == (arch == "gpt2")
    assert law.special.pad == 1 and law.special.pad != law.special.eos


def test_masked_lm_needs_a_mask_token(tmp_path):
    made = load_data("embedded", arch="gpt2", task="clm").folder / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(made.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}')
    with pytest.raises(DataError, match="no mask token"):
        load_data("embedded", arch="gpt2", task="mlm", tokenizer=str(tmp_path))
    assert load_data("embedded", arch="other", task="mlm").special.mask is not None

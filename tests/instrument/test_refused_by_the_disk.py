"""What the disk refuses, in a sentence; what is ours stays ours."""

import errno

import pytest

from instrument.words import sentence_of


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as refused:
        (tmp_path / "file" / "x").mkdir()
    assert sentence_of(refused.value) == f"cannot use {tmp_path / 'file' / 'x'}: Not a directory"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such file", "x"),
        OSError(errno.ENOSPC, "full"),
        OSError("words"),
        BrokenPipeError(errno.EPIPE, "broken", "x"),
        KeyError("x"),
    ],
)
def test_all_else_is_not_the_disk_s(error):
    assert sentence_of(error) is None

"""What numba compiled of kernels' earlier sources is forgotten."""

from engram_lm.kernels import forget_stale


def test_compiled_code_goes_with_any_source_it_was_made_beside(tmp_path):
    (tmp_path / "walks.py").write_text("WIDTH = 1")
    (tmp_path / "chain.py").write_text("from walks import WIDTH")
    assert forget_stale(tmp_path)
    assert not forget_stale(tmp_path)
    compiled = [
        tmp_path / "__pycache__" / name
        for name in ("chain.f-3.py311.1.nbc", "chain.f-3.py311.nbi", "chain.pyc")
    ]
    for path in compiled:
        path.write_bytes(b"x")
    assert not forget_stale(tmp_path)
    assert all(path.exists() for path in compiled)
    (tmp_path / "walks.py").write_text("WIDTH = 2")
    assert forget_stale(tmp_path)
    assert [path.exists() for path in compiled] == [False, False, True]


def test_a_directory_that_cannot_be_written_is_left(tmp_path):
    (tmp_path / "walks.py").write_text("WIDTH = 1")
    (tmp_path / "__pycache__").write_text("no directory")
    assert not forget_stale(tmp_path)

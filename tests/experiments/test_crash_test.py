import pytest

from experiments import crash_test


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_with_the_same_files(capsys):
    assert crash_test.main(["--kills", "3", "--short"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("kill")] == ["kill 1", "kill 2", "kill 3"]
    assert lines[-1] == "PASS"


def test_differences_name_every_file(tmp_path):
    for name, content in (("one", "same"), ("two", "same")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(content)
        (tmp_path / name / "pruned.npz").write_text(name)
    (tmp_path / "two" / "left over").touch()
    assert crash_test.differences(tmp_path / "one", tmp_path / "two") == ["left over", "pruned.npz"]


def test_bad_arguments(capsys):
    assert crash_test.main(["--kills", "0"]) == 2
    assert "--kills is 0; it must be at least 1" in capsys.readouterr().err

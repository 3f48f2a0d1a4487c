import json

import pytest

from experiments.checks import kill_and_resume as crash_test


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--fit"]])
def test_a_run_that_is_killed_three_times_ends_with_the_same_files(flags, capsys):
    assert crash_test.main(["--kills", "3", "--short", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("kill")] == ["kill 1", "kill 2", "kill 3"]
    assert any("(shrink)" in line for line in lines)
    assert lines[-1] == "PASS"


def test_differences_name_every_file(tmp_path):
    for name, speed in (("one", 1.5), ("two", 2.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "images_per_second": speed}))
        (tmp_path / name / "pruned.npz").write_text(name)
    (tmp_path / "two" / "left over").touch()
    assert crash_test.differences(tmp_path / "one", tmp_path / "two") == ["left over", "pruned.npz"]
    (tmp_path / "two" / "metrics.jsonl").write_text(json.dumps({"epoch": 2, "images_per_second": 1.5}))
    assert "metrics.jsonl" in crash_test.differences(tmp_path / "one", tmp_path / "two")


def test_bad_arguments(capsys):
    assert crash_test.main(["--kills", "0"]) == 2
    assert "--kills is 0; it must be at least 1" in capsys.readouterr().err

"""The host's shares of time are of what it did, and RAPL's counters survive their wrap."""

import time

import pytest

from instrument.sampler.host import HostSensors, Rapl


def test_rapl_counts_packages_and_survives_the_wrap(tmp_path):
    for zone, name, energy in (
        ("intel-rapl:0", "package-0", 900),
        ("intel-rapl:1", "package-1", 0),
        ("intel-rapl:0:0", "core", 5),
        ("intel-rapl:2", "psys", 7),
    ):
        folder = tmp_path / zone
        folder.mkdir()
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("999\n")
    rapl = Rapl(tmp_path)
    assert rapl.read() == {"cpu_energy_counter_j": 0.0}
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")  # 100 to the top, one to 0, 100 more
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("30\n")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("500\n")
    assert rapl.read()["cpu_energy_counter_j"] == pytest.approx(230e-6)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    with pytest.raises(OSError, match="energy_uj of intel-rapl:1"):
        rapl.read()
    with pytest.raises(OSError, match="no RAPL"):
        Rapl(tmp_path / "nowhere").read()


def test_shares_of_the_processor_are_of_what_it_did(tmp_path):
    host = HostSensors(tmp_path)
    found, unknown = host.read()
    assert "process_cpu_percent" in unknown and "process_cpu_percent" not in found
    began_s, busy_s = time.monotonic(), -time.process_time()
    while time.monotonic() < began_s + 0.3:
        pass
    busy_s += time.process_time()
    share = busy_s / (time.monotonic() - began_s)
    found, unknown = host.read()
    assert found["process_cpu_percent"] == pytest.approx(100 * share, rel=0.2)
    assert 0 <= found["system_cpu_percent"] <= 100
    assert "less than 0.1 s" in host.read()[1]["process_cpu_percent"]

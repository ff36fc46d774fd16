from pathlib import Path

from keepwarm.bench.store_scan import measure_scan
from keepwarm.core.clock import SystemClock


def test_all_blocks_are_found_each_time(tmp_path: Path) -> None:
    samples = measure_scan(tmp_path, 230, 2, SystemClock(), whole=False)
    assert [sample.n_blocks for sample in samples] == [230, 230]
    assert all(sample.ms > 0 for sample in samples)
    assert len(list((tmp_path / "scan" / "blocks").iterdir())) == 230

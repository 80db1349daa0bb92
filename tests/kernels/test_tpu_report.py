"""What kernels.tpu_report reads from a schedule of libtpu, on a made-up one of twenty cycles."""

import pytest

from rcm_jax.kernels import tpu_report

HEAD = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
"""
# Cycles 0 and 1 come before the loop over the grid, which ends with 18; 4 to 6 are for the first tile of a row alone,
# 8 to 15 make products, of which 10 to 12 are a loop of five trips, and 16 is for the last tile of a row.
BUNDLES = """
= control target key start
     0   :  { %1 = smov 0 } /* Start region 0 */
   0x2 LB: > { %2 = smov 1 }
   0x3   : > { %3 = sbr.rel (%p4_p0) target bundleno = 7 (0x7), region = 5 }
   0x7 PF: > { %4 = sbr.rel (%p5_p0) target bundleno = 16 (0x10), region = 6 }
   0xa LB: >> { %5 = smov 2 }
   0xc   : >> { %p6 = scmp.ge.s32.totalorder %s27, 5 /* loop exit test */ }
   0xf   : > { %6 = sbr.rel (%p7_p0) target bundleno = 17 (0x11), region = 7 }
  0x11 PF: > { %7 = smov 3 }
  0x12   : > { %p24 = scmp.ge.s32.totalorder %s25, 66 /* loop exit test */ }
  0x13   :  { %8 = smov 4 }
"""


def rows():
    """A row for each cycle: matrix units busy in 8 to 15, a spill in 10 to 12."""
    matrix = {at: 4 if at < 14 else 2 for at in range(8, 16)}
    return "\n".join(f"{matrix.get(at, 0)} 0 1 0 0 0 0 1 {int(10 <= at <= 12)} 1" for at in range(20))


def test_cycles_and_what_they_use():
    schedule = tpu_report._schedule("attention_online", HEAD + rows(), BUNDLES)
    always = 2 + 1 + 2  # 2 and 3, 7, 17 and 18
    assert schedule.step == always + 8 + 4 * 3  # 8 to 15, three of them five times
    assert schedule.ends == 3 + 1
    assert schedule.used["MXU"] == 4 * (6 + 4 * 3) + 2 * 2
    assert schedule.used["VSTORE:SPILL"] == 5 * 3
    assert schedule.share("MXU") == (4 * 18 + 4) / 4 / schedule.step
    assert tpu_report.cycles(schedule, blocks=4) == schedule.step / 4 + schedule.ends / 64


def test_files_of_a_folder(tmp_path):
    for stem in ("12-attention_online.1", "34-fusion.7"):
        (tmp_path / f"{stem}-68-pre-delay_hlo-static-per-bundle-utilization.txt").write_text(HEAD + rows())
        (tmp_path / f"{stem}-65-packed-bundles-post-ra.txt").write_text(BUNDLES)
        (tmp_path / f"{stem}-64-schedule-analysis_packed-bundles-post-ra.txt").write_text("")
    (schedule,) = tpu_report.schedules(tmp_path)
    assert schedule.kernel == "attention_online"
    assert tpu_report.schedules(tmp_path, since={x.name for x in tmp_path.iterdir()}) == []
    (tmp_path / "12-attention_online.1-65-packed-bundles-post-ra.txt").unlink()
    with pytest.raises(ValueError, match=r"0 schedules of 12-attention_online.1 in .*, not 1"):
        tpu_report.schedules(tmp_path)


def test_another_format(tmp_path):
    with pytest.raises(ValueError, match=r"has 0 loops and 10 columns: unknown format"):
        tpu_report._schedule("attention_online", HEAD + rows(), "\n")


def test_table(capsys):
    schedule = tpu_report._schedule("attention_online", HEAD + rows(), BUNDLES)
    tpu_report.show("v5e", {("forward", "ours"): (schedule, 1.0)})
    table = capsys.readouterr().out
    assert "v5e" in table and "forward            ours" in table
    assert f"{schedule.step + schedule.ends / 32:6.0f}" in table

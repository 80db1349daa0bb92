"""What is read off machine code, on a few lines of it."""

from collections import Counter

from rcm_jax.kernels import triton_sass

HOPPER = """
        /*0000*/                   MUFU.EX2 R1, R2 ;
.L_x_0:
        /*0010*/                   LDS R1, [R2] ;
        /*0020*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   WARPGROUP.ARRIVE ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R88, R152, gdesc[UR12].tnspB, R88, gsb0 ;
        /*0060*/               @P2 BRA `(.L_x_2) ;
        /*0070*/                   FSEL R1, R2, R3, P0 ;
        /*0080*/                   FSEL R1, R2, R3, P0 ;
.L_x_2:
        /*0090*/                   MUFU.EX2 R1, R2 ;
        /*00a0*/              @UP0 UIADD3 UR1, UR2, UR3, URZ ;
        /*00b0*/                   F2F.BF16.F32 R1, R2 ;
        /*00c0*/              @!P0 BRA `(.L_x_1) ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   BRA `(.L_x_3);
"""


def test_the_loop_with_the_products():
    """Without what a branch jumps over, and without the loops that have no product."""
    step = triton_sass.main_loop(HOPPER)
    assert step is not None
    assert step.kinds == {"sync": 1, "matmul": 2, "other": 3, "exp2": 1, "convert": 1}
    assert step.operations == 2 * 64 * (128 + 32) * 16 / 4


def test_ampere():
    loop = ".L_x_0:\n/*0010*/ HMMA.16816.F32.BF16 R1, R2, R3, R1 ;\n/*0020*/ @P0 BRA `(.L_x_0) ;"
    step = triton_sass.main_loop(loop)
    assert step is not None
    assert step.operations == 2 * 16 * 8 * 16


def test_no_loop():
    assert triton_sass.main_loop("/*0000*/ HMMA.16816.F32.BF16 R1, R2, R3, R1 ;") is None
    assert triton_sass.main_loop(".L_x_0:\n/*0000*/ FADD R1, R2, R3 ;\n/*0010*/ BRA `(.L_x_0);") is None


def test_cycles():
    """Of 8 warps, by the rates of an H100."""
    step = triton_sass.Step(Counter(matmul=16, exp2=60, convert=4, other=120), 2**20)
    assert step.cycles("sm90", 8) == {"matmul": 2048, "special": 8 * 64 * 2, "issue": 8 * 200 / 4}
    assert step.cycles("sm80", 8)["matmul"] == 4096

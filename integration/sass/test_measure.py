"""Listings are read as they are meant: loops, spills, bytes, in the words of both vendors."""

from __future__ import annotations

import pytest

from . import measure

pytestmark = pytest.mark.sass

SASS = """
        /*0000*/                   I2F.RP R0, UR10 ;
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, RZ ;
        /*0018*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
.L_x_1:
//## kernel.py:10: for t in range(first, last):
        /*0020*/              @!P1 IADD3 R1, R2, R3, RZ ;
.L_x_2:
        /*0030*/                   LDS R1, [R2] ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
//## kernel.py:11: w0 = tl.load(w)
        /*0050*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR20][R2.64], !P1 ;
        /*0060*/                   LDGSTS.E [R1], [R2.64], !P1 ;
        /*0070*/                   LDG.E.U16 R1, [R2.64] ;
//## kernel.py:12: s = tl.load(scales)
        /*0080*/                   LDGSTS.E.64 [R1], [R2.64], !P1 ;
        /*0090*/                   LDG.E R1, [R2.64] ;
        /*00a0*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*00b0*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*00c0*/                   PRMT R1, R2, 0x5410, R3 ;
        /*00d0*/                   F2F.F32.F16 R1, R2 ;
        /*00e0*/                   F2FP.PACK_AB R1, R2, R3 ;
        /*00f0*/                   STS.U16 [R1], R2 ;
        /*0100*/                   NOP ;
.L_x_9:
        /*0110*/              @!P3 BRA `(.L_x_8) ;
        /*0120*/               @P2 BRA.U `(.L_x_1) ;
        /*0130*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0140*/                   STL [R1+0x4], R5 ;
        /*0150*/                   EXIT ;
.L_x_8:
        /*0160*/              @!P3 BRA `(.L_x_8) ;
        /*0170*/                   LDL R5, [R1+0x4] ;
        /*0180*/                   BRA `(.L_x_9) ;
"""

AMD = """
	.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
	v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], 0
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
//## kernel.py:11: w0 = tl.load(w)
	global_load_dwordx4 v[0:3], v[4:5], off
	global_load_ushort v1, v[4:5], off offset:2
//## kernel.py:12: s = tl.load(scales)
	global_load_dword v0, v[4:5], off
	;;#ASMSTART
v_and_b32 v1, 0xf000f, v2
v_or_b32 v1, 0x64006400, v1
	;;#ASMEND
	v_cvt_f32_f16_e32 v1, v2
	v_cvt_f16_u16_e32 v1, v2
	v_mfma_f32_16x16x16_f16 v[0:3], v[4:5], v[6:7], v[0:3]
	ds_write_b64 v1, v[2:3]
	v_perm_b32 v1, v2, v3, v4
	s_nop 1
	s_cbranch_scc0 .LBB0_4
; %bb.3:
	s_branch .LBB0_2
.LBB0_4:
	scratch_store_dword off, v1, off
	s_endpgm
	.section .debug
	.long .Lfunc_begin0
"""


def test_the_main_loop_of_sass() -> None:
    loop = measure.measure(SASS)
    assert loop == measure.Loop(
        instructions=16,
        vector=16,
        matrix=2,
        kind="HMMA.16816.F32",
        macs=2 * 16 * 8 * 16,
        copies={16: 16, 4: 4},
        loads={2: 2},
        conversions=1,
        permutes=1,
        shared_stores=1,
    )
    assert measure.spills(measure.parse(SASS)) == 2


def test_the_main_loop_of_amdgcn() -> None:
    loop = measure.measure(AMD)
    assert loop == measure.Loop(
        instructions=12,
        vector=6,
        matrix=1,
        kind="v_mfma_f32_16x16x16_f16",
        macs=16**3,
        copies={},
        loads={16: 16, 2: 2},
        conversions=1,
        permutes=1,
        shared_stores=1,
    )
    assert measure.spills(measure.parse(AMD)) == 1


def test_the_inner_of_two_loops_is_taken_and_of_neighbours_the_larger() -> None:
    def loop(label: str, body: str) -> str:
        return f".L_{label}:\n{body}  /*0010*/ BRA `(.L_{label}) ;\n"

    mma = "  /*0000*/ HGMMA.64x16x16.F32 R1, R2, R3 ;\n"
    nested = measure.measure(loop("out", mma + loop("in", 2 * mma) + mma))
    assert (nested.matrix, nested.instructions, nested.macs) == (2, 3, 2 * 64 * 16 * 16 // 4)
    beside = measure.measure(loop("rest", mma) + loop("unrolled", 4 * mma))
    assert beside.matrix == 4


def test_a_block_behind_the_end_closes_no_loop() -> None:
    listing = """
        /*0000*/               @P0 BRA `(.L_rare) ;
.L_back:
        /*0010*/                   HMMA.16816.F32 R1, R2, R3, R1 ;
        /*0020*/               @P1 EXIT ;
.L_rare:
        /*0030*/                   BRA `(.L_back) ;
"""
    with pytest.raises(measure.NoLoop):
        measure.measure(listing)
    assert measure.measure(listing.replace("@P0 BRA", "@P0 MOV")).matrix == 1
